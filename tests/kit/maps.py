"""Two-time denoisers for the tests of flow maps: a small network, and exact ones of Gaussian data."""

from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor, nn

from diffrl.diffusion.denoisers import Denoiser
from diffrl.diffusion.exact import GaussianDenoiser
from diffrl.diffusion.networks.mlp import MLP
from diffrl.diffusion.schedules.base import Schedule
from diffrl.diffusion.schedules.edm import EDM
from diffrl.diffusion.schedules.flow import Flow
from diffrl.objectives.maps.states import map_states
from diffrl.objectives.registry import OBJECTIVES

PROCESSES = [Flow(), EDM(0.01, 20.0)]
DIM = 2
MAPS = [
    entry.name for entry in OBJECTIVES.entries() if entry.make.__module__.startswith("diffrl.objectives.maps")
]
"""Names of the objectives of two-time denoisers."""


def two_times(process: Schedule, prediction_type: Any = None, seed: int = 0) -> Denoiser:
    """A network whose last layer is not 0, in float64."""
    torch.manual_seed(seed)
    network = MLP((DIM,), hidden=8, depth=1, x_features=4, noise_features=4, second_time=True)
    nn.init.normal_(network.last.weight, std=0.3)
    kind = prediction_type or ("velocity" if isinstance(process, Flow) else "edm")
    return Denoiser(network, process, 0.5, kind).double()


class ExactMaps(nn.Module):
    """D*(x, t, r) of Gaussian data, with a parameter θ of no effect at 0: D* + θ x, whose gradient can be looked at."""

    second_time = True

    def __init__(self, process: Schedule, std: float = 1.0) -> None:
        super().__init__()
        covariance = std**2 * torch.eye(DIM, dtype=torch.float64)
        self.exact = GaussianDenoiser(process, torch.zeros(DIM, dtype=torch.float64), covariance)
        self.theta = nn.Parameter(torch.zeros((), dtype=torch.float64))
        self.process, self.sigma_data = process, std

    def forward(self, x: Tensor, t: Tensor, cond: Tensor | None = None, r: Tensor | None = None) -> Tensor:
        return self.exact(x, t, cond, t if r is None else r) + self.theta * x


def states(process: Schedule, B: int = 5, std: float = 1.0, seed: int = 0, **times: Tensor) -> TensorDict:
    """Draws of N(0, std²) at times between clean data and noise, r = 0 and r = t among them."""
    generator = torch.Generator().manual_seed(seed)
    x0 = std * torch.randn(B, DIM, generator=generator, dtype=torch.float64)
    s = 4 * torch.rand(2, B, generator=generator, dtype=torch.float64) + 0.05
    t, r = process.t_from_log_snr(-2 * s.log()).sort(0, descending=True).values
    t, r = times.get("t", t), times.get("r", r)
    return map_states(process, x0, t, r, generator=generator)


def average_velocity(denoiser: nn.Module, x: Tensor, t: Tensor, r: Tensor) -> Tensor:
    """u(x, t, r) of states [N, *E] at times [N]."""
    u: Tensor = (x - denoiser(x, t, None, r)) / t.view(-1, *[1] * (x.ndim - 1))
    return u


def gradient(value: Tensor, module: nn.Module) -> Tensor:
    grads = torch.autograd.grad(value, [p for p in module.parameters() if p.requires_grad], allow_unused=True)
    return torch.cat([g.flatten() for g in grads if g is not None])
