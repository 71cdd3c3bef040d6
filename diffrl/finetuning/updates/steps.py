"""Updates on steps of trajectories, which have log-probabilities."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Generator, Tensor

from diffrl import keys
from diffrl.errors import InputError
from diffrl.finetuning.policy import DenoisingPolicy
from diffrl.finetuning.updates.base import UpdatePlan
from diffrl.finetuning.updates.registry import UPDATES
from diffrl.ranges import require_int, require_number

if TYPE_CHECKING:
    pass

__all__ = ["Updates"]


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

    shared: ClassVar[bool] = True
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
