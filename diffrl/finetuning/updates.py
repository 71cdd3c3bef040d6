"""What each update is made of: steps of trajectories, or their clean samples at fresh times and noise."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Generator, Tensor

from diffrl import keys
from diffrl.errors import InputError
from diffrl.finetuning.piece import Piece
from diffrl.finetuning.policy import DenoisingPolicy
from diffrl.objectives.denoising import sample_log_normal_states, sample_uniform_states
from diffrl.ranges import require_int, require_number
from diffrl.registry import Registry

if TYPE_CHECKING:
    from diffrl.finetuning.recipe import Recipe

__all__ = ["UPDATES", "SampleUpdates", "UpdatePlan", "Updates", "micro_batches"]

UPDATES = Registry("updates", "diffrl.finetuning.updates")


class UpdatePlan(Piece, ABC):
    """Makes minibatches [n, k] of a rollout."""

    unit: ClassVar[Literal["steps", "samples"]]
    """What a minibatch holds."""
    minibatches: int
    passes: int
    micro_batch: int

    @property
    def single(self) -> bool:
        """Whether a rollout gives one update."""
        return (self.minibatches, self.passes) == (1, 1)

    @abstractmethod
    def count(self, num_trainable: int) -> int:
        """Optimiser updates of one rollout with so many stochastic steps."""

    @abstractmethod
    def largest_part(self, trajectories: int, num_trainable: int, *, group_size: int) -> int:
        """The most states that are forwarded at once."""

    @abstractmethod
    def __call__(
        self,
        rollout: TensorDictBase,
        *,
        policy: DenoisingPolicy,
        group_size: int,
        generator: Generator,
        entries: Iterable[str],
    ) -> Iterator[TensorDict]:
        """Minibatches [n, k] of one iteration, in order.

        Args:
            rollout: [B, K], with advantages.
            policy: what drew it.
            group_size: rows that stay together: 2 for pairs, else 1.
            generator: of shuffling, times and noise, on the CPU.
            entries: what the losses read.
        """

    def weight(self, part: TensorDictBase) -> int:
        """How many states of a part [n, k] its loss averages over."""
        return part.numel()

    def conflict(self, recipe: "Recipe") -> str | None:
        """Refuse more minibatches than there are trajectories or pairs."""
        r = recipe.rollouts
        if r.trajectories // r.rows_together < self.minibatches:
            return (
                f"{r.trajectories} trajectories cannot make {self.minibatches} minibatches: set "
                "updates.minibatches lower"
            )
        return None

    def _check(self) -> None:
        for name in ("minibatches", "passes", "micro_batch"):
            require_int(f"updates.{name}", getattr(self, name))


@UPDATES.register("steps")
@dataclass(frozen=True)
class Updates(UpdatePlan):
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
        drop_last: the very last so many of them are not trained, as Flow-GRPO's code leaves out one.
        fraction: share of those, drawn anew for every trajectory and pass, at least one.
        micro_batch: most states forwarded at once; gradients are accumulated over them.

    Raises:
        ValueError: an argument outside its range.
    """

    unit: ClassVar[Literal["steps"]] = "steps"
    order: Literal["trajectory", "step"] = "trajectory"
    minibatches: int = 2
    passes: int = 1
    last: int | None = None
    drop_last: int = 0
    fraction: float = 1.0
    micro_batch: int = 256

    def __post_init__(self) -> None:
        if self.order not in ("trajectory", "step"):
            raise InputError(f"updates.order is {self.order!r}: give 'trajectory' or 'step'")
        self._check()
        if self.last is not None:
            require_int("updates.last", self.last)
        require_int("updates.drop_last", self.drop_last, 0)
        require_number("updates.fraction", self.fraction, 0, 1, "(]")

    @property
    def single(self) -> bool:
        """Whether a rollout gives one update."""
        return super().single and self.order == "trajectory"

    def steps_of(self, num_trainable: int) -> int:
        """Steps of each trajectory that a pass trains, of so many stochastic ones."""
        kept = num_trainable - self.drop_last
        return max(1, int(min(kept, self.last or kept) * self.fraction))

    def count(self, num_trainable: int) -> int:
        """Optimiser updates of one rollout with so many stochastic steps."""
        return self.passes * self.minibatches * (self.steps_of(num_trainable) if self.order == "step" else 1)

    def largest_part(self, trajectories: int, num_trainable: int, *, group_size: int) -> int:
        """The most states that are forwarded at once."""
        n = -(-(trajectories // group_size) // self.minibatches) * group_size
        k = 1 if self.order == "step" else self.steps_of(num_trainable)
        k = max(1, min(k, self.micro_batch // group_size))
        return k * min(n, max(1, self.micro_batch // (k * group_size)) * group_size)

    def refuses(self, policy: DenoisingPolicy) -> str | None:
        """Refuse a policy without a stochastic step that is left to train."""
        steps = len(policy.stochastic_steps)
        if steps > self.drop_last:
            return None
        if steps:
            return (
                f"updates.drop_last is {self.drop_last}, and only {steps} steps are stochastic: set it lower"
            )
        return (
            "no step of the policy is stochastic, so none has a log-probability: give a sampler with noise, "
            "more steps, or policy.std_floor"
        )

    def __call__(
        self,
        rollout: TensorDictBase,
        *,
        policy: DenoisingPolicy,
        group_size: int,
        generator: Generator,
        entries: Iterable[str],
    ) -> Iterator[TensorDict]:
        """Steps [n, k] of each update, in order; members of a group are at the same steps.

        Raises:
            ValueError: no step is stochastic, or fewer trajectories (pairs) than minibatches.
        """
        steps = self._trainable(rollout.get(keys.TRAINABLE)[::group_size, :, 0].cpu())
        rollout = rollout.select(*entries, keys.TRAINABLE, keys.COND, strict=False)
        units, k = len(steps), self.steps_of(steps.shape[1] + self.drop_last)
        if units < self.minibatches:
            raise InputError(f"{units} trajectories or pairs cannot make {self.minibatches} minibatches")
        members = torch.arange(group_size)
        for _ in range(self.passes):
            order = torch.randperm(units, generator=generator)
            shuffled = steps.gather(1, torch.rand(steps.shape, generator=generator).argsort(1))[:, :k]
            for columns in [shuffled] if self.order == "trajectory" else shuffled.split(1, dim=1):
                for unit in order.tensor_split(self.minibatches):
                    rows = (unit[:, None] * group_size + members).flatten()
                    chosen = columns[unit].repeat_interleave(group_size, 0)
                    yield rollout[rows[:, None].to(rollout.device), chosen.to(rollout.device)]

    def weight(self, part: TensorDictBase) -> int:
        """The stochastic steps."""
        return int(part.get(keys.TRAINABLE).sum())

    def _trainable(self, mask: Tensor) -> Tensor:
        """Stochastic steps of each unit, [units, m]; a unit with fewer than the most is filled up with others."""
        m = int(mask.sum(1).max())
        if m <= self.drop_last:
            beyond = f" but the last {self.drop_last}, which are dropped" if self.drop_last else ""
            raise InputError(
                f"no step is stochastic{beyond}, so none can be trained: give a sampler with noise"
            )
        steps = mask.int().argsort(dim=1, stable=True)  # stochastic ones come last, in order
        steps = steps[:, -m : steps.shape[1] - self.drop_last]
        return steps if self.last is None else steps[:, -self.last :]


@UPDATES.register("samples")
@dataclass(frozen=True)
class SampleUpdates(UpdatePlan):
    """Minibatches of clean samples, each at fresh times with fresh noise: no step needs a log-probability.

        x_t = α_t x_K + σ_t ε,    with the advantage of the trajectory that ended in x_K

    Deterministic samplers can be tuned this way. A minibatch holds x_t, t, x0 (the sample), advantage, cond, group.

    Sources: updates of this kind are those of Advantage Weighted Matching (Xue et al., 2025),
    https://arxiv.org/abs/2509.25050, and of DiffusionNFT (Zheng et al., 2025), https://arxiv.org/abs/2509.16117.

    Args:
        times: law of t: "uniform" over a fine grid of the process, or "log_normal" as in EDM.
        draws: m, times that are drawn for each sample in each pass.
        minibatches: parts that the samples are split into.
        passes: over the rollout.
        micro_batch: most states forwarded at once; gradients are accumulated over them.

    Raises:
        ValueError: an argument outside its range.
    """

    unit: ClassVar[Literal["samples"]] = "samples"
    times: Literal["uniform", "log_normal"] = "uniform"
    draws: int = 1
    minibatches: int = 2
    passes: int = 1
    micro_batch: int = 256

    def __post_init__(self) -> None:
        self._check()
        if self.times not in ("uniform", "log_normal"):
            raise InputError(f"updates.times is {self.times!r}: give 'uniform' or 'log_normal'")
        require_int("updates.draws", self.draws)

    def conflict(self, recipe: "Recipe") -> str | None:
        """Refuse rewards of single steps, which no sample has."""
        if recipe.placement.dense:
            return (
                "updates of samples take one advantage a trajectory, not one a step: take placement terminal"
            )
        return super().conflict(recipe)

    def count(self, num_trainable: int) -> int:
        """Passes × minibatches, whatever the steps."""
        return self.passes * self.minibatches

    def largest_part(self, trajectories: int, num_trainable: int, *, group_size: int) -> int:
        """The most states that are forwarded at once."""
        return min(self.micro_batch, -(-trajectories // self.minibatches) * self.draws)

    def __call__(
        self,
        rollout: TensorDictBase,
        *,
        policy: DenoisingPolicy,
        group_size: int,
        generator: Generator,
        entries: Iterable[str],
    ) -> Iterator[TensorDict]:
        """Samples [n, m] of each update, in order."""
        last = rollout[:, -1]
        data = {keys.X0: last.get((keys.NEXT, keys.X_T)), keys.ADVANTAGE: last.get(keys.ADVANTAGE)}
        data |= {key: last.get(key) for key in (keys.COND, keys.GROUP) if key in last.keys()}
        samples = TensorDict(data, [len(last)])
        units, members = len(samples) // group_size, torch.arange(group_size)
        draw = sample_uniform_states if self.times == "uniform" else sample_log_normal_states
        for _ in range(self.passes):
            for unit in torch.randperm(units, generator=generator).tensor_split(self.minibatches):
                rows = (unit[:, None] * group_size + members).flatten().to(rollout.device)
                part = samples[rows.repeat_interleave(self.draws)]
                x0 = part.get(keys.X0)
                states = draw(policy.process, x0.cpu(), generator=generator).squeeze(1).to(x0.device)
                part.update(states.select(keys.X_T, keys.T))
                yield part.view(len(rows), self.draws)


def micro_batches(minibatch: TensorDict, size: int, *, group_size: int) -> Iterator[TensorDict]:
    """Parts of a minibatch [n, k] of at most `size` states (but one of each member), with whole groups of rows."""
    k = max(1, min(minibatch.shape[1], size // group_size))
    n = max(1, size // (k * group_size)) * group_size
    for rows in minibatch.split(n):
        yield from rows.split(k, dim=1)
