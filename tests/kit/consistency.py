"""Small consistency functions."""

from typing import Any

import torch
from torch import Tensor, nn

from diffrl.diffusion.denoisers import Denoiser
from diffrl.diffusion.schedules.edm import EDM

SIGMA_MIN, SIGMA_MAX, RHO, SIGMA_DATA = 0.002, 80.0, 7.0, 0.5


class Wave(nn.Module):
    """A network that tells states, noise levels and labels apart, with few parameters."""

    def __init__(self, scale: float = 0.7) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(scale, dtype=torch.float64))
        self.shift = nn.Parameter(torch.tensor(0.3, dtype=torch.float64))

    def forward(self, x: Tensor, c_noise: Tensor, cond: Tensor | None) -> Tensor:
        level = c_noise.view(-1, *[1] * (x.ndim - 1))
        label = 0.0 if cond is None else 0.1 * cond.view(-1, *[1] * (x.ndim - 1))
        return torch.sin(self.scale * x + self.shift * level + label)


def consistency(network: nn.Module | None = None, **options: Any) -> Denoiser:  # noqa: ANN401
    return Denoiser(network or Wave(), EDM(), SIGMA_DATA, "consistency", **options)


def level(i: float, N: int) -> float:
    """σ_i of the ρ-schedule, which ends at σ_min: the released code clips indices to it."""
    i = min(i, N - 1)
    high, low = SIGMA_MAX ** (1 / RHO), SIGMA_MIN ** (1 / RHO)
    return (high + i / (N - 1) * (low - high)) ** RHO
