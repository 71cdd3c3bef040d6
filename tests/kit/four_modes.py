"""Four Gaussian modes on a circle, with an exact teacher, and networks that begin as that teacher."""

from typing import Any

import torch
from torch import Tensor, nn

import diffrl
from diffrl.data.mixtures import Mixture
from diffrl.diffusion.exact import MixtureDenoiser
from diffrl.diffusion.predictions import Scalings, scalings
from diffrl.diffusion.schedules.base import Schedule
from diffrl.finetuning.policy import DenoisingPolicy

STD = 0.25
ANGLES = torch.arange(4) * torch.pi / 2
MEANS = 1.5 * torch.stack([ANGLES.cos(), ANGLES.sin()], 1)
MIXTURE = Mixture(MEANS, torch.full((4,), STD), torch.full((4,), 0.25))


class ExactAndMore(nn.Module):
    """D = exact + c_out F: F is a small network that begins at 0."""

    def __init__(self, process: Schedule, hidden: int = 96) -> None:
        super().__init__()
        self.process, self.sigma_data = process, MIXTURE.sigma_data
        self.exact = MixtureDenoiser(process, MIXTURE.means, MIXTURE.stds, MIXTURE.weights)
        self.network = nn.Sequential(
            nn.Linear(5, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, 2)
        )
        nn.init.zeros_(self.network[-1].weight)
        nn.init.zeros_(self.network[-1].bias)

    def scalings(self, t: Tensor) -> Scalings:
        kinds: Any = {diffrl.Flow: "velocity", diffrl.VP: "v", diffrl.EDM: "edm"}
        return scalings(self.process, t, kinds[type(self.process)], self.sigma_data)

    def forward(self, x_t: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
        _, c_out, c_in = (c[:, None].to(x_t) for c in self.scalings(t))
        c_noise = self.process.c_noise(t)[:, None].to(x_t)
        F = self.network(torch.cat([c_in * x_t, c_noise, (4 * c_noise).sin(), (4 * c_noise).cos()], 1))
        return self.exact(x_t, t) + c_out * F


def generator_policy(process: Schedule | None = None, num_steps: int = 4, seed: int = 0) -> DenoisingPolicy:
    """A policy of few deterministic steps."""
    torch.manual_seed(seed)
    denoiser = ExactAndMore(diffrl.Flow() if process is None else process)
    return DenoisingPolicy(denoiser, diffrl.DDIM(), num_steps=num_steps, reduction="mean")


def samples_of(policy: DenoisingPolicy, n: int = 4000) -> Tensor:
    """Samples from fixed noise."""
    z = torch.randn(n, 2, generator=torch.Generator().manual_seed(1))
    x = z * policy.process.sigma(policy.grid[0])
    x = x.float()
    with torch.no_grad():
        for k in range(policy.num_steps):
            x = policy.law(x, torch.full((n,), k)).mean
    return x


def on_modes(x: Tensor) -> float:
    """Share of points within three standard deviations of a mode; 0.989 for the mixture itself."""
    return float((torch.cdist(x, MEANS).min(1).values < 3 * STD).float().mean())


def mode_one(x0: Tensor, cond: Any = None) -> list[float]:
    """The reward: 1 within three standard deviations of mode 1, else 0, as Python numbers."""
    distance = torch.cdist(x0, MEANS)
    return ((distance.argmin(1) == 1) & (distance.min(1).values < 3 * STD)).float().tolist()
