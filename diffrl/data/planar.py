"""Points of 2-D sets that have no simple density: checkerboard, moons, spirals."""

import math

import torch
from torch import Generator, Tensor

__all__ = ["draw_checkerboard", "draw_moons", "draw_spirals"]


def draw_checkerboard(n: int, generator: Generator | None, *, cells: int) -> Tensor:
    """Uniform on the dark cells of a cells × cells board that fills [-1, 1]²: float32 [n, 2]."""
    dark = torch.tensor([(i, j) for i in range(cells) for j in range(cells) if (i + j) % 2 == 0])
    corner = dark[torch.randint(len(dark), (n,), generator=generator)]
    return (corner + torch.rand(n, 2, generator=generator)) * (2 / cells) - 1


def draw_moons(n: int, generator: Generator | None, *, noise: float) -> Tensor:
    """Two interleaved half circles, centred, spanning [-1, 1] across, plus Gaussian noise: float32 [n, 2]."""
    theta = math.pi * torch.rand(n, generator=generator)
    lower = torch.rand(n, generator=generator) < 0.5
    # upper: (cos θ, sin θ); lower: the same turned about (½, ¼), the centre of both
    moon = torch.stack([theta.cos() - 0.5, theta.sin() - 0.25], 1) / 1.5
    moon = torch.where(lower[:, None], -moon, moon)
    return moon + noise * torch.randn(n, 2, generator=generator)


def draw_spirals(n: int, generator: Generator | None, *, arms: int, turns: float, noise: float) -> Tensor:
    """Archimedean spirals θ = 2π (turns·r + arm/arms), r = √U(0, 1), plus Gaussian noise: float32 [n, 2]."""
    r = torch.rand(n, generator=generator).sqrt()
    arm = torch.randint(arms, (n,), generator=generator)
    theta = 2 * math.pi * (turns * r + arm / arms)
    curve = r[:, None] * torch.stack([theta.cos(), theta.sin()], 1)
    return curve + noise * torch.randn(n, 2, generator=generator)
