"""Schemes whose solution on N(0, 1) is not linear: the best linear function D = a x, at which E[gradient x] = 0."""

import math

import torch

from diffrl.diffusion.learned_variance import learned_log_variance
from diffrl.diffusion.schedules.edm import EDM
from docs.normal_levels import c_out, default, denoiser, root

__all__ = ["physics_residual", "scheduled_sampling", "shortdf"]


def scheduled_sampling(process: EDM, K: int) -> list[float]:
    """The mean of x0 x over that of x², of states that are rolled back by m levels with the last probabilities."""
    levels, a = process.time_grid(K)[:-1].tolist(), list[float]()
    probs = default("scheduled_sampling", "probs_end")
    for k in range(K):
        xx0 = xx = 0.0
        for m, p in enumerate((1 - sum(probs), *probs)):
            first = max(k - m, 0)
            cov, var = 1.0, 1 + levels[first] ** 2
            for j in range(first, k):
                cov, var = a[j] * cov, a[j] ** 2 * var + levels[j + 1] ** 2
            xx0, xx = xx0 + p * cov, xx + p * var
        a.append(xx0 / xx)
    return a


def physics_residual(process: EDM, K: int) -> list[float]:
    """Denoising and the residual of a circle, which data from N(0, 1) do not fulfil.

    -(1 - a v)/c_out² + c a v (3 a² v - 1)/β̃ = 0
    """
    c, grid, a = default("physics_residual", "residual_coef"), process.time_grid(K), []
    low = torch.full((K, 1), -1.0, dtype=torch.float64)
    beta = learned_log_variance(process, grid[:-1], grid[1:], low).exp().flatten().tolist()
    for s, β in zip(grid[:-1].tolist(), beta, strict=True):
        p, v = c_out(process, s) ** -2, 1 + s**2
        a.append(
            root(lambda a, p=p, v=v, q=c / β: -p * (1 - a * v) + q * a * v * (3 * a**2 * v - 1), 0.0, 2.0)
        )
    return a


def shortdf(process: EDM, K: int) -> list[float]:
    """Denoising and a hinge that draws D towards D' of a second look, with the force P(x0 beyond ½ (D + D') | x).

    -2 w (1 - a v) + c mean_j ± E[|x| Φ(k |x|)] = 0,    E[|x| Φ(k |x|)] = √(v/2π) (1 + k √v/√(1 + k² v))
    """
    levels, a = process.time_grid(K)[:-1].tolist(), [0.0] * K
    for i in reversed(range(K)):
        a[i] = _hinged(
            levels[i:], a[i + 1 :], default("shortdf", "relax_coef"), c_out(process, levels[i]) ** -2
        )
    return a


def _hinged(levels: list[float], later: list[float], c: float, w: float) -> float:
    s, v, d = levels[0], 1 + levels[0] ** 2, denoiser(levels[0])
    std = s / math.sqrt(v)  # of x0 given x_t

    def slope(a: float) -> float:
        force = 0.0  # a jump to clean data has none
        for r, b in zip(levels[1:], later, strict=True):
            again = b * (a + r * (1 - a) / s)  # D' = again x
            sign = math.copysign(1.0, a - again)
            k = sign * ((a + again) / 2 - d) / std
            force += sign * math.sqrt(v / (2 * math.pi)) * (1 + k * math.sqrt(v) / math.sqrt(1 + k**2 * v))
        return -2 * w * (1 - a * v) + c * force / len(levels)

    return root(slope, 0.0, 2.0)
