"""Noise schedules: what a linear-Gaussian process x_t = α_t x0 + σ_t ε is made of.

A schedule maps diffusion time t to (α_t, σ_t), and a real-valued index i to t: i = 0 is the noisiest of
N levels, i = N-1 the least noisy, and every index above N-1 is the clean state (α = 1, σ = 0). As α and σ
are all there is to such a process, `diffrl.EDM()` and its siblings are passed wherever a `process` is wanted.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

__all__ = ["DDPM", "EDM", "PROCESSES", "VP", "Flow", "Schedule"]


class Schedule(ABC):
    """t → (α_t, σ_t), and the grid of N levels that a chain walks down."""

    t_clean: ClassVar[float] = 0.0
    """The time of clean data: α = 1, σ = 0."""
    continuous: ClassVar[bool] = True
    """Whether times between the levels exist."""

    @abstractmethod
    def alpha(self, t: Tensor) -> Tensor:
        """Signal scale α_t ∈ [0, 1], of t's shape and dtype."""

    @abstractmethod
    def sigma(self, t: Tensor) -> Tensor:
        """Noise scale σ_t ≥ 0, of t's shape and dtype."""

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
        """What a network is told of t: ln(σ_t/α_t)/4, kept in [-10, 10] so that clean data and pure noise are finite.

        Source: Elucidating the Design Space of Diffusion-Based Generative Models (Karras et al., 2022), Table 1.
        """
        return (-self.log_snr(t) / 8).clamp(-10, 10)

    def time(self, index: Tensor, num_steps: int) -> Tensor:
        """Time of a real-valued index; above N-1 it is the clean state.

        Args:
            index: i, any shape; whole numbers for a discrete process.
            num_steps: N ≥ 1.

        Returns:
            t, float64, of the shape of `index`.

        Raises:
            ValueError: num_steps < 1, or a fraction for a discrete process.
        """
        if num_steps < 1:
            raise ValueError(f"num_steps is {num_steps}: a chain needs at least one noise level")
        i = index.double()
        return torch.where(
            i > num_steps - 1, self.t_clean, self._level(i.clamp(max=num_steps - 1), num_steps)
        )

    def time_grid(self, num_steps: int) -> Tensor:
        """Times of the N levels, noisiest first, then of the clean state: float64, shape [N+1]."""
        return self.time(torch.arange(num_steps + 1), num_steps)


@dataclass(frozen=True)
class EDM(Schedule):
    """Variance-exploding process of EDM: t is the noise level itself, α_t = 1, σ_t = t.

        σ_i = (σ_max^{1/ρ} + i/(N-1) (σ_min^{1/ρ} - σ_max^{1/ρ}))^ρ,    i real, i ≤ N-1

    Source: Elucidating the Design Space of Diffusion-Based Generative Models (Karras et al., 2022), eq. 5,
    https://arxiv.org/abs/2206.00364.

    Args:
        sigma_min: least noisy level, in units of the data, > 0.
        sigma_max: noisiest level.
        rho: exponent of the grid; larger gives more small levels.
    """

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0

    def __post_init__(self) -> None:
        if not 0 < self.sigma_min < self.sigma_max:
            raise ValueError(
                f"EDM needs 0 < sigma_min < sigma_max, not {self.sigma_min} and {self.sigma_max}"
            )

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

    def _roots(self) -> tuple[float, float]:
        return self.sigma_max ** (1 / self.rho), self.sigma_min ** (1 / self.rho)

    def _level(self, index: Tensor, num_steps: int) -> Tensor:
        high, low = self._roots()
        return (high + index / max(num_steps - 1, 1) * (low - high)) ** self.rho

    def index(self, t: Tensor, num_steps: int) -> Tensor:
        high, low = self._roots()
        return (t.double() ** (1 / self.rho) - high) / (low - high) * (num_steps - 1)


@dataclass(frozen=True)
class VP(Schedule):
    """Variance-preserving process in continuous time, t ∈ [0, 1]: σ_t = √(1-α_t²).

        linear:  α_t = exp(-½ (β_min t + ½ (β_max - β_min) t²))
        cosine:  α_t = cos(½π t)

    Levels are spaced evenly from t_max = 1 (cosine: just below, as α = 0 has no log-SNR) to t_min.

    Source: Score-Based Generative Modeling through Stochastic Differential Equations (Song et al., 2021), eq. 11
    and appendix C, https://arxiv.org/abs/2011.13456; cosine: Improved Denoising Diffusion Probabilistic Models
    (Nichol & Dhariwal, 2021), eq. 17 without offset, https://arxiv.org/abs/2102.09672.
    """

    kind: Literal["linear", "cosine"] = "linear"
    beta_min: float = 0.1
    beta_max: float = 20.0
    t_min: float = 1e-3
    t_max: float = 0.999

    def __post_init__(self) -> None:
        if self.kind not in ("linear", "cosine"):
            raise ValueError(f"VP has kinds linear and cosine, not {self.kind!r}")
        if not 0 < self.t_min < self.t_max <= 1:
            raise ValueError(f"VP needs 0 < t_min < t_max <= 1, not {self.t_min} and {self.t_max}")

    def _log_alpha(self, t: Tensor) -> Tensor:
        if self.kind == "cosine":
            return (t * (math.pi / 2)).cos().log()
        return -0.5 * (self.beta_min * t + 0.5 * (self.beta_max - self.beta_min) * t**2)

    def alpha(self, t: Tensor) -> Tensor:
        return self._log_alpha(t).exp()

    def sigma(self, t: Tensor) -> Tensor:
        if self.kind == "cosine":
            return (t * (math.pi / 2)).sin()
        return (-torch.expm1(2 * self._log_alpha(t))).sqrt()

    def alpha_dot(self, t: Tensor) -> Tensor:
        if self.kind == "cosine":
            return -(math.pi / 2) * (t * (math.pi / 2)).sin()
        return -0.5 * (self.beta_min + (self.beta_max - self.beta_min) * t) * self.alpha(t)

    def sigma_dot(self, t: Tensor) -> Tensor:
        return -self.alpha(t) * self.alpha_dot(t) / self.sigma(t)

    def t_from_log_snr(self, log_snr: Tensor) -> Tensor:
        if self.kind == "cosine":
            return torch.atan((-log_snr / 2).exp()) * (2 / math.pi)
        # -2 log α = softplus(-log SNR) = β_min t + ½ (β_max - β_min) t²
        c = torch.nn.functional.softplus(-log_snr)
        b, a = self.beta_min, 0.5 * (self.beta_max - self.beta_min)
        return 2 * c / (b + (b**2 + 4 * a * c).sqrt())

    def _level(self, index: Tensor, num_steps: int) -> Tensor:
        return self.t_max + index / max(num_steps - 1, 1) * (self.t_min - self.t_max)

    def index(self, t: Tensor, num_steps: int) -> Tensor:
        return (t.double() - self.t_max) / (self.t_min - self.t_max) * (num_steps - 1)


@dataclass(frozen=True)
class DDPM(Schedule):
    """Discrete variance-preserving chain: α_t = √ᾱ_t, σ_t = √(1-ᾱ_t), t ∈ {T-1, …, 0}; clean data is t = -1.

        linear:  β_t evenly spaced from beta_start to beta_end,    ᾱ_t = Π_{s≤t} (1-β_s)
        cosine:  β_t = min(1 - f(t+1)/f(t), 0.999),    f(t) = cos²(½π (t/T + 0.008)/1.008)

    A chain of N < T steps takes the timesteps round((N-i) T/N) - 1 ('trailing': the noisiest is T-1).

    Source: Denoising Diffusion Probabilistic Models (Ho et al., 2020), eq. 4, https://arxiv.org/abs/2006.11239;
    cosine: Improved Denoising Diffusion Probabilistic Models (Nichol & Dhariwal, 2021), eq. 17,
    https://arxiv.org/abs/2102.09672.
    """

    t_clean: ClassVar[float] = -1.0
    continuous: ClassVar[bool] = False

    train_steps: int = 1000
    kind: Literal["linear", "cosine"] = "linear"
    beta_start: float = 1e-4
    beta_end: float = 0.02

    def __post_init__(self) -> None:
        if self.kind == "linear":
            betas = torch.linspace(self.beta_start, self.beta_end, self.train_steps, dtype=torch.float64)
        elif self.kind == "cosine":
            f = torch.arange(self.train_steps + 1, dtype=torch.float64) / self.train_steps
            f = ((f + 0.008) / 1.008 * (math.pi / 2)).cos() ** 2
            betas = (1 - f[1:] / f[:-1]).clamp(max=0.999)
        else:
            raise ValueError(f"DDPM has kinds linear and cosine, not {self.kind!r}")
        # entry 0 is the clean state, so that t = -1 needs no special case
        alphas_cumprod = torch.cat([torch.ones(1, dtype=torch.float64), (1 - betas).cumprod(0)])
        object.__setattr__(self, "_alphas_cumprod", alphas_cumprod)

    @property
    def alphas_cumprod(self) -> Tensor:
        """ᾱ_t for t = 0..T-1, float64, shape [T]."""
        return self._table()[1:]

    def _table(self) -> Tensor:
        return object.__getattribute__(self, "_alphas_cumprod")

    def _alpha_bar(self, t: Tensor) -> Tensor:
        return self._table().to(t.device)[t.round().long() + 1]

    def alpha(self, t: Tensor) -> Tensor:
        return self._alpha_bar(t).sqrt().to(t.dtype)

    def sigma(self, t: Tensor) -> Tensor:
        return (1 - self._alpha_bar(t)).sqrt().to(t.dtype)

    def alpha_dot(self, t: Tensor) -> Tensor:
        raise ValueError("DDPM has discrete times and no derivative: use VP, or a sampler such as DDIM")

    def sigma_dot(self, t: Tensor) -> Tensor:
        return self.alpha_dot(t)

    def t_from_log_snr(self, log_snr: Tensor) -> Tensor:
        levels = self.log_snr(torch.arange(self.train_steps, dtype=torch.float64, device=log_snr.device))
        t = (levels - log_snr.double().unsqueeze(-1)).abs().argmin(-1)
        return t.to(log_snr.dtype)

    def _level(self, index: Tensor, num_steps: int) -> Tensor:
        if num_steps > self.train_steps:
            raise ValueError(f"num_steps is {num_steps}, but this DDPM has only {self.train_steps} timesteps")
        if not bool((index == index.round()).all()):
            raise ValueError("DDPM has discrete times: span, stride and offset must be whole numbers")
        return ((num_steps - index) * (self.train_steps / num_steps)).round() - 1

    def index(self, t: Tensor, num_steps: int) -> Tensor:
        return (num_steps - (t.double() + 1) * (num_steps / self.train_steps)).round()


@dataclass(frozen=True)
class Flow(Schedule):
    """Rectified flow: α_t = 1-t, σ_t = t, t ∈ [0, 1]; levels are t_i = 1 - i/N.

    The noisiest state is pure noise (α = 0). `shift` moves levels toward noise, t → s t/(1 + (s-1) t).

    Source: Flow Straight and Fast (Liu et al., 2022), https://arxiv.org/abs/2209.03003; shift: Scaling Rectified
    Flow Transformers for High-Resolution Image Synthesis (Esser et al., 2024), eq. 23,
    https://arxiv.org/abs/2403.03206.
    """

    shift: float = 1.0

    def __post_init__(self) -> None:
        if self.shift <= 0:
            raise ValueError(f"Flow needs shift > 0, not {self.shift}")

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

    def c_noise(self, t: Tensor) -> Tensor:
        """The time itself: pure noise has no finite log-SNR."""
        return t

    def _level(self, index: Tensor, num_steps: int) -> Tensor:
        u = 1 - index.clamp(min=0) / num_steps  # nothing is noisier than pure noise
        return self.shift * u / (1 + (self.shift - 1) * u)

    def index(self, t: Tensor, num_steps: int) -> Tensor:
        t = t.double()
        return num_steps * (1 - t / (self.shift - (self.shift - 1) * t))


PROCESSES: dict[str, type[Schedule]] = {"edm": EDM, "ddpm": DDPM, "vp": VP, "flow": Flow}
