"""Classifier-free guidance, which strengthens the influence of a condition on a denoiser."""

from typing import Any

import torch
from torch import Tensor, nn

from diffrl.diffusion.denoisers import Denoiser
from diffrl.errors import InputError

__all__ = ["GuidedDenoiser"]


class GuidedDenoiser(nn.Module):
    """Classifier-free guidance: D = D_∅ + w (D_c - D_∅); two network evaluations a call unless w is 0 or 1.

    Source: Classifier-Free Diffusion Guidance (Ho & Salimans, 2022), eq. 6 (w here is their 1 + w),
    https://arxiv.org/abs/2207.12598.

    Args:
        denoiser: conditional denoiser that takes null labels.
        null_label: the label that stands for no condition; num_classes for `diffrl.networks`.
        guidance_scale: w; 1 is without guidance, 0 without a condition.
    """

    def __init__(self, denoiser: Denoiser, null_label: int, guidance_scale: float) -> None:
        super().__init__()
        self.denoiser, self.null_label, self.guidance_scale = denoiser, null_label, guidance_scale
        self.process, self.prior = denoiser.process, getattr(denoiser, "prior", None)
        if guidance_scale != 1 and getattr(self.prior, "kind", None) == "class":
            raise InputError(
                f"guidance_scale is {guidance_scale:g}, but the noise is that of a class (denoiser.prior=class), with "
                "which no estimate without a class goes: give 1"
            )
        self.evaluations = 1 if guidance_scale in (0, 1) else 2
        """Network evaluations for each state."""

    @property
    def sigma_data(self) -> float:
        """σd of the denoiser, the standard deviation of the data."""
        return self.denoiser.sigma_data

    @property
    def scalings(self) -> Any:
        """See `diffrl.Denoiser.scalings`: D = c_skip x_t + c_out F holds of the guided outputs F of the network too."""
        return self.denoiser.scalings

    @property
    def second_time(self) -> bool:
        """Whether the denoiser takes a second time; its guided average is not the map of the guided ODE."""
        return bool(getattr(self.denoiser, "second_time", False))

    def forward(self, x_t: Tensor, t: Tensor, cond: Tensor | None = None, r: Tensor | None = None) -> Tensor:
        """Guided estimate; as `Denoiser.forward`, with labels cond of shape [N].

        Raises:
            ValueError: no labels.
        """
        cond = self._labels(cond)
        second = () if r is None else (r,)
        if self.guidance_scale == 1:
            return self.denoiser(x_t, t, cond, *second)
        unconditional = self.denoiser(x_t, t, torch.full_like(cond, self.null_label), *second)
        if self.guidance_scale == 0:
            return unconditional
        return unconditional + self.guidance_scale * (self.denoiser(x_t, t, cond, *second) - unconditional)

    def with_variance(self, x_t: Tensor, t: Tensor, cond: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The guided estimate, and v of the condition, which is not guided; see `diffrl.Denoiser.with_variance`."""
        cond, w = self._labels(cond), self.guidance_scale
        D_x, v = self.denoiser.with_variance(x_t, t, cond)
        if w == 1:
            return D_x, v
        D_none = self.denoiser(x_t, t, torch.full_like(cond, self.null_label))
        return D_none + w * (D_x - D_none), v

    @staticmethod
    def _labels(cond: Tensor | None) -> Tensor:
        if cond is None:
            raise InputError("guidance needs labels: give cond, shape [N]")
        return cond
