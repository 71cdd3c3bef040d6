"""Chains of several lengths, so that one model learns to generate in few steps of any of these numbers."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Generator

from diffrl.errors import InputError
from diffrl.finetuning.policy import DenoisingPolicy
from diffrl.finetuning.rollouts.chains import Rollouts
from diffrl.finetuning.rollouts.registry import ROLLOUTS
from diffrl.ranges import require_int

if TYPE_CHECKING:
    from diffrl.finetuning.recipe import Recipe

__all__ = ["StepCounts"]


@ROLLOUTS.register("step_counts")
@dataclass(frozen=True)
class StepCounts(Rollouts):
    """`Rollouts` whose number of steps K is drawn anew for each: TDM-unify.

        K ~ U{counts}

    The policy has its own K again in evaluations. A denoiser that is told K (`StepConditioned`, ``model.step_counts``)
    learns them apart; without being told it has to make do with one answer for all.

    Source: Learning Few-Step Diffusion Models by Trajectory Distribution Matching (Luo et al., 2025), eq. 8,
    https://arxiv.org/abs/2503.06674.

    Args:
        trajectories: see `Rollouts`.
        group_size: see there.
        pairs: see there.
        at_once: see there.
        overlap: see there.
        counts: the values of K.

    Raises:
        ValueError: sizes that do not fit, or counts that are no positive integers.
    """

    counts: tuple[int, ...] = (1, 2, 4)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "counts", tuple(self.counts))  # a configuration has a list
        for count in self.counts:
            require_int("rollouts.counts", count)
        if not self.counts:
            raise InputError("rollouts.counts is empty: give numbers of steps")

    def num_steps(self, policy: DenoisingPolicy, generator: Generator) -> int:
        """One of the counts."""
        return self.counts[int(torch.randint(len(self.counts), (1,), generator=generator))]

    def refuses(self, policy: DenoisingPolicy) -> str | None:
        """Refuse counts that the denoiser is not told apart by."""
        known = getattr(policy.denoiser, "step_counts", self.counts)
        if unknown := [count for count in self.counts if count not in known]:
            return f"rollouts.counts has {unknown}, but the denoiser knows {list(known)} steps"
        return super().refuses(policy)

    def conflict(self, recipe: "Recipe") -> str | None:
        """Refuse updates of single steps, whose number would vary."""
        if recipe.updates.unit == "steps":
            return "the number of updates would vary with the number of steps: set rollouts=chains"
        return super().conflict(recipe)
