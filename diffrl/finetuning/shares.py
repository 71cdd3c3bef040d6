"""A fine-tuning run that several processes share: each asks network and reward about its rows, all hold the whole."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor, nn

from diffrl.errors import InputError
from diffrl.finetuning.policy import DenoisingPolicy, OfRows
from diffrl.finetuning.recipe import Recipe
from diffrl.rewards.black_box import BlackBox
from diffrl.rewards.calls import Reward
from diffrl.rewards.weighted_sum import WeightedSum
from diffrl.training.distributed import Ranks

__all__ = ["Shares"]

COUNTS = ("queries", "cache_hits", "retried", "failures")
"""What a reward counts, of all processes together."""


class Shares:
    """What processes do together in an iteration, so that it does not depend on how many there are.

    Every process draws the noise of the whole rollout from the one seed, and asks the network about its rows of each
    step and the reward about its rows of the samples; what is found all get. So each holds the rollout, its credit and
    the minibatches of one process, and takes the gradient of its rows of each minibatch:

        ∇L(minibatch) = Σ_r Σ_p w_rp ∇L(part p of the rows of r),    w_rp = steps of the part / steps

    Args:
        ranks: the processes; one alone asks about all rows.
        recipe: the method.
        reward: R.

    Raises:
        ValueError: several processes, and a piece, an option or a reward of which it is not shown that they come to
            what one does; or fewer trajectories (pairs) in a minibatch than processes.
    """

    def __init__(self, ranks: Ranks, recipe: Recipe, reward: BlackBox | WeightedSum) -> None:
        self.ranks, self.rows_together = ranks, recipe.rows_together
        if ranks.size == 1:
            return
        for piece in recipe.pieces:
            if not piece.shared:
                raise _not_shared(f"{type(piece).__name__}, a piece of the method,")
        if recipe.rollouts.overlap:
            raise _not_shared("rollouts.overlap=true")
        if getattr(reward, "normalise", "none") != "none":
            raise _not_shared("a running sum of rewards, normalise=running,")
        for box in _boxes(reward):
            if box.on_failure in ("worst", "mean"):
                raise _not_shared(f"reward_calls.on_failure={box.on_failure}")
        units = recipe.rollouts.trajectories // recipe.rows_together // recipe.updates.minibatches
        if units < ranks.size:
            what = "trajectories" if recipe.rows_together == 1 else "pairs"
            raise InputError(
                f"a minibatch has {units} {what} for {ranks.size} processes: raise rollouts.trajectories, lower "
                "updates.minibatches, or start fewer"
            )

    @contextmanager
    def acting(self, actor: DenoisingPolicy) -> Iterator[None]:
        """Let the processes share the rows that an actor is asked about."""
        alone = actor.over_rows
        if self.ranks.size > 1:
            actor.over_rows = self._over_rows
        try:
            yield
        finally:
            actor.over_rows = alone

    def _over_rows(self, of: OfRows, x_t: Tensor) -> Tensor:
        rows = self._rows(len(x_t))
        return self.ranks.whole(of(rows) if rows.start < rows.stop else x_t[rows], rows, len(x_t))

    def asked(self, reward: Reward, trajectories: int) -> Reward:
        """The reward, asked by each process about the samples of its trajectories; the two of a pair stay together."""
        if self.ranks.size == 1:
            return reward
        return _SharedReward(reward, self.ranks, trajectories // self.rows_together)

    def part(self, minibatch: TensorDict) -> TensorDict:
        """The rows [m, k] of a minibatch [n, k] that this process takes; rows that belong together stay so."""
        if self.ranks.size == 1:
            return minibatch
        return minibatch[self._rows(len(minibatch))]

    def _rows(self, count: int) -> slice:
        units = self.ranks.part(count // self.rows_together)
        return slice(units.start * self.rows_together, units.stop * self.rows_together)

    @contextmanager
    def counting(self, policies: Iterable[DenoisingPolicy]) -> Iterator[None]:
        """Let policies count what they are asked by all processes."""
        counted = [*policies]
        before = [policy.nfe for policy in counted]
        yield
        spent = self.ranks.sums(*(policy.nfe - n for policy, n in zip(counted, before, strict=True)))
        for policy, n, more in zip(counted, before, spent, strict=True):
            policy.nfe = n + round(more)

    def summed(self, figures: dict[str, float], names: Sequence[str]) -> dict[str, float]:
        """Sums of the figures that each process has of its part.

        Args:
            figures: by name; a process whose part has no stochastic step has none.
            names: that a loss may give.
        """
        if self.ranks.size == 1:
            return figures
        has = self.ranks.sums(*(float(name in figures) for name in names))
        found = self.ranks.sums(*(figures.get(name, 0.0) for name in names))
        return {name: value for name, value, given in zip(names, found, has, strict=True) if given > 0}

    def add_up_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Sum the gradients of the processes; parameters that have none in any keep none."""
        if self.ranks.size == 1:
            return
        has = self.ranks.sums(*(float(p.grad is not None) for p in parameters))
        reached = [p for p, given in zip(parameters, has, strict=True) if given > 0]
        for p in reached:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        self.ranks.add_up([p.grad for p in reached if p.grad is not None])


class _SharedReward:
    """A reward that each process asks about its rows; all get all answers, and count all questions.

    Args:
        reward: R, which checks and counts.
        ranks: the processes.
        units: parts of equal size that every call is made of, to be kept whole.
    """

    def __init__(self, reward: Any, ranks: Ranks, units: int) -> None:
        self.reward, self.ranks, self.units = reward, ranks, units

    def __call__(self, x0: Tensor, cond: Any = None) -> Tensor:
        units = self.units if len(x0) % self.units == 0 else len(x0)
        size, part = len(x0) // units, self.ranks.part(units)
        rows = slice(part.start * size, part.stop * size)
        counts = [(box, name) for box in _boxes(self.reward) for name in COUNTS]
        before = [getattr(box, name) for box, name in counts]
        found = self.reward(x0[rows], None if cond is None else cond[rows])
        spent = self.ranks.sums(*(getattr(*count) - n for count, n in zip(counts, before, strict=True)))
        for count, n, more in zip(counts, before, spent, strict=True):
            setattr(*count, n + round(more))
        return self.ranks.whole(found, rows, len(x0))


def _boxes(reward: Any) -> list[BlackBox]:
    """What counts the calls of a reward: itself, or its parts."""
    parts = getattr(reward, "parts", None)
    return [reward] if parts is None else [box for part in parts.values() for box in _boxes(part)]


def _not_shared(what: str) -> InputError:
    return InputError(
        f"{what} takes one process: it is not shown that several come to what one does; start it without torchrun"
    )
