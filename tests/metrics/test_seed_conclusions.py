"""Conclusions from few seeds: counted by plain loops, and against closed forms for normal scores."""

import math
from itertools import combinations, product
from typing import Any

import numpy as np
import pytest
from scipy import stats

from diffrl.metrics.seeds import bootstrap_interval, conclusions, seeds_needed

RNG = np.random.default_rng(0)
A, B = RNG.normal(0.4, 1.0, 5), RNG.normal(0.0, 0.7, 4)


def normal_scores(mean: float, n: int = 400) -> np.ndarray:
    """The quantiles of a normal law: a sample without the luck of one, in random order."""
    return RNG.permutation(mean + stats.norm.ppf((np.arange(n) + 0.5) / n))


def shares(verdicts: list[int]) -> tuple[float, float, float]:
    v = np.array(verdicts)
    return float((v > 0).mean()), float((v < 0).mean()), float((v == 0).mean())


# Counting


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_means_are_those_of_every_choice_of_seeds(n: int) -> None:
    verdicts = [int(np.sign(sum(x) - sum(y))) for x, y in product(combinations(A, n), combinations(B, n))]
    assert conclusions(A, B, n) == pytest.approx(shares(verdicts))


@pytest.mark.parametrize("n", [2, 3, 4])
@pytest.mark.parametrize("level", [0.5, 0.8, 0.95])
def test_welchs_intervals_are_scipys(n: int, level: float) -> None:
    verdicts = []
    for x, y in product(combinations(A, n), combinations(B, n)):
        ends = stats.ttest_ind(x, y, equal_var=False).confidence_interval(level)
        verdicts.append(int(ends.low > 0) - int(ends.high < 0))
    assert conclusions(A, B, n, rule="welch", level=level) == pytest.approx(shares(verdicts))


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_pairs_are_the_same_seeds_of_both(n: int) -> None:
    other = A + RNG.normal(-0.2, 0.3, 5)
    chosen = [list(rows) for rows in combinations(range(5), n)]
    by_mean = [int(np.sign((A - other)[rows].mean())) for rows in chosen]
    assert conclusions(A, other, n, paired=True) == pytest.approx(shares(by_mean))
    if n > 1:
        ends = [stats.ttest_rel(A[rows], other[rows]).confidence_interval(0.8) for rows in chosen]
        expected = shares([int(e.low > 0) - int(e.high < 0) for e in ends])
        found = conclusions(A, other, n, paired=True, rule="welch", level=0.8)
        assert found == pytest.approx(expected)


@pytest.mark.parametrize("shift", [-2.0, 0.0, 0.45, 0.7, 3.0])
def test_all_seeds_give_one_verdict_and_the_bootstrap_is_that_of_the_interval(shift: float) -> None:
    x, y = RNG.normal(shift, 1, 30), RNG.normal(0, 1, 30)
    low, high = bootstrap_interval(x, y, statistic=lambda a, b: a.mean() - b.mean(), resamples=20_000)
    assert min(abs(low), abs(high)) > 0.01  # else chance may decide
    found = conclusions(x, y, 30, rule="bootstrap", resamples=20_000)
    assert found == (float(low > 0), float(high < 0), float(low <= 0 <= high))


def test_three_seeds_are_resampled_in_27_ways() -> None:
    x, y = np.array([1.0, 2.0, 6.0]), np.array([0.0, 0.9, 1.5])
    means = [np.mean(draw) for draw in product(x, repeat=3)], [np.mean(draw) for draw in product(y, repeat=3)]
    differences = np.subtract.outer(*means).ravel()  # all 729, each as likely
    for level in (0.5, 0.9, 0.95, 0.999):
        low = np.quantile(differences, (1 - level) / 2)
        assert abs(low) > 0.02
        found = conclusions(x, y, 3, rule="bootstrap", level=level, resamples=20_000)
        assert found.a == float(low > 0)


def test_more_choices_than_comparisons_are_drawn_at_random() -> None:
    x, y = RNG.normal(0.3, 1, 12), RNG.normal(0, 1, 12)
    for rule, paired in product(("mean", "welch"), (False, True)):
        options: dict[str, Any] = {"rule": rule, "paired": paired}
        every = conclusions(x, y, 3, comparisons=100_000, **options)
        some = conclusions(x, y, 3, comparisons=200 if paired else 40_000, **options)
        assert some == pytest.approx(every, abs=0.12 if paired else 0.012)
        assert conclusions(x, y, 3, **options) == conclusions(x, y, 3, **options)


# Closed forms


@pytest.mark.parametrize("n", [1, 3, 8])
def test_the_higher_mean_of_normal_scores_is_right_as_often_as_the_normal_law_says(n: int) -> None:
    found = conclusions(normal_scores(0.5), normal_scores(0.0), n, comparisons=20_000)
    assert found.a == pytest.approx(stats.norm.cdf(0.5 * math.sqrt(n / 2)), abs=0.01)
    assert found.undecided == 0


@pytest.mark.parametrize("n", [3, 8])
@pytest.mark.parametrize("delta", [0.0, 1.5])
def test_pairs_of_normal_scores_have_the_power_of_the_t_test(n: int, delta: float) -> None:
    x = normal_scores(delta)
    found = conclusions(x, np.zeros(400), n, rule="welch", paired=True, comparisons=20_000)
    t, shift = stats.t.ppf(0.975, n - 1), delta * math.sqrt(n)
    assert found.a == pytest.approx(stats.nct.sf(t, n - 1, shift) if delta else 0.025, abs=0.01)
    assert found.b == pytest.approx(stats.nct.cdf(-t, n - 1, shift) if delta else 0.025, abs=0.01)


def test_the_bootstrap_of_three_seeds_claims_too_much_and_welch_does_not() -> None:
    x, y = normal_scores(0.0), normal_scores(0.0)
    claims = {rule: 1 - conclusions(x, y, 3, rule=rule).undecided for rule in ("mean", "bootstrap", "welch")}
    assert claims["mean"] == 1
    assert claims["bootstrap"] > 0.12
    assert claims["welch"] < 0.06


@pytest.mark.parametrize("level", [None, 0.95])
def test_with_the_seeds_that_are_needed_nine_of_ten_are_right(level: float | None) -> None:
    x, y = normal_scores(0.8, 2000), normal_scores(0.0, 2000)
    n = seeds_needed(x, y, level=level)
    z = 1.2816 + (0 if level is None else 1.96)
    assert n == pytest.approx(z**2 * 2 / 0.8**2, rel=1e-2)
    found = conclusions(x, y, math.ceil(n), rule="mean" if level is None else "welch", comparisons=4000)
    assert found.a == pytest.approx(0.9, abs=0.025)
    assert seeds_needed(y, x, level=level) == n


# Ends


@pytest.mark.parametrize("rule", ["mean", "bootstrap", "welch"])
@pytest.mark.parametrize("paired", [False, True])
def test_equal_scores_are_undecided_and_scores_apart_are_not(rule: Any, paired: bool) -> None:
    same = np.full(4, 0.7)
    for n in (2, 4):
        assert conclusions(same, same, n, rule=rule, paired=paired) == (0, 0, 1)
        assert conclusions(same + 0.1, same, n, rule=rule, paired=paired) == (1, 0, 0)
        assert conclusions(same, same + 0.1, n, rule=rule, paired=paired) == (0, 1, 0)
    assert seeds_needed(same, same) == math.inf
    assert seeds_needed(same, same + 0.1) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n": 0}, "n is 0"),
        ({"n": 5}, "n is 5"),
        ({"n": 1, "rule": "welch"}, "n is 1"),
        ({"n": 1, "rule": "bootstrap"}, "n is 1"),
        ({"n": 2, "rule": "t"}, "give 'mean', 'bootstrap' or 'welch'"),
        ({"n": 2, "level": 1.0}, "level"),
        ({"n": 2, "comparisons": 0}, "comparisons"),
        ({"n": 2, "resamples": 0}, "resamples"),
        ({"n": 2, "paired": True}, "a has 5 seeds and b 4"),
    ],
)
def test_what_cannot_be_is_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        conclusions(A, B, **options)


def test_scores_that_cannot_be_compared_are_named() -> None:
    with pytest.raises(ValueError, match="finite"):
        conclusions([1.0, math.nan], [1.0, 2.0], 1)
    with pytest.raises(ValueError, match="2 tasks"):
        conclusions(np.zeros((3, 2)), np.zeros((3, 2)), 1)
    with pytest.raises(ValueError, match="at least 2 scores"):
        seeds_needed([1.0], [1.0, 2.0])
    with pytest.raises(ValueError, match="right"):
        seeds_needed(A, B, right=0.5)
