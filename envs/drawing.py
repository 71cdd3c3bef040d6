"""Pictures of chains as arrays of pixels, drawn by numpy alone."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["Picture", "boxes"]

SIDE = 256  # pixels of a picture, at least
MARGIN = 1.1  # of the box that is shown, to that of the latents
POINTS = 2000  # of the data in a scatter
PAPER, DATA, PATH, LATENT = (255, 255, 255), (205, 205, 205), (150, 180, 220), (0, 90, 180)
Pixels = NDArray[np.uint8]
Points = NDArray[Any]


def boxes(alpha: Tensor, sigma: Tensor, s: float) -> Tensor:
    """The half-widths of boxes around the latents of each level, b = s α + 4 σ, s the largest number of the data.

    They are rounded up to powers of two, by which numbers multiply and divide without rounding.
    """
    return torch.exp2(torch.log2(s * alpha + 4 * sigma).sub(1e-9).ceil())


class Picture:
    """Draws the latents of n chains: an image as it is, anything else as a scatter of its first two numbers.

    Everything is shown in units of b_i, the box of the level that the chain is at. In a scatter the data are grey and
    shrink towards the middle where noise is large; a line shows the way that the chain came. One number is drawn over
    the position in the chain.

    Args:
        data: points of the data, shape [M, *E].
        alpha, sigma: α_i and σ_i of each position, shape [K+1].
        s: the largest number of the data.
        n: how many chains.
    """

    def __init__(self, data: Tensor, alpha: Tensor, sigma: Tensor, s: float, n: int) -> None:
        self.data, self.alpha, self.boxes = data[:POINTS].cpu(), alpha.cpu(), boxes(alpha, sigma, s).cpu()
        self.path = torch.zeros(len(alpha), n, *data.shape[1:], dtype=data.dtype)
        self.first = torch.zeros(n, dtype=torch.int64)
        self.index = torch.zeros(n, dtype=torch.int64)

    def start(self, index: Tensor, x: Tensor, mask: NDArray[np.bool_]) -> None:
        """The chains of the mask begin here: positions [n], latents [n, *E]."""
        self.follow(index, x)
        self.first = torch.where(torch.from_numpy(mask), self.index, self.first)

    def follow(self, index: Tensor, x: Tensor) -> None:
        """All chains are here now."""
        self.index = index.cpu()
        self.path[self.index, torch.arange(len(self.index))] = x.cpu().to(self.path)

    def frames(self) -> tuple[Pixels, ...]:
        """One picture of each chain, [H, W, 3]."""
        draw = self._image if self.data.ndim == 4 else self._scatter
        return tuple(draw(row) for row in range(len(self.index)))

    def _image(self, row: int) -> Pixels:
        at = int(self.index[row])
        x = (self.path[at, row] / self.boxes[at]).clamp(-1, 1)
        x = x if len(x) == 3 else x[:1].expand(3, *x.shape[1:])
        pixels = ((x + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).numpy()
        factor = -(-SIDE // max(pixels.shape[:2]))
        return pixels.repeat(factor, 0).repeat(factor, 1)

    def _scatter(self, row: int) -> Pixels:
        at, first = int(self.index[row]), int(self.first[row])
        way = self.path[first : at + 1, row] / self.boxes[first : at + 1, None]
        canvas = np.full((SIDE, SIDE, 3), PAPER, np.uint8)
        _dot(canvas, self._plane(self.alpha[at] * self.data / self.boxes[at], at), DATA, 1)
        seen = np.concatenate([self._plane(x[None], first + k) for k, x in enumerate(way)])
        steps = np.linspace(0, 1, SIDE)[:, None, None]
        _dot(canvas, (seen[:-1] + steps * np.diff(seen, axis=0)).reshape(-1, 2), PATH, 1)
        _dot(canvas, seen[:-1], PATH, 3)
        _dot(canvas, seen[-1:], LATENT, 5)
        return canvas

    def _plane(self, x: Tensor, at: int) -> Points:
        """Where the numbers [M, D] are drawn, [M, 2]."""
        if x.shape[1] == 1:
            x = torch.cat([torch.full_like(x, 2 * at / (len(self.alpha) - 1) - 1), x], 1)
        return x[:, :2].double().numpy()


def _dot(canvas: Pixels, points: Points, colour: tuple[int, int, int], radius: int) -> None:
    """Draw discs at the points [M, 2] of the plane, ±1 being the box of the latents."""
    side = len(canvas)
    column, row = (
        ((points * [1, -1] / MARGIN + 1) / 2 * (side - 1)).clip(-side, 2 * side).round().astype(int).T
    )
    for i in range(-radius, radius + 1):
        for j in range(-radius, radius + 1):
            inside = (abs(row + i - side / 2) < side / 2) & (abs(column + j - side / 2) < side / 2)
            if i * i + j * j <= radius * radius:
                canvas[(row + i)[inside], (column + j)[inside]] = colour
