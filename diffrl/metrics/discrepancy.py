"""Maximum mean discrepancy, in memory that does not grow with the number of pairs."""

import math
from collections.abc import Iterator

import torch
from torch import Generator, Tensor

from diffrl.errors import InputError

__all__ = ["clouds", "mmd"]

NUMBERS = 2**22
"""How many distances are held at once."""


def clouds(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Two point clouds as float64 [n, D] and [m, D], checked.

    Raises:
        ValueError: shapes do not fit, NaN or infinity.
    """
    if x.ndim < 2 or y.ndim < 2 or x.shape[1:] != y.shape[1:] or len(x) == 0 or len(y) == 0:
        raise InputError(f"samples must be [n, *E] and [m, *E], not {tuple(x.shape)} and {tuple(y.shape)}")
    x, y = x.detach().flatten(1).double(), y.detach().flatten(1).double()
    for name, cloud in (("x", x), ("y", y)):
        bad = ~cloud.isfinite().all(1)
        if bool(bad.any()):
            raise InputError(
                f"sample {int(bad.nonzero()[0])} of {name} holds NaN or infinity: no distance exists"
            )
    return x, y.to(x.device)


def mmd(x: Tensor, y: Tensor) -> float:
    """Unbiased estimate of the squared maximum mean discrepancy; may be slightly negative.

        mean_{i≠j} k(x_i, x_j) + mean_{i≠j} k(y_i, y_j) - 2 mean_{i,j} k(x_i, y_j)
        k(x, y) = exp(-|x - y|²/(2 h²))

    h is the median distance between points of the two sets together. Memory grows with n + m; time with its square:
    32,000 points of 64 dims take a minute.

    Source: A Kernel Two-Sample Test (Gretton et al., 2012), eq. 3, https://jmlr.org/papers/v13/gretton12a.html.

    Args:
        x: [n, *E], n ≥ 2.
        y: [m, *E], m ≥ 2.

    Raises:
        ValueError: shapes do not fit, fewer than two samples, all points equal, NaN or infinity.
    """
    x, y = clouds(x, y)
    n, m = len(x), len(y)
    if n < 2 or m < 2:
        raise InputError(f"mmd needs at least 2 samples of each, not {n} and {m}")
    both = torch.cat([x, y])
    h = _median_distance(both)
    if h == 0:
        raise InputError(
            "mmd: more than half of the distances between points are 0, so there is no bandwidth"
        )
    k_xx = k_yy = k_xy = 0.0
    for first, distances in _pairs(both, n):
        k = torch.exp(-(distances**2) / (2 * h**2)).triu(1)
        if first < n:
            k_xx, k_xy = k_xx + float(k[:, : n - first].sum()), k_xy + float(k[:, n - first :].sum())
        else:
            k_yy += float(k.sum())
    return 2 * k_xx / (n * (n - 1)) + 2 * k_yy / (m * (m - 1)) - 2 * k_xy / (n * m)


def _pairs(z: Tensor, n: int) -> Iterator[tuple[int, Tensor]]:
    """Distances of some rows of z to themselves and all later ones: the first row's number, and [rows, N - first].

    Above the diagonal, each pair is met once. No block holds rows both before and after row n.
    """
    rows = max(1, NUMBERS // len(z))
    for low, high in ((0, n), (n, len(z))):
        for first in range(low, high, rows):
            yield first, _distances(z[first : min(first + rows, high)], z[first:])


def _distances(x: Tensor, y: Tensor) -> Tensor:
    return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")


def _median_distance(z: Tensor) -> float:
    """Median of the N(N-1)/2 distances: the few that may be it are found by a sample, then sorted."""
    N = len(z)
    pairs, width = N * (N - 1) // 2, 1.0
    lags = min(N - 1, 256, math.ceil((5 * pairs / NUMBERS) ** 2 / N))
    if pairs > NUMBERS:
        order = torch.randperm(N, generator=Generator().manual_seed(0)).to(z.device)
        sample = [
            _distances(z[order, None], z[order.roll(lag), None]).flatten() for lag in range(1, lags + 1)
        ]
        sampled, width = (
            torch.cat(sample).sort().values,
            2.5 / math.sqrt(lags * N),
        )  # 5 standard errors of a rank
    while True:
        low, high = 0.0, math.inf
        if width < 0.5:
            low, high = (float(sampled[int((0.5 + side) * (lags * N - 1))]) for side in (-width, width))
        if (found := _ranked(z, (pairs - 1) // 2, pairs // 2, low, high)) is not None:
            return sum(found) / 2
        width *= 2


def _ranked(z: Tensor, first: int, second: int, low: float, high: float) -> tuple[float, float] | None:
    """The distances of two ranks (from 0) if both lie in [low, high]; ties at its ends are counted and not held."""
    below = at_low = at_high = 0
    parts = []
    for _, block in _pairs(z, len(z)):
        d = block[torch.ones_like(block, dtype=torch.bool).triu(1)]
        below += int((d < low).sum())
        at_low += int((d == low).sum())
        at_high += int((d == high).sum()) if high > low else 0
        parts.append(d[(d > low) & (d < high)])
    inside = torch.cat(parts).sort().values
    if first < below or second >= below + at_low + len(inside) + at_high:
        return None

    def at(rank: int) -> float:
        i = rank - below - at_low
        return low if i < 0 else float(inside[i]) if i < len(inside) else high

    return at(first), at(second)
