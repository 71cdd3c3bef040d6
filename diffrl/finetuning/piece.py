"""What every piece of a fine-tuning method can be asked, and what it is told before a run begins."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from diffrl.finetuning.policy import DenoisingPolicy
from diffrl.training.optim import Optim

if TYPE_CHECKING:
    from diffrl.finetuning.recipe import Recipe

__all__ = ["Piece", "Setting"]


class Piece:
    """A part of a `Recipe`: it says itself what it does not go together with."""

    shared: ClassVar[bool] = False
    """Whether it is shown that several processes come to what one does; see `diffrl.finetuning.shares`."""

    def conflict(self, recipe: Recipe) -> str | None:
        """Why it cannot be used with the other pieces, and what to do about it; None if it can."""
        return None

    def refuses(self, policy: DenoisingPolicy) -> str | None:
        """Why it cannot tune this policy, and what to do about it; None if it can."""
        return None


@dataclass(frozen=True)
class Setting:
    """What a run is about: pieces that hold networks, losses or statistics are built from it.

    Args:
        policy: what is tuned.
        event_shape: *E of a latent.
        conditions: what conditions are drawn from, [M, ...]; None: no condition.
        optim: of the policy.
        kl_coef: weight of the KL term; 0 for none.
        kl_reference: π_ref of that term; None without one.
        reference: gives a copy of the policy: "frozen" as it was at the start, "teacher" what it learns from, "old" as
            it was when the present rollout was collected, "ema" its moving average.
        twin: gives a copy of the teacher, to be trained, by a name.
        seed: of the run.
        device: where it runs.
        kl_by_time: whether the KL term weights each step by its length in time.
    """

    policy: DenoisingPolicy
    event_shape: tuple[int, ...]
    conditions: Tensor | None
    optim: Optim
    kl_coef: float
    kl_reference: DenoisingPolicy | None
    reference: Callable[[str], DenoisingPolicy]
    twin: Callable[[str], DenoisingPolicy]
    seed: int
    device: torch.device
    kl_by_time: bool = False

    @property
    def dim(self) -> int:
        """Numbers of a latent."""
        return math.prod(self.event_shape)

    @property
    def num_labels(self) -> int:
        """Conditions that are integers 0..C-1: C; 0 where they are none, or something else."""
        c = self.conditions
        return 0 if c is None or c.ndim != 1 or c.is_floating_point() else int(c.max()) + 1
