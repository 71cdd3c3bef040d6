"""Distances between two sets of points that need no features: exact and sliced Wasserstein, and Fréchet's."""

import math

import torch
from torch import Tensor

from diffrl.errors import InputError
from diffrl.extras import require
from diffrl.metrics.discrepancy import NUMBERS, clouds
from diffrl.metrics.reference_statistics import Statistics, frechet

__all__ = ["frechet_distance", "sliced_w2", "w2"]


def w2(x: Tensor, y: Tensor) -> float:
    """Exact 2-Wasserstein distance of two point clouds: √(min over couplings of E|x - y|²).

    2,000 points take seconds; the time grows faster than n m, and memory is 42 bytes for each of the n m pairs. For few
    points in many dims the distance says little.

    Args:
        x: [n, *E].
        y: [m, *E].

    Raises:
        ValueError: shapes do not fit, NaN or infinity.
        MissingExtra: POT is not installed.
    """
    x, y = clouds(x, y)
    ot = require("ot", "eval")
    cost = torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist").square_().cpu().numpy()
    squared, log = ot.emd2([], [], cost, numItermax=10_000_000, log=True)
    if log["warning"] is not None:
        raise InputError(
            f"w2: optimal transport did not converge ({str(log['warning']).splitlines()[0]}): give fewer samples, or "
            "take sliced_w2"
        )
    return math.sqrt(max(float(squared), 0.0))


def sliced_w2(x: Tensor, y: Tensor, *, projections: int = 500, seed: int = 0) -> float:
    """Sliced 2-Wasserstein distance: √(mean over directions θ of W2²(θ·x, θ·y)), θ uniform on the sphere.

    In 1-D, W2² is the integral over q of the squared difference of the quantile functions.

    Source: Sliced and Radon Wasserstein Barycenters of Measures (Bonneel et al., 2015),
    https://doi.org/10.1007/s10851-014-0506-3 (with the mean over directions).

    Args:
        x: [n, *E].
        y: [m, *E].
        projections: number of directions.
        seed: seed of the directions; distances with different seeds cannot be compared.

    Raises:
        ValueError: shapes do not fit, NaN or infinity.
    """
    x, y = clouds(x, y)
    n, m = len(x), len(y)
    g = torch.Generator().manual_seed(seed)
    theta = torch.randn(x.shape[1], projections, dtype=torch.float64, generator=g)
    theta = (theta / theta.norm(dim=0)).to(x.device)
    # both quantile functions are constant between neighbouring multiples of 1/n and 1/m; unit: 1/(n m)
    steps = torch.cat([torch.arange(n + 1) * m, torch.arange(m + 1) * n]).unique()
    left, width = steps[:-1].to(x.device), (steps.diff().double() / (n * m)).to(x.device)
    squares = []
    for part in theta.split(max(1, NUMBERS // len(left)), dim=1):
        u, v = (x @ part).sort(0).values[left // m], (y @ part).sort(0).values[left // n]
        squares.append((width[:, None] * (u - v) ** 2).sum(0))
    return math.sqrt(float(torch.cat(squares).mean()))


def frechet_distance(fx: Tensor, fy: Tensor) -> float:
    """Squared Fréchet distance of Gaussians fitted to two sets of features (FID's formula).

        |m_x - m_y|² + tr(C_x + C_y - 2 (C_x C_y)^{1/2})

    With C_x = UᵀU and C_y = VᵀV the last trace is the sum of the singular values of U Vᵀ. This needs no root of a
    matrix that may be singular, so that there may be fewer samples than dims.

    Source: GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash Equilibrium (Heusel et al.,
    2017), eq. 6, https://arxiv.org/abs/1706.08500.

    Args:
        fx: features [n, F], n ≥ 2.
        fy: features [m, F], m ≥ 2.

    Raises:
        ValueError: shapes do not fit, fewer than two samples, NaN or infinity.
    """
    fx, fy = clouds(fx, fy)
    if len(fx) < 2 or len(fy) < 2:
        raise InputError(f"a covariance needs at least 2 samples, not {len(fx)} and {len(fy)}")
    return frechet(Statistics.of(fx), Statistics.of(fy))
