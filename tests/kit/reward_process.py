"""Reward processes to try: their data, and names that both frameworks know them by."""

import torch
from torch import Tensor

from diffrl.data.dataset import Data
from tests.kit.oracles import randn

ID = "DiffusionMRP-v0"


class Given:
    """A source of noise that hands out the rows of [B, K, *E], then numbers that must have no effect."""

    def __init__(self, noise: Tensor) -> None:
        self.noise, self.calls = noise, 0

    def __call__(self, x: Tensor) -> Tensor:
        k, self.calls = self.calls, self.calls + 1
        return self.noise[:, k].to(x).view(x.shape) if k < self.noise.shape[1] else torch.full_like(x, 1e3)


def labelled(event: tuple[int, ...] = (2,)) -> Data:
    labels = torch.arange(50) % 3
    x = randn(50, *event, dtype=torch.float32)
    return Data("labelled", x, labels, x, labels, num_classes=3)
