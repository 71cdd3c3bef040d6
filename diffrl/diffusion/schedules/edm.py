"""EDM's variance-exploding process: the time is the noise level."""

from dataclasses import dataclass

import torch
from torch import Tensor

from diffrl.diffusion.schedules.base import Schedule
from diffrl.diffusion.schedules.registry import PROCESSES
from diffrl.ranges import require_number

__all__ = ["EDM"]


@PROCESSES.register("edm")
@dataclass(frozen=True)
class EDM(Schedule):
    """Variance-exploding process of EDM: t is the noise level itself, α_t = 1, σ_t = t.

        σ_i = (σ_max^{1/ρ} + i/(N-1) (σ_min^{1/ρ} - σ_max^{1/ρ}))^ρ,    i real, i ≤ N-1

    Source: Elucidating the Design Space of Diffusion-Based Generative Models (Karras et al., 2022), eq. 5,
    https://arxiv.org/abs/2206.00364.

    Args:
        sigma_min: least noisy level, in units of the data, in [1e-6, 1e6): beyond, float32 holds the datum or the
            noise alone.
        sigma_max: noisiest level, in (sigma_min, 1e6].
        rho: exponent of the grid, in [1, 100]; larger gives more small levels.

    Raises:
        ValueError: an argument outside its range.
    """

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0

    def __post_init__(self) -> None:
        require_number("sigma_min", self.sigma_min, 1e-6, 1e6, "[)")
        require_number("sigma_max", self.sigma_max, self.sigma_min, 1e6, "(]")
        require_number("rho", self.rho, 1, 100)

    def alpha(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def sigma(self, t: Tensor) -> Tensor:
        return t

    def alpha_dot(self, t: Tensor) -> Tensor:
        return torch.zeros_like(t)

    def sigma_dot(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def t_from_log_snr(self, log_snr: Tensor) -> Tensor:
        return (-log_snr / 2).exp()

    @property
    def t_least(self) -> float:
        """σ_min."""
        return self.sigma_min

    def c_noise(self, t: Tensor) -> Tensor:
        return (t.log() / 4).clamp(-10, 10)

    def _roots(self) -> tuple[float, float]:
        return self.sigma_max ** (1 / self.rho), self.sigma_min ** (1 / self.rho)

    def _level(self, index: Tensor, num_steps: int) -> Tensor:
        high, low = self._roots()
        return (high + index / max(num_steps - 1, 1) * (low - high)) ** self.rho

    def index(self, t: Tensor, num_steps: int) -> Tensor:
        high, low = self._roots()
        return (t.double() ** (1 / self.rho) - high) / (low - high) * max(num_steps - 1, 1)
