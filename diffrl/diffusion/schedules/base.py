"""What a noise schedule is: the two curves of a linear-Gaussian process x_t = α_t x0 + σ_t ε, and its levels.

A schedule maps the diffusion time t to (α_t, σ_t), and a real-valued index i to t: i = 0 is the noisiest of
N levels, i = N-1 the least noisy, and every index above N-1 is the clean state (α = 1, σ = 0). These curves are
all there is to such a process, so a schedule is passed wherever an argument is called `process`.
"""

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from diffrl.ranges import MAX_STEPS, require_int

__all__ = ["Schedule"]


class Schedule(ABC):
    """The map from a time t to (α_t, σ_t), and the grid of N noise levels that a chain visits.

    A discrete process has integer times, and no derivatives.
    """

    t_clean: ClassVar[float] = 0.0
    """The time of clean data: α = 1, σ = 0."""
    continuous: ClassVar[bool] = True
    """Whether times between the levels exist."""

    @abstractmethod
    def alpha(self, t: Tensor) -> Tensor:
        """Signal scale α_t ∈ [0, 1], of t's shape and dtype (integer timesteps: float64)."""

    @abstractmethod
    def sigma(self, t: Tensor) -> Tensor:
        """Noise scale σ_t ≥ 0, of t's shape and dtype (integer timesteps: float64)."""

    @abstractmethod
    def alpha_dot(self, t: Tensor) -> Tensor:
        """dα/dt.

        Raises:
            ValueError: the process has discrete times only.
        """

    @abstractmethod
    def sigma_dot(self, t: Tensor) -> Tensor:
        """dσ/dt.

        Raises:
            ValueError: the process has discrete times only.
        """

    @abstractmethod
    def t_from_log_snr(self, log_snr: Tensor) -> Tensor:
        """Inverse of `log_snr`; a discrete process gives the nearest timestep."""

    @abstractmethod
    def _level(self, index: Tensor, num_steps: int) -> Tensor:
        """Time of the real-valued index ≤ N-1, float64."""

    @abstractmethod
    def index(self, t: Tensor, num_steps: int) -> Tensor:
        """Real-valued index of time t on the grid of N levels: inverse of `time`."""

    def log_snr(self, t: Tensor) -> Tensor:
        """log(α_t²/σ_t²): falls with t; +∞ for clean data, -∞ for pure noise."""
        return 2 * (self.alpha(t).log() - self.sigma(t).log())

    def c_noise(self, t: Tensor) -> Tensor:
        """The input by which a network knows t: ln(σ_t/α_t)/4, clamped to [-10, 10] so that it is always finite.

        Source: Elucidating the Design Space of Diffusion-Based Generative Models (Karras et al., 2022),
        Table 1, https://arxiv.org/abs/2206.00364.
        """
        return (-self.log_snr(t) / 8).clamp(-10, 10)

    @property
    def t_least(self) -> float:
        """Time of the least noisy level of the longest grid: see `c_noise_end`."""
        return float(self.time(torch.tensor(MAX_STEPS - 1), MAX_STEPS))

    def c_noise_end(self, r: Tensor) -> Tensor:
        """The input by which a network knows the time r that a jump leads to: `c_noise` of r, from `t_least` on.

        Clean data have no level, so they count as the least noisy one. The derivative is finite everywhere, and 0 below
        `t_least`.
        """
        return self.c_noise(r.clamp(min=self.t_least))

    def time(self, index: Tensor, num_steps: int) -> Tensor:
        """Time of a real-valued index; above N-1 it is the clean state.

        Args:
            index: i, any shape; whole numbers for a discrete process.
            num_steps: N, a whole number in [1, 1,000,000].

        Returns:
            t, float64, of the shape of `index`.

        Raises:
            ValueError: num_steps is something else, or an index is a fraction and the process discrete.
        """
        require_int("num_steps", num_steps, most=MAX_STEPS)
        i, last = index.double(), num_steps - 1
        # the tolerance: a rounded sum such as 16.8 + 0.2 must not fall off the grid
        return torch.where(i > last + 1e-9, self.t_clean, self._level(i.clamp(max=last), num_steps))

    def time_grid(self, num_steps: int) -> Tensor:
        """Times of the N levels, noisiest first, then of the clean state: float64, shape [N+1]."""
        return self.time(torch.arange(require_int("num_steps", num_steps, most=MAX_STEPS) + 1), num_steps)
