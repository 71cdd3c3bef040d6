"""Linear denoisers of data from N(0, 1), and what a loss makes of their numbers."""

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor, nn

from diffrl.diffusion.denoisers import Denoiser
from diffrl.diffusion.predictions import Scalings, scalings
from diffrl.diffusion.schedules.base import Schedule
from diffrl.diffusion.schedules.edm import EDM
from diffrl.objectives.registry import OBJECTIVES
from diffrl.objectives.soft_update import SoftUpdate
from docs.fixed_points import SOLUTIONS, Row, verdict
from docs.normal_levels import denoiser, exact, flow_map
from tests.kit.oracles import Estimate, generator

Coefficient = Callable[..., float]
Pulls = Callable[[Coefficient], Tensor]


class Linear(nn.Module):
    """What makes of a denoiser in any form D = (a/α + θ) x, a by times, θ a number for each of some levels."""

    second_time, event_shape = True, (1,)

    def __init__(self, a: Coefficient, levels: Tensor, process: Schedule) -> None:
        super().__init__()
        self.a, self.levels, self.process, self.predicts_variance = a, levels, process, False
        self.theta = nn.Parameter(torch.zeros(len(levels), dtype=torch.float64))
        self.scalings: Any = None

    def forward(self, x: Tensor, t: Tensor, cond: Tensor | None, r: Tensor) -> Tensor:
        c_skip, c_out, _ = self.scalings(t)
        a = x.new_tensor([self.a(*times) for times in zip(t.tolist(), r.tolist(), strict=True)])
        near = (t[:, None] - self.levels).abs()
        theta = torch.where(near.min(1).values < 1e-9, self.theta[near.argmin(1)], 0)
        F = (a / self.process.alpha(t) + theta - c_skip) / torch.where(c_out > 0, c_out, 1)
        F_x = F[:, None] * x
        return torch.cat([F_x, 0 * x], 1) if self.predicts_variance else F_x


class Smooth(nn.Module):
    """D(x, t, r) = a x, exact or of the other candidate, with derivatives in its times; θ t x beside it."""

    second_time, sigma_data = True, 1.0

    def __init__(self, is_map: bool) -> None:
        super().__init__()
        self.process, self.is_map, self.exact = EDM(), is_map, exact(EDM())
        self.theta = nn.Parameter(torch.zeros((), dtype=torch.float64))

    @property
    def network(self) -> nn.Module:
        return self

    def forward(self, x: Tensor, t: Tensor, cond: Tensor | None = None, r: Tensor | None = None) -> Tensor:
        r = torch.zeros_like(t) if r is None else r
        D_x: Tensor = self.exact(x, t, None, r if self.is_map else t)
        return D_x + self.theta * t[:, None] * x

    def scalings(self, t: Tensor) -> Scalings:
        return scalings(self.process, t, "edm", self.sigma_data)


def linear(process: Schedule, a: Coefficient, levels: Tensor, kind: Any = "edm", **options: Any) -> Denoiser:
    network = Linear(a, levels, process)
    D = Denoiser(network, process, 1.0, kind, time_input="t", scale_input=False, **options)
    network.scalings = D.scalings
    return D.double()


def table(levels: Tensor, numbers: Any) -> Coefficient:
    """A coefficient that is known at some levels."""
    known = {round(t, 9): number for t, number in zip(levels.tolist(), numbers, strict=True)}
    return lambda t, r=0.0: known[round(t, 9)]


def basis(n: int) -> Tensor:
    """Draws of n numbers, whose means of products are exactly those of independent standard ones: [n, n]."""
    return n**0.5 * torch.eye(n, dtype=torch.float64)


def made(name: str, D: Any, **options: Any) -> Any:  # noqa: ANN401
    """The loss of an objective, with a target network that has followed to where the network is."""
    loss: Any = OBJECTIVES.entry(name).make(D, **options)
    if loss.bootstrap_network is not loss.value_network:
        SoftUpdate(loss, eps=0.5)
        loss.bootstrap_network.module.denoiser = D
    if hasattr(loss, "plan"):
        loss.lmbda = min(loss.plan.candidates)
    return loss


def moved(loss: Any, states: TensorDict) -> Tensor:  # noqa: ANN401
    """What moves θ at each level, on average over states."""
    (grad,) = torch.autograd.grad(loss(states)["loss_value"], loss.denoiser.network.theta)
    return grad


def of_draws(pull: Callable[[Tensor], Tensor], n: int = 20_000, parts: int = 20) -> Estimate:
    """What moves θ on average over n draws of datum and noise, and as many with the noise turned round."""
    z = torch.randn(n, 2, generator=generator(), dtype=torch.float64)
    z = torch.cat([z, z * z.new_tensor([1, -1])], 1).view(2 * n, 2)
    found = torch.stack([pull(part).squeeze() for part in z.chunk(parts)])
    return Estimate(found.mean(), found.std() / parts**0.5)


def assert_stands_still(pulls: Pulls, a: Coefficient, *wrong: Coefficient, rtol: float = 1e-8) -> None:
    """Nothing moves at a; every level does at another function; and some do at what is not the solution."""
    other = pulls(lambda t, *r: a(t, *r) * (1.2 + 0.1 * math.sin(3 * math.log(t) + 1))).abs()
    assert float((pulls(a).abs() / other).max()) < rtol
    for candidate in wrong:
        assert float((pulls(candidate).abs() / other).max()) > 1e-3


def given(words: str, group: str) -> dict[str, Any]:
    """Options of a group, from words of a command line."""
    found = (re.fullmatch(rf"{group}\.(\w+)=(.+)", word) for word in words.split())
    return {m[1]: float(m[2]) if re.fullmatch(r"[\d.]+", m[2]) else m[2] for m in found if m}


def rows(*names: str) -> list[Any]:
    return [pytest.param(name, row, id=f"{name} {row.words}") for name in names for row in SOLUTIONS[name]]


def others(row: Row) -> list[Coefficient]:
    """Those of D* and X that the page does not say it is."""
    known = {"denoiser": denoiser, "map": flow_map}
    group = verdict(row).group
    return [lambda t, r=0.0, exact=exact: exact(t) for name, exact in known.items() if name != group]
