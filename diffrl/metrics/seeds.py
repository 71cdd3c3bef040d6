"""Summaries of a few seeds: interquartile mean, bootstrap intervals, probability of improvement.

Source of all three: Deep Reinforcement Learning at the Edge of the Statistical Precipice (Agarwal et al.,
2021), https://arxiv.org/abs/2108.13264. Scores are arrays [seeds] or [seeds, tasks].

For one task these are scipy's `trim_mean` and percentile `bootstrap`, and tests hold them equal. They stand here
because scipy does not resample each task on its own, and because runs are summarised without that extra, too.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike, NDArray

from diffrl.errors import InputError

__all__ = ["bootstrap_interval", "iqm", "probability_of_improvement"]


def iqm(x: ArrayLike, axis: int | None = None) -> NDArray[np.float64]:
    """Interquartile mean: the mean without the ⌊n/4⌋ smallest and the ⌊n/4⌋ largest values.

    Args:
        x: scores, any shape, n ≥ 1 along the axis.
        axis: axis to reduce; None takes all values together.

    Returns:
        Array without that axis (0-dimensional for None).

    Raises:
        ValueError: no values.

    >>> float(iqm([1.0, 2.0, 4.0, 100.0]))
    3.0
    """
    x = np.asarray(x, dtype=np.float64)
    x, axis = (x.ravel(), 0) if axis is None else (x, axis)
    n = x.shape[axis]
    if n == 0:
        raise InputError("iqm of no values")
    cut = n // 4
    kept = np.sort(x, axis=axis).take(range(cut, n - cut), axis=axis)
    return np.asarray(kept.mean(axis=axis))


def _by_task(scores: ArrayLike) -> NDArray[np.float64]:
    """Scores as [seeds, tasks], checked."""
    scores = np.asarray(scores, dtype=np.float64)
    scores = scores[:, None] if scores.ndim == 1 else scores
    if scores.ndim != 2 or scores.size == 0 or not np.isfinite(scores).all():
        raise InputError(f"scores must be finite, [seeds] or [seeds, tasks], not of shape {scores.shape}")
    return scores


def probability_of_improvement(x: ArrayLike, y: ArrayLike) -> float:
    """Probability that a run of x scores higher than one of y.

        mean over tasks, runs of x and runs of y of [x > y] + ½ [x = y]

    Give the arguments the other way round where lower is better (errors, distances).

    Args:
        x: scores [seeds] or [seeds, tasks].
        y: scores of the other, the same tasks; the number of seeds may differ.

    Raises:
        ValueError: other shapes, NaN or infinity.

    >>> probability_of_improvement([1.0, 3.0], [2.0, 3.0])
    0.375
    """
    x, y = _by_task(x), _by_task(y)
    if x.shape[1] != y.shape[1]:
        raise InputError(f"x has {x.shape[1]} tasks and y {y.shape[1]}; compare scores on the same tasks")
    above = x[:, None] > y[None]
    equal = x[:, None] == y[None]
    return float((above + 0.5 * equal).mean())


def bootstrap_interval(
    *scores: ArrayLike,
    statistic: Callable[..., ArrayLike] = iqm,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> tuple[float, float]:
    """Stratified percentile bootstrap interval of a statistic.

    Each resample draws seeds with replacement, for every task on its own; several arrays (such as the two of
    `probability_of_improvement`) are resampled independently of each other.

    Args:
        *scores: arrays [seeds] or [seeds, tasks], at least 2 seeds each.
        statistic: takes as many arrays [seeds, tasks] as are given, returns a number.
        level: coverage in (0, 1); with fewer than some 10 seeds the true coverage is lower.
        resamples: number of resamples.
        seed: of the resampling.

    Returns:
        Lower and upper end.

    Raises:
        ValueError: fewer than 2 seeds, other shapes, NaN or infinity, a level outside (0, 1).
    """
    arrays = [_by_task(s) for s in scores]
    if not arrays or min(a.shape[0] for a in arrays) < 2:
        raise InputError("a bootstrap interval needs scores of at least 2 seeds; run more")
    if not 0 < level < 1 or resamples < 1:
        raise InputError(f"level={level} must lie in (0, 1) and resamples={resamples} must be at least 1")
    rng = np.random.default_rng(seed)
    if statistic is iqm and len(arrays) == 1:  # the same resamples, all at once
        S, T = arrays[0].shape
        rows = rng.integers(S, size=(resamples, S, T))
        draws = iqm(np.take_along_axis(arrays[0][None], rows, axis=1).reshape(resamples, S * T), axis=1)
    else:
        draws = np.empty(resamples)
        for i in range(resamples):
            picked = [np.take_along_axis(a, rng.integers(a.shape[0], size=a.shape), axis=0) for a in arrays]
            draws[i] = float(np.asarray(statistic(*picked)))
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
