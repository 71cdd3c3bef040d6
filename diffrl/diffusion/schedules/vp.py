"""Variance-preserving processes in continuous time, along one of three curves."""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from diffrl.diffusion.schedules.base import Schedule
from diffrl.diffusion.schedules.curves import Cosine, Curve, LinearBeta, Scaled, Sigmoid
from diffrl.diffusion.schedules.registry import PROCESSES
from diffrl.errors import InputError
from diffrl.ranges import require_number

__all__ = ["VP"]


@PROCESSES.register("vp")
@dataclass(frozen=True)
class VP(Schedule):
    """Variance-preserving process in continuous time, t ∈ [0, 1]: σ_t = √(1-α_t²).

        linear:   α_t = exp(-½ (β_min t + ½ (β_max - β_min) t²))
        cosine:   α_t = cos(½π t)
        sigmoid:  α_t² = (s(end/τ) - s(u)) / (s(end/τ) - s(start/τ)),    u = (start + t (end - start))/τ

    Levels are spaced evenly from t_max to t_min. Cosine and sigmoid have α = 0 at t = 1: keep t_max below it
    if a log-SNR or a prediction of noise is needed. An `input_scale` b shifts the log-SNR by 2 log b: the state
    is then α_t b x0 + σ_t ε divided by its standard deviation, which has the same posterior but ends at x0.
    Simple diffusion's shift is the same, with b = (resolution the curve was made for)/(resolution of the data).
    Sources: see `diffrl.diffusion.schedules.curves`.

    Args:
        kind: "linear", "cosine" or "sigmoid".
        beta_min: β at t = 0, in [1e-6, 200] (linear).
        beta_max: β at t = 1, in [beta_min, 200] (linear).
        t_min: time of the least noisy level, in [1e-6, t_max).
        t_max: time of the noisiest level, ≤ 1.
        start, end: of the piece of the logistic curve, start < end (sigmoid).
        tau: τ > 0 (sigmoid).
        input_scale: b ∈ [0.001, 1000].
        log_snr_max: if given, in (0, 50]: the levels run between the times at which the log-SNR, before a shift, is
            plus and minus this; t_min and t_max are then unused. Simple diffusion has the cosine with 15.

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
            raise InputError(f"VP has kinds sigmoid, linear and cosine, not {self.kind!r}")
        require_number("t_max", self.t_max, 1e-6, 1, "(]")
        require_number("t_min", self.t_min, 1e-6, self.t_max, "[)")
        require_number("input_scale", self.input_scale, 1e-3, 1e3)
        LinearBeta(self.beta_min, self.beta_max)  # of the curves that are not chosen, too
        Sigmoid(self.start, self.end, self.tau)
        if self.log_snr_max is not None:
            require_number("log_snr_max", self.log_snr_max, 0, 50, "(]")
        if self._ends[1] > 1:
            raise InputError(f"log_snr_max is {self.log_snr_max}: the {self.kind} curve does not go so far")

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
        curve = self._curve  # making it checks its numbers
        if self.log_snr_max is None:
            return self.t_min, self.t_max
        ends = torch.tensor([self.log_snr_max, -self.log_snr_max], dtype=torch.float64)
        low, high = curve.t_from_log_snr(ends + 2 * math.log(self.input_scale)).tolist()
        return low, high

    @property
    def t_least(self) -> float:
        """t_min, or the time that `log_snr_max` gives."""
        return self._ends[0]

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
        return t.clamp(max=1)  # rounding must not pass the end of the process

    def index(self, t: Tensor, num_steps: int) -> Tensor:
        t_min, t_max = self._ends
        return (t.double() - t_max) / (t_min - t_max) * max(num_steps - 1, 1)
