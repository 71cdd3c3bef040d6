"""Small networks and denoisers, the same numbers each time."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from diffrl.diffusion.denoisers import Denoiser
from diffrl.diffusion.networks.mlp import MLP
from diffrl.diffusion.schedules.base import Schedule


class Net(nn.Module):
    """A small network of flattened events, with labels 0..2 where it is told one."""

    def __init__(self, event_shape: tuple[int, ...] = (2,), dropout: float = 0.0) -> None:
        super().__init__()
        D = math.prod(event_shape)
        self.first, self.last = nn.Linear(D + 1, 16), nn.Linear(16, D)
        self.labels, self.dropout = nn.Embedding(3, 16), nn.Dropout(dropout)
        self.register_buffer("shift", torch.zeros(D))

    def forward(self, x: Tensor, c_noise: Tensor, cond: Tensor | None = None) -> Tensor:
        h = self.first(torch.cat([x.flatten(1), c_noise[:, None]], 1))
        if cond is not None:
            h = h + self.labels(cond)
        return (self.last(self.dropout(h).tanh()) + self.shift).view_as(x)


def small_denoiser(process: Schedule, D: int = 2, seed: int = 0, **options: Any) -> Denoiser:
    """A fresh network of D numbers, in float64."""
    torch.manual_seed(seed)
    return Denoiser(
        MLP((D,), hidden=16, depth=1, x_features=8, noise_features=8).double(), process, **options
    )


def random_denoiser(process: Schedule, *event: int, num_classes: int = 0, seed: int = 0) -> Denoiser:
    """A denoiser whose output layer is not zero."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        mlp = MLP(event, hidden=32, depth=2, num_classes=num_classes)
        for parameter in mlp.parameters():
            nn.init.normal_(parameter, std=0.2)
    return Denoiser(mlp, process)
