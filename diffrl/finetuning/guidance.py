"""A teacher: a policy that is asked at any time, under guidance or without, and gets no gradient."""

from typing import Any

import torch
from torch import Tensor

from diffrl.errors import InputError
from diffrl.finetuning.piece import Setting
from diffrl.finetuning.policy import DenoisingPolicy

__all__ = ["Teacher", "teacher_of"]


class Teacher:
    """D_T of states at any time: with guidance D_c + (w - 1)(D_c - D_∅), as `GuidedDenoiser`.

    Args:
        policy: whose denoiser it is; guidance needs one with `null_condition`.
        guidance_scale: w ≥ 1; 1 is without guidance.

    Raises:
        ValueError: a scale below 1, or guidance of a denoiser without conditions.
    """

    def __init__(self, policy: DenoisingPolicy, guidance_scale: float = 1.0) -> None:
        if not guidance_scale >= 1:
            raise InputError(
                f"guidance_scale is {guidance_scale}: it is at least 1, which is without guidance"
            )
        if guidance_scale > 1 and not hasattr(policy.denoiser, "null_condition"):
            raise InputError(
                f"guidance_scale is {guidance_scale}, but this denoiser has no condition to leave out: set it to 1"
            )
        self.policy, self.guidance_scale = policy, guidance_scale

    @torch.no_grad()
    def __call__(self, x_t: Tensor, t: Tensor, cond: Tensor | None) -> Tensor:
        """The guided estimate of states [N, *E] at times [N]."""
        D_c = self.conditional(x_t, t, cond)
        return (
            D_c
            if self.guidance_scale == 1
            else D_c + (self.guidance_scale - 1) * self.emphasis(D_c, x_t, t, cond)
        )

    @torch.no_grad()
    def conditional(self, x_t: Tensor, t: Tensor, cond: Tensor | None) -> Tensor:
        """The estimate without guidance."""
        return self.policy.denoise(x_t, t, cond)

    @torch.no_grad()
    def emphasis(self, D_c: Tensor, x_t: Tensor, t: Tensor, cond: Tensor | None) -> Tensor:
        """D_c - D_∅: what the condition adds.

        Raises:
            ValueError: there is no condition.
        """
        if cond is None:
            raise InputError("guidance needs conditions: give some, or guidance_scale=1")
        denoiser: Any = self.policy.denoiser
        return D_c - self.policy.denoise(x_t, t, denoiser.null_condition(cond))


def teacher_of(setting: Setting, policy: DenoisingPolicy, guidance_scale: float) -> Teacher:
    """A `Teacher` in a run.

    Raises:
        ValueError: guidance in a run without conditions.
    """
    if guidance_scale > 1 and setting.conditions is None:
        raise InputError(
            f"guidance_scale is {guidance_scale:g}, but the model has no conditions to guide by: set it to 1"
        )
    return Teacher(policy, guidance_scale)
