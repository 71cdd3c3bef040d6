"""Summaries of a few seeds, and what may be concluded from so few.

Interquartile mean, bootstrap intervals, probability of improvement; the conclusions that some of the seeds would
have led to, and how many seeds a difference needs.

Source of the first three: Deep Reinforcement Learning at the Edge of the Statistical Precipice (Agarwal et al.,
2021), https://arxiv.org/abs/2108.13264. Scores are arrays [seeds] or [seeds, tasks].

For one task these are scipy's `trim_mean` and percentile `bootstrap`, and tests hold them equal. They stand here
because scipy does not resample each task on its own, and because runs are summarised without that extra, too.
"""

import math
from collections.abc import Callable
from itertools import combinations
from statistics import NormalDist
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from diffrl.errors import InputError
from diffrl.extras import require
from diffrl.ranges import require_int, require_number

__all__ = [
    "Conclusions",
    "bootstrap_interval",
    "conclusions",
    "iqm",
    "probability_of_improvement",
    "seeds_needed",
]


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


class Conclusions(NamedTuple):
    """Shares, with sum 1, of the comparisons that concluded so."""

    a: float
    """a scores higher."""
    b: float
    """b scores higher."""
    undecided: float
    """Neither: the means are equal, or the interval of their difference holds 0."""


def conclusions(
    a: ArrayLike,
    b: ArrayLike,
    n: int,
    *,
    rule: Literal["mean", "bootstrap", "welch"] = "mean",
    paired: bool = False,
    level: float = 0.95,
    comparisons: int = 10_000,
    resamples: int = 1000,
    seed: int = 0,
) -> Conclusions:
    """What comparisons of two methods with n seeds each would have concluded, out of the more that were run.

        "mean":       the sign of Δ = mean a - mean b
        "bootstrap":  the percentile bootstrap interval of Δ, if it leaves 0 out
        "welch":      the same of Δ ± t √(s_a²/n + s_b²/n), with Welch's degrees of freedom

    A comparison takes n of the seeds of each, without repetition: every choice, where there are no more than
    `comparisons` of them, else so many at random. Where n is all seeds it is one: the verdict of them all. With n
    near that number comparisons share seeds, and are surer than those of fresh seeds would be.

    Args:
        a: scores of one method, [S_a].
        b: scores of the other, [S_b].
        n: seeds of each, from 1 to the smaller of the numbers; intervals need 2.
        rule: how one concludes; "welch" needs the extra `eval`.
        paired: whether both take the same seeds, so that the scores are compared one by one: a and b are then in
            one order.
        level: coverage of the intervals, in (0, 1).
        comparisons: the most that are made.
        resamples: of each bootstrap.
        seed: of choices and resamples.

    Raises:
        ValueError: scores that are not finite or not [S], or another argument outside its range.
        MissingExtra: "welch" without scipy.

    >>> conclusions([3.0, 1.0], [2.0, 0.0], 1)
    Conclusions(a=0.75, b=0.25, undecided=0.0)
    >>> conclusions([3.0, 1.0], [2.0, 0.0], 1, paired=True)
    Conclusions(a=1.0, b=0.0, undecided=0.0)
    """
    if rule not in ("mean", "bootstrap", "welch"):
        raise InputError(f"rule is {rule!r}: give 'mean', 'bootstrap' or 'welch'")
    a, b = _of_one_task(a), _of_one_task(b)
    if paired and len(a) != len(b):
        raise InputError(f"a has {len(a)} seeds and b {len(b)}: scores that are paired are of the same seeds")
    require_int("n", n, 1 if rule == "mean" else 2, min(len(a), len(b)))
    require_number("level", level, 0, 1, "()")
    for name, number in (("comparisons", comparisons), ("resamples", resamples)):
        require_int(name, number)
    rng = np.random.default_rng(seed)
    if paired:  # differences against nothing
        a, b = a - b, np.zeros_like(b)
    in_a, in_b = _choices(len(a), len(b), n, paired, comparisons, rng)
    found = np.zeros(2)
    for part in np.array_split(np.arange(len(in_a)), -(-len(in_a) // 1000)):  # a bound on memory
        low, high = _ends(a[in_a[part]], b[in_b[part]], rule, level, resamples, rng)
        nothing = 1e-12 * max(np.abs(a).max(), np.abs(b).max())  # of rounding
        found += [(low > nothing).sum(), (high < -nothing).sum()]
    up, down = (int(count) for count in found)
    return Conclusions(up / len(in_a), down / len(in_a), (len(in_a) - up - down) / len(in_a))


def _of_one_task(scores: ArrayLike) -> NDArray[np.float64]:
    """Scores as [seeds], checked."""
    scores = _by_task(scores)
    if scores.shape[1] != 1:
        raise InputError(f"scores are of {scores.shape[1]} tasks: compare methods on one task at a time")
    return scores[:, 0]


def _choices(
    S_a: int, S_b: int, n: int, paired: bool, most: int, rng: np.random.Generator
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Which seeds of each are compared, [comparisons, n] both."""
    if math.comb(S_a, n) * (1 if paired else math.comb(S_b, n)) <= most:
        of_a, of_b = (np.array(list(combinations(range(S), n))) for S in (S_a, S_b))
        if paired:
            return of_a, of_a
        return of_a.repeat(len(of_b), axis=0), np.tile(of_b, (len(of_a), 1))
    of_a, of_b = (rng.random((most, S)).argsort(1)[:, :n] for S in (S_a, S_b))
    return of_a, of_a if paired else of_b


def _ends(
    A: NDArray[np.float64],
    B: NDArray[np.float64],
    rule: str,
    level: float,
    resamples: int,
    rng: np.random.Generator,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Lower and upper ends for the difference of the means of A and B, comparisons [X, n] both."""
    n = A.shape[1]
    difference = A.mean(1) - B.mean(1)
    if rule == "mean":
        return difference, difference
    if rule == "welch":
        v_a, v_b = A.var(1, ddof=1) / n, B.var(1, ddof=1) / n
        v = np.maximum(v_a + v_b, np.finfo(float).tiny)
        freedom = np.maximum((n - 1) * v**2 / np.maximum(v_a**2 + v_b**2, np.finfo(float).tiny), n - 1)
        half = require("scipy.stats", "eval").t.ppf((1 + level) / 2, freedom) * np.sqrt(v)
        return difference - half, difference + half
    drawn = rng.multinomial(n, np.full(n, 1 / n), size=(2, resamples))  # how often each seed was drawn
    draws = (drawn[0] @ A.T - drawn[1] @ B.T) / n
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return low, high


def seeds_needed(a: ArrayLike, b: ArrayLike, *, right: float = 0.9, level: float | None = 0.95) -> float:
    """Seeds of each method with which a share `right` of comparisons finds the better one, for normal scores.

        n = (z_{(1+level)/2} + z_right)² (s_a² + s_b²)/Δ²

    Unpaired seeds. Means and variances of the given scores stand for the true ones; an interval whose variances are
    estimated, as Welch's are, takes about one seed more.

    Args:
        a: scores of one method, [S_a], at least 2.
        b: scores of the other.
        right: share of comparisons that shall be right, in (0.5, 1).
        level: of the interval that must leave 0 out; None: the higher mean is enough, n = z_right² (s_a² + s_b²)/Δ².

    Returns:
        n, not rounded; infinity where the means are equal.

    Raises:
        ValueError: fewer than 2 scores, or an argument outside its range.
    """
    a, b = _of_one_task(a), _of_one_task(b)
    if min(len(a), len(b)) < 2:
        raise InputError("the number of seeds needed is told from at least 2 scores of each; run more")
    require_number("right", right, 0.5, 1, "()")
    if level is not None:
        require_number("level", level, 0, 1, "()")
    z = NormalDist().inv_cdf
    reach = z(right) + (0.0 if level is None else z((1 + level) / 2))
    delta, variance = a.mean() - b.mean(), a.var(ddof=1) + b.var(ddof=1)
    return math.inf if delta == 0 else float(reach**2 * variance / delta**2)
