"""Maps of data from N(0, 1) that are learnt, but for an error of their own: the number a of D(x, t, r) = a x_t/α_t."""

import math
from functools import cache

import torch

from diffrl.diffusion.schedules.edm import EDM
from diffrl.diffusion.schedules.flow import Flow
from diffrl.objectives.maps.inductive_moments import GAP, MomentGroups
from docs.normal_levels import SIGMA_DATA, default, denoiser, root

__all__ = ["inductive_moments", "progressive", "shortcut"]


def shortcut(s: float, K: int = 0, *, r: float = 0.0, top: float | None = None) -> float:
    """A jump from s to r is halved down to steps of Euler's, of which there are M from σ_max = top (None: s) to 0."""
    finest = _flow_time(s if top is None else top) / default("shortcut", "finest")
    first, last = (round(_flow_time(level) / finest) for level in (r, s))
    levels = [f / (1 - f) for f in (finest * k for k in range(first, last + 1))]
    steps = zip(levels[:-1], levels[1:], strict=True)
    scale = math.prod(1 - (t - u) / t * (1 - denoiser(t)) for u, t in steps)
    return (scale - r / s) / (1 - r / s)


def progressive(process: Flow, K: int, *, start: int) -> list[float]:
    """A student of K steps, each of which takes start/K steps of DDIM by the exact denoiser at once."""
    ratios = (process.sigma(t) / process.alpha(t) for t in process.time_grid(start))
    levels, n, a = [float(ratio) for ratio in ratios], start // K, []
    for i in range(0, start, n):
        scale = 1.0  # of x/α
        for t, r in zip(levels[i : i + n], levels[i + 1 : i + n + 1], strict=True):
            scale *= r / t + (1 - r / t) * denoiser(t) if math.isfinite(t) else 0.0
        ratio = levels[i + n] / levels[i]
        a.append((scale - ratio) / (1 - ratio))
    return a


@cache
def inductive_moments(s: float, K: int = 0) -> float:
    """IMM at r = 0: the least MMD² of X = a x_t and Y = a' x_s in groups of M, E exp(-w |z|) = h(q²), z ~ N(0, q²).

    (M-1) (h(2 a² v) - 2 h(a² v + a'² v')) - 2 h(a² v + a'² v' - 2 a a' C),    h(q²) = exp(y²) erfc(y), y = w q/√2
    """
    options = {key: default("inductive_moments", key) for key in ("group_size", "least", "most", "halvings")}
    groups = MomentGroups(EDM(), _Unit(), **options)  # type: ignore[arg-type]
    s_next = max(s - groups.gap, 0.0)
    b = inductive_moments(s_next) if s_next > 0 else 1.0
    M, v, v_next, C = groups.group_size, 1 + s**2, 1 + s_next**2, 1 + s * s_next
    w = 1 / (_flow_time(s) + GAP)

    def slope(q2: float, dq2: float) -> float:
        """dh(q²)/da by dq²/da."""
        y = w * math.sqrt(q2 / 2)
        h = float(torch.special.erfcx(torch.tensor(y, dtype=torch.float64)))
        return (2 * y * h - 2 / math.sqrt(math.pi)) * w**2 / (4 * y) * dq2

    def of_loss(a: float) -> float:
        other, d = a**2 * v + b**2 * v_next, 2 * a * v
        groupwise = slope(2 * a**2 * v, 2 * d) - 2 * slope(other, d)
        return (M - 1) * groupwise - 2 * slope(other - 2 * a * b * C, d - 2 * b * C)

    return root(of_loss, 1e-6, 2.0)


def _flow_time(s: float) -> float:
    return s / (1 + s)


class _Unit:
    """What `MomentGroups` asks of a denoiser."""

    sigma_data = SIGMA_DATA
