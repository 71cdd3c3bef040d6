"""Data from N(0, 1), where a denoiser is one number at each level, D(x, t) = a x_t/α_t: exact ones, and grids."""

import inspect
import math
from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from diffrl.diffusion.exact import GaussianDenoiser
from diffrl.diffusion.predictions import scalings
from diffrl.diffusion.schedules.base import Schedule
from diffrl.diffusion.schedules.edm import EDM
from diffrl.diffusion.schedules.flow import Flow
from diffrl.objectives.registry import OBJECTIVES

__all__ = [
    "SIGMA_DATA",
    "c_out",
    "default",
    "denoiser",
    "edm_through",
    "exact",
    "flow_map",
    "flow_through",
    "root",
]

SIGMA_DATA = 1.0


@cache
def default(name: str, option: str) -> Any:  # noqa: ANN401
    """The default of an option of an objective, from its signature."""
    found = (inspect.signature(function).parameters for function in OBJECTIVES.entry(name).functions)
    return next(parameters[option].default for parameters in found if option in parameters)


def denoiser(s: float, K: int = 0) -> float:
    """D* = E[x0 | x_t]: a = 1/(1+s²)."""
    return 1 / (1 + s**2)


def flow_map(s: float, K: int = 0, *, r: float = 0.0) -> float:
    """D*(x, t, r) of the ODE's map, which is X_{t→0} at r = 0: a = 1/√(1+s²). r is a ratio like s."""
    if r == 0:
        return 1 / math.sqrt(1 + s**2)
    ratio = math.sqrt((1 + r**2) / (1 + s**2))
    return (ratio - r / s) / (1 - r / s)


@cache
def edm_through(s: float, K: int) -> tuple[EDM, int]:
    """EDM with σ_max moved to the nearest number at which s is one of K levels, and the index of s."""
    plain = EDM()
    i = int(plain.index(torch.tensor(s, dtype=torch.float64), K).round().clamp(0, K - 2))
    low, at, share = plain.sigma_min ** (1 / plain.rho), s ** (1 / plain.rho), i / (K - 1)
    return EDM(sigma_max=((at - share * low) / (1 - share)) ** plain.rho), i


@cache
def flow_through(s: float, K: int) -> tuple[Flow, int]:
    """Flow with the shift nearest to 1 at which s is one of K levels, and the index of s."""
    i = min(max(round(K / (1 + s)), 1), K - 1)
    u = 1 - i / K
    return Flow(shift=s * (1 - u) / u), i


def exact(process: Schedule) -> GaussianDenoiser:
    """E[x0 | x_t] of N(0, 1)."""
    return GaussianDenoiser(process, torch.zeros(1), torch.eye(1))


def c_out(process: Schedule, s: float) -> float:
    """Scale of an "edm" network's output at the time s."""
    return float(scalings(process, torch.tensor(s, dtype=torch.float64), "edm", SIGMA_DATA).c_out)


def root(f: Callable[..., float], low: float, high: float) -> float:
    """Where f rises through 0, by bisection."""
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if f(middle) > 0 else (middle, high)
    return (low + high) / 2
