"""Which steps of a rollout make up each update: selection, shuffling, minibatches."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Generator

from diffrl import keys

__all__ = ["Updates", "micro_batches"]


@dataclass(frozen=True)
class Updates:
    """Minibatches of a rollout's steps; only stochastic steps, which have a log-probability, are among them.

    order "trajectory": trajectories are shuffled and split into `minibatches`; an update has all selected steps of
    each of its trajectories, as in DDPO. Updates per pass: `minibatches`.

    order "step": each trajectory's (each pair's) steps are shuffled on their own; update j of a pass has the
    j-th of each, so that it mixes denoising times, as in SDPO. Updates per pass: `minibatches` × selected steps.

    Sources: Training Diffusion Models with Reinforcement Learning (Black et al., 2024) and its code,
    https://arxiv.org/abs/2305.13301; Aligning Few-Step Diffusion Models with Dense Reward Difference Learning (Zhang
    et al., 2024) and its code, https://arxiv.org/abs/2411.11727.

    Args:
        order: "trajectory" or "step".
        minibatches: parts that the trajectories are split into.
        passes: over the rollout.
        last: only the last so many of the stochastic steps; None: all.
        fraction: share of those, drawn anew for every trajectory and pass, at least one.
        micro_batch: most states forwarded at once; gradients are accumulated over them.

    Raises:
        ValueError: an argument outside its range.
    """

    order: Literal["trajectory", "step"] = "trajectory"
    minibatches: int = 2
    passes: int = 1
    last: int | None = None
    fraction: float = 1.0
    micro_batch: int = 256

    def __post_init__(self) -> None:
        if self.order not in ("trajectory", "step"):
            raise ValueError(f"updates.order is {self.order!r}: give 'trajectory' or 'step'")
        for name in ("minibatches", "passes", "micro_batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"updates.{name} is {getattr(self, name)}: it must be at least 1")
        if self.last is not None and self.last < 1:
            raise ValueError(f"updates.last is {self.last}: give at least 1, or null for all steps")
        if not 0 < self.fraction <= 1:
            raise ValueError(f"updates.fraction is {self.fraction}: it lies in (0, 1]")

    def steps_of(self, num_trainable: int) -> int:
        """Steps of each trajectory that a pass trains, of so many stochastic ones."""
        return max(1, int(min(num_trainable, self.last or num_trainable) * self.fraction))

    def count(self, num_trainable: int) -> int:
        """Optimiser updates of one rollout with so many stochastic steps."""
        return self.passes * self.minibatches * (self.steps_of(num_trainable) if self.order == "step" else 1)

    def largest_part(self, trajectories: int, num_trainable: int, *, group_size: int) -> int:
        """The most states that are forwarded at once; arguments as in `count` and `__call__`."""
        n = -(-(trajectories // group_size) // self.minibatches) * group_size
        k = 1 if self.order == "step" else self.steps_of(num_trainable)
        k = max(1, min(k, self.micro_batch // group_size))
        return k * min(n, max(1, self.micro_batch // (k * group_size)) * group_size)

    def __call__(
        self, rollout: TensorDictBase, *, group_size: int, generator: Generator
    ) -> Iterator[TensorDict]:
        """Steps [n, k] of each update, in order.

        Args:
            rollout: [B, K].
            group_size: rows that stay together, at the same steps: 2 for pairs, else 1.
            generator: of the shuffling, on the CPU.

        Raises:
            ValueError: no step is stochastic, or fewer trajectories (pairs) than minibatches.
        """
        steps = rollout.get(keys.TRAINABLE)[0, :, 0].nonzero()[:, 0].cpu()
        if not len(steps):
            raise ValueError("no step is stochastic, so none can be trained: give a sampler with noise")
        steps = steps if self.last is None else steps[-self.last :]
        units, k = len(rollout) // group_size, self.steps_of(len(steps))
        if units < self.minibatches:
            raise ValueError(f"{units} trajectories or pairs cannot make {self.minibatches} minibatches")
        members = torch.arange(group_size)
        for _ in range(self.passes):
            order = torch.randperm(units, generator=generator)
            shuffled = steps[torch.rand(units, len(steps), generator=generator).argsort(1)][:, :k]
            for columns in [shuffled] if self.order == "trajectory" else shuffled.split(1, dim=1):
                for unit in order.tensor_split(self.minibatches):
                    rows = (unit[:, None] * group_size + members).flatten()
                    chosen = columns[unit].repeat_interleave(group_size, 0)
                    yield rollout[rows[:, None].to(rollout.device), chosen.to(rollout.device)]


def micro_batches(minibatch: TensorDict, size: int, *, group_size: int) -> Iterator[TensorDict]:
    """Parts of a minibatch [n, k] of at most `size` states (but one of each member), with whole groups of rows."""
    k = max(1, min(minibatch.shape[1], size // group_size))
    n = max(1, size // (k * group_size)) * group_size
    for rows in minibatch.split(n):
        yield from rows.split(k, dim=1)
