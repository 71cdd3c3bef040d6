"""Noise schedules: what a linear-Gaussian process x_t = α_t x0 + σ_t ε is made of.

A schedule maps diffusion time t to (α_t, σ_t), and a real-valued index i to t: i = 0 is the noisiest of
N levels, i = N-1 the least noisy, and every index above N-1 is the clean state (α = 1, σ = 0). As α and σ
are all there is to such a process, `diffrl.EDM()` and its siblings are passed wherever a `process` is wanted.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Literal

import torch
from torch import Tensor

from diffrl.diffusion.schedules.curves import (
    Cosine,
    Curve,
    LinearBeta,
    Scaled,
    Sigmoid,
    discrete_alphas_cumprod,
)

__all__ = ["DDPM", "EDM", "PROCESSES", "VP", "Flow", "Schedule"]


class Schedule(ABC):
    """t → (α_t, σ_t), and the grid of N levels that a chain walks down."""

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
        """What a network is told of t: ln(σ_t/α_t)/4, kept in [-10, 10] to be finite at both ends.

        Source: Elucidating the Design Space of Diffusion-Based Generative Models (Karras et al., 2022),
        Table 1, https://arxiv.org/abs/2206.00364.
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
        i, last = index.double(), num_steps - 1
        # the tolerance: a rounded sum such as 16.8 + 0.2 must not fall off the grid
        return torch.where(i > last + 1e-9, self.t_clean, self._level(i.clamp(max=last), num_steps))

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
        rho: exponent of the grid, > 0; larger gives more small levels.

    Raises:
        ValueError: an argument outside its range.
    """

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0

    def __post_init__(self) -> None:
        if not 0 < self.sigma_min < self.sigma_max:
            raise ValueError(
                f"EDM needs 0 < sigma_min < sigma_max, not {self.sigma_min} and {self.sigma_max}"
            )
        if not self.rho > 0:
            raise ValueError(f"EDM needs rho > 0, not {self.rho}")

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


@dataclass(frozen=True)
class VP(Schedule):
    """Variance-preserving process in continuous time, t ∈ [0, 1]: σ_t = √(1-α_t²).

        linear:   α_t = exp(-½ (β_min t + ½ (β_max - β_min) t²))
        cosine:   α_t = cos(½π t)
        sigmoid:  α_t² = (s(end/τ) - s(u)) / (s(end/τ) - s(start/τ)),    u = (start + t (end - start))/τ

    Levels are spaced evenly from t_max to t_min. Cosine and sigmoid have α = 0 at t = 1: keep t_max below it
    where a log-SNR or a prediction of noise is wanted. An `input_scale` b shifts the log-SNR by 2 log b: it
    is for α_t b x0 + σ_t ε divided by its standard deviation, which has the same posterior but ends at x0.
    Simple diffusion's shift is that too, b = (resolution the curve was made for)/(resolution of the data).
    Sources: see `diffrl.diffusion.schedules.curves`.

    Args:
        kind: "linear", "cosine" or "sigmoid".
        beta_min: β at t = 0, > 0 (linear).
        beta_max: β at t = 1, ≥ beta_min (linear).
        t_min: time of the least noisy level, > 0.
        t_max: time of the noisiest level, ≤ 1.
        start, end: of the piece of the logistic curve, start < end (sigmoid).
        tau: τ > 0 (sigmoid).
        input_scale: b > 0.
        log_snr_max: if given, t_min and t_max are where the log-SNR, before a shift, is this and minus this;
            the cosine with 15 is simple diffusion's.

    Raises:
        ValueError: an argument outside its range.
    """

    kind: Literal["linear", "cosine", "sigmoid"] = "linear"
    beta_min: float = 0.1
    beta_max: float = 20.0
    t_min: float = 1e-3
    t_max: float = 0.999
    start: float = -3.0
    end: float = 3.0
    tau: float = 1.0
    input_scale: float = 1.0
    log_snr_max: float | None = None

    def __post_init__(self) -> None:
        if self.kind not in ("linear", "cosine", "sigmoid"):
            raise ValueError(f"VP has kinds sigmoid, linear and cosine, not {self.kind!r}")
        if not 0 < self.t_min < self.t_max <= 1:
            raise ValueError(f"VP needs 0 < t_min < t_max <= 1, not {self.t_min} and {self.t_max}")
        if self.log_snr_max is not None and not self.log_snr_max > 0:
            raise ValueError(f"VP needs log_snr_max > 0, not {self.log_snr_max}")
        if self._ends[1] > 1:
            raise ValueError(f"log_snr_max is {self.log_snr_max}: the {self.kind} curve does not go so far")

    @cached_property
    def _curve(self) -> Curve:
        curve: Curve = Cosine()
        if self.kind == "linear":
            curve = LinearBeta(self.beta_min, self.beta_max)
        elif self.kind == "sigmoid":
            curve = Sigmoid(self.start, self.end, self.tau)
        return curve if self.input_scale == 1 else Scaled(curve, self.input_scale)

    @cached_property
    def _ends(self) -> tuple[float, float]:
        """Times of the least noisy and of the noisiest level."""
        curve = self._curve  # which checks its numbers
        if self.log_snr_max is None:
            return self.t_min, self.t_max
        ends = torch.tensor([self.log_snr_max, -self.log_snr_max], dtype=torch.float64)
        low, high = curve.t_from_log_snr(ends + 2 * math.log(self.input_scale)).tolist()
        return low, high

    def alpha(self, t: Tensor) -> Tensor:
        return self._curve.alpha(t)

    def sigma(self, t: Tensor) -> Tensor:
        return self._curve.sigma(t)

    def alpha_dot(self, t: Tensor) -> Tensor:
        return self._curve.alpha_dot(t)

    def sigma_dot(self, t: Tensor) -> Tensor:
        return self._curve.sigma_dot(t)

    def t_from_log_snr(self, log_snr: Tensor) -> Tensor:
        return self._curve.t_from_log_snr(log_snr)

    def _level(self, index: Tensor, num_steps: int) -> Tensor:
        t_min, t_max = self._ends
        t = t_max + index / max(num_steps - 1, 1) * (t_min - t_max)
        return t.clamp(max=1)  # the process ends there

    def index(self, t: Tensor, num_steps: int) -> Tensor:
        t_min, t_max = self._ends
        return (t.double() - t_max) / (t_min - t_max) * max(num_steps - 1, 1)


@dataclass(frozen=True)
class DDPM(Schedule):
    """Discrete variance-preserving chain: α_t = √ᾱ_t, σ_t = √(1-ᾱ_t), t ∈ {T-1, …, 0}; clean data is t = -1.

    Kinds: see `discrete_alphas_cumprod`. Stable Diffusion's is scaled_linear, β from 0.00085 to 0.012.
    A chain of N < T steps takes the timesteps round((N-i) T/N) - 1 ('trailing': the noisiest is T-1).

    Source: Denoising Diffusion Probabilistic Models (Ho et al., 2020), eq. 4, https://arxiv.org/abs/2006.11239.

    Args:
        train_steps: T ≥ 1.
        kind: "linear", "scaled_linear" or "cosine".
        beta_start: β_0 (not cosine), > 0.
        beta_end: β_{T-1} (not cosine), ≥ beta_start and < 1.

    Raises:
        ValueError: an argument outside its range.
        IndexError: (alpha, sigma) a time outside -1..T-1.
    """

    t_clean: ClassVar[float] = -1.0
    continuous: ClassVar[bool] = False

    train_steps: int = 1000
    kind: Literal["linear", "scaled_linear", "cosine"] = "linear"
    beta_start: float = 1e-4
    beta_end: float = 0.02

    def __post_init__(self) -> None:
        if self.kind not in ("linear", "scaled_linear", "cosine"):
            raise ValueError(f"DDPM has kinds scaled_linear, linear and cosine, not {self.kind!r}")
        if self.train_steps < 1:
            raise ValueError(f"train_steps is {self.train_steps}: DDPM needs at least one timestep")
        if not 0 < self.beta_start <= self.beta_end < 1:
            raise ValueError(
                f"DDPM needs 0 < beta_start <= beta_end < 1, not {self.beta_start} and {self.beta_end}"
            )

    @cached_property
    def alphas_cumprod(self) -> Tensor:
        """ᾱ_t for t = 0..T-1, float64, shape [T]."""
        return discrete_alphas_cumprod(self.kind, self.train_steps, self.beta_start, self.beta_end)

    @cached_property
    def _scales(self) -> Tensor:
        """Rows α and σ; column 0 is the clean state, so that t = -1 needs no special case: shape [2, T+1]."""
        alpha_bar = torch.cat([torch.ones(1, dtype=torch.float64), self.alphas_cumprod])
        return torch.stack([alpha_bar, 1 - alpha_bar]).sqrt()

    def _look_up(self, row: int, t: Tensor) -> Tensor:
        place = t.round().long().flatten() + 1
        try:  # unlike [...], index_select refuses a negative place
            values = self._scales[row].to(t.device).index_select(0, place).view(t.shape)
        except IndexError as error:
            raise IndexError(f"a timestep lies outside -1..{self.train_steps - 1}") from error
        return values.to(t.dtype) if t.is_floating_point() else values

    def alpha(self, t: Tensor) -> Tensor:
        return self._look_up(0, t)

    def sigma(self, t: Tensor) -> Tensor:
        return self._look_up(1, t)

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
    """Rectified flow: α_t = 1-t, σ_t = t, t ∈ [0, 1]; levels are t_i = 1 - i/N, or evenly spaced from 1 to t_min.

    The noisiest state is pure noise (α = 0).

    Source: Flow Straight and Fast (Liu et al., 2022), https://arxiv.org/abs/2209.03003; shift: Scaling
    Rectified Flow Transformers for High-Resolution Image Synthesis (Esser et al., 2024), eq. 23,
    https://arxiv.org/abs/2403.03206.

    Args:
        shift: s > 0, moves the levels, t → s t/(1 + (s-1) t): toward noise if s > 1.
        t_min: the least noisy level before it is moved, in (0, 1); None: 1/N.

    Raises:
        ValueError: an argument outside its range.
    """

    shift: float = 1.0
    t_min: float | None = None

    def __post_init__(self) -> None:
        if self.t_min is not None and not 0 < self.t_min < 1:
            raise ValueError(f"Flow needs 0 < t_min < 1, not {self.t_min}")
        if not self.shift > 0:
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

    def _length(self, num_steps: int) -> float:  # in steps, of the way from 1 to 0
        return num_steps if self.t_min is None else max(num_steps - 1, 1) / (1 - self.t_min)

    def _level(self, index: Tensor, num_steps: int) -> Tensor:
        u = 1 - index.clamp(min=0) / self._length(num_steps)  # nothing is noisier than pure noise
        return self.shift * u / (1 + (self.shift - 1) * u)

    def index(self, t: Tensor, num_steps: int) -> Tensor:
        t = t.double()
        return self._length(num_steps) * (1 - t / (self.shift - (self.shift - 1) * t))


PROCESSES: dict[str, type[Schedule]] = {"edm": EDM, "ddpm": DDPM, "vp": VP, "flow": Flow}
