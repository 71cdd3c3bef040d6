"""A network in one file: any module of (x, c_noise, cond), made by a function of what it is built for."""

import torch
from torch import Tensor, nn

from diffrl.diffusion.networks.registry import NETWORKS


class Mixed(nn.Module):
    """Pixels and noise level in one layer, as any module of yours might have it."""

    def __init__(self, dims: int, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(dims + 1, width), nn.SiLU(), nn.Linear(width, dims))

    def forward(self, x: Tensor, c_noise: Tensor, cond: Tensor | None = None) -> Tensor:
        return self.layers(torch.cat([x.flatten(1), c_noise[:, None]], 1)).view_as(x)


@NETWORKS.register("toy_network")
def toy_network(event_shape: tuple[int, ...], num_classes: int = 0, width: int = 8) -> nn.Module:
    """A module of mine.

    Args:
        event_shape: *E.
        num_classes: number of labels, which it does not look at.
        width: of its inner layer.
    """
    return Mixed(torch.Size(event_shape).numel(), width)
