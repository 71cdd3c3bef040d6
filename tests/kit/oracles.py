"""What several test files measure with: processes to try, and estimates with their standard errors."""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from diffrl.diffusion.schedules.base import Schedule
from diffrl.diffusion.schedules.ddpm import DDPM
from diffrl.diffusion.schedules.edm import EDM
from diffrl.diffusion.schedules.flow import Flow
from diffrl.diffusion.schedules.vp import VP

CONTINUOUS = {
    "edm": EDM(),
    "edm_even": EDM(sigma_min=0.1, sigma_max=10.0, rho=1.0),
    "vp_linear": VP(),
    "vp_cosine": VP("cosine"),
    "flow": Flow(),
    "flow_shifted": Flow(shift=3.0),
    "flow_last_level": Flow(shift=3.0, t_min=0.05),
}
DISCRETE = {"ddpm_linear": DDPM(), "ddpm_cosine": DDPM(train_steps=100, kind="cosine")}

continuous = pytest.mark.parametrize("process", CONTINUOUS.values(), ids=CONTINUOUS.keys())
discrete = pytest.mark.parametrize("process", DISCRETE.values(), ids=DISCRETE.keys())
every_process = pytest.mark.parametrize(
    "process", [*CONTINUOUS.values(), *DISCRETE.values()], ids=[*CONTINUOUS.keys(), *DISCRETE.keys()]
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=dtype)


def noisy_times(process: Schedule, num_steps: int) -> Tensor:
    """The levels of a grid at which every prediction is defined: neither clean nor pure noise."""
    t = process.time_grid(num_steps)[:-1]
    return t[process.alpha(t) > 0]


class Estimate(NamedTuple):
    value: Tensor
    error: Tensor


class Line(NamedTuple):
    """y ≈ level + slope (x - mean of x)."""

    level: Estimate
    slope: Estimate


def fit_line(x: Tensor, y: Tensor) -> Line:
    """Least squares over the first dim, with standard errors that allow the scatter to depend on x."""
    x = x - x.mean(0)
    level, slope = y.mean(0), (x * y).sum(0) / (x * x).sum(0)
    rest = y - level - slope * x
    return Line(
        Estimate(level, rest.std(0) / len(x) ** 0.5),
        Estimate(slope, (x * rest).square().sum(0).sqrt() / (x * x).sum(0)),
    )


def assert_within(estimate: Estimate, expected: Tensor | float, *, errors: float = 5.0) -> None:
    """The estimate is the expected value, but for so many standard errors and rounding."""
    value, error = (torch.as_tensor(c, dtype=torch.float64) for c in estimate)
    expected = torch.as_tensor(expected, dtype=torch.float64).expand_as(value)
    assert bool(torch.isfinite(value).all())
    distance = (value - expected).abs() / (error + 1e-9)
    worst = int(distance.argmax())
    found, wanted = float(value.flatten()[worst]), float(expected.flatten()[worst])
    assert float(distance.max()) < errors, f"{found:g} is {distance.max():.1f} errors from {wanted:g}"
