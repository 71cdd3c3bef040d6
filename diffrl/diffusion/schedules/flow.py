"""Rectified flow: straight lines between data and noise."""

from dataclasses import dataclass

import torch
from torch import Tensor

from diffrl.diffusion.schedules.base import Schedule
from diffrl.diffusion.schedules.registry import PROCESSES
from diffrl.ranges import require_number

__all__ = ["Flow"]


@PROCESSES.register("flow")
@dataclass(frozen=True)
class Flow(Schedule):
    """Rectified flow: α_t = 1-t, σ_t = t, t ∈ [0, 1]; levels are t_i = 1 - i/N, or evenly spaced from 1 to t_min.

    The noisiest state is pure noise (α = 0).

    Source: Flow Straight and Fast (Liu et al., 2022), https://arxiv.org/abs/2209.03003; shift: Scaling
    Rectified Flow Transformers for High-Resolution Image Synthesis (Esser et al., 2024), eq. 23,
    https://arxiv.org/abs/2403.03206.

    Args:
        shift: s ∈ [0.001, 1000], moves the levels, t → s t/(1 + (s-1) t): toward noise if s > 1.
        t_min: the least noisy level before it is moved, in [1e-6, 1); None: 1/N.

    Raises:
        ValueError: an argument outside its range.
    """

    shift: float = 1.0
    t_min: float | None = None

    def __post_init__(self) -> None:
        if self.t_min is not None:
            require_number("t_min", self.t_min, 1e-6, 1, "[)")
        require_number("shift", self.shift, 1e-3, 1e3)

    def alpha(self, t: Tensor) -> Tensor:
        return 1 - t

    def sigma(self, t: Tensor) -> Tensor:
        return t

    def alpha_dot(self, t: Tensor) -> Tensor:
        return -torch.ones_like(t)

    def sigma_dot(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def t_from_log_snr(self, log_snr: Tensor) -> Tensor:
        return torch.sigmoid(-log_snr / 2)

    @property
    def t_least(self) -> float:
        """The clean end itself, as `c_noise` is finite there."""
        return self.t_clean

    def c_noise(self, t: Tensor) -> Tensor:
        """The time itself: pure noise has no finite log-SNR."""
        return t

    def _length(self, num_steps: int) -> float:  # in steps, of the way from 1 to 0
        return num_steps if self.t_min is None else max(num_steps - 1, 1) / (1 - self.t_min)

    def _level(self, index: Tensor, num_steps: int) -> Tensor:
        u = 1 - index.clamp(min=0) / self._length(num_steps)  # nothing is noisier than pure noise
        return self.shift * u / (1 + (self.shift - 1) * u)

    def index(self, t: Tensor, num_steps: int) -> Tensor:
        t = t.double()
        return self._length(num_steps) * (1 - t / (self.shift - (self.shift - 1) * t))
