"""Dropout in a training step: drawn from the step's own generator, so that resuming is exact."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Generator, nn
from torch.nn.modules.dropout import _DropoutNd

__all__ = ["has_dropout", "seeded"]


def has_dropout(module: nn.Module) -> bool:
    """Whether a module draws random numbers as it is trained, as far as its layers tell."""
    return any(isinstance(layer, _DropoutNd) and layer.p > 0 for layer in module.modules())


@contextmanager
def seeded(generator: Generator, rank: int = 0) -> Iterator[None]:
    """Let layers that draw from PyTorch's global generator draw what follows in this one; the global one stays.

    Args:
        generator: on the device where the layers work.
        rank: of the process, where several share a batch: each draws for its own rows.
    """
    device = generator.device
    seed = int(torch.randint(2**62, (), generator=generator, device=device))
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed + rank)
        yield
