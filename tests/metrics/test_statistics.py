"""Statistics over seeds against scipy, plain loops and known coverage."""

import numpy as np
import pytest
from scipy import stats

from diffrl.metrics.seeds import bootstrap_interval, iqm, probability_of_improvement

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 7, 8, 30])
@pytest.mark.parametrize("axis", [None, 0, 1, -1])
def test_iqm_is_scipys_trimmed_mean(n: int, axis: int | None) -> None:
    x = RNG.standard_normal((n, 6))
    np.testing.assert_allclose(iqm(x, axis), stats.trim_mean(x, 0.25, axis=axis), rtol=1e-12)


def test_iqm_ignores_a_quarter_at_each_end() -> None:
    assert float(iqm([1.0, 2.0, 4.0, 100.0])) == 3.0
    assert float(iqm([-1e9, 5.0, 5.0, 1e9])) == 5.0
    with pytest.raises(ValueError, match="no values"):
        iqm([])


def test_probability_of_improvement_is_the_share_of_pairs() -> None:
    x, y = RNG.integers(0, 5, (4, 3)), RNG.integers(0, 5, (6, 3))
    total = 0.0
    for task in range(3):
        for a in x[:, task]:
            for b in y[:, task]:
                total += 1.0 if a > b else 0.5 if a == b else 0.0
    assert probability_of_improvement(x, y) == pytest.approx(total / (3 * 4 * 6))
    assert probability_of_improvement(x, y) + probability_of_improvement(y, x) == pytest.approx(1)
    witness = stats.mannwhitneyu(x[:, 0], y[:, 0]).statistic / (4 * 6)
    assert probability_of_improvement(x[:, 0], y[:, 0]) == pytest.approx(witness)


def test_probability_of_improvement_ends() -> None:
    assert probability_of_improvement([3.0, 4.0], [1.0, 2.0]) == 1
    assert probability_of_improvement([1.0, 2.0], [3.0, 4.0]) == 0
    assert probability_of_improvement([1.0], [1.0]) == 0.5
    with pytest.raises(ValueError, match="3 tasks and y 2"):
        probability_of_improvement(np.zeros((2, 3)), np.zeros((2, 2)))


@pytest.mark.parametrize("shape", [(2,), (5,), (5, 3)])
def test_intervals_of_the_iqm_at_once_are_those_of_a_loop(shape: tuple[int, ...]) -> None:
    x = RNG.gamma(2.0, size=shape)
    assert bootstrap_interval(x) == bootstrap_interval(x, statistic=lambda y: iqm(y))


@pytest.mark.parametrize("level", [0.8, 0.95])
def test_interval_of_one_task_is_scipys_percentile_bootstrap(level: float) -> None:
    x = RNG.gamma(2.0, size=25)
    low, high = bootstrap_interval(x, statistic=np.mean, level=level, resamples=20_000)
    witness = stats.bootstrap(
        (x,),
        np.mean,
        confidence_level=level,
        n_resamples=20_000,
        method="percentile",
        rng=np.random.default_rng(1),
    ).confidence_interval
    # ends of two finite bootstraps differ by their own sampling error
    assert low == pytest.approx(witness.low, abs=0.02) and high == pytest.approx(witness.high, abs=0.02)
    assert low < x.mean() < high


@pytest.mark.parametrize("n", [2, 3, 5, 8, 25])
def test_interval_of_one_task_is_scipys_to_the_last_digit_for_one_generator(n: int) -> None:
    x = RNG.gamma(2.0, size=n)
    witness = stats.bootstrap(
        (x,),
        lambda y, axis: stats.trim_mean(y, 0.25, axis=axis),
        confidence_level=0.95,
        n_resamples=2000,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    np.testing.assert_allclose(bootstrap_interval(x), witness, rtol=1e-13)


def test_resampling_is_stratified_by_task() -> None:
    # tasks far apart, no spread within: only draws across tasks could move the mean
    x = np.tile([0.0, 100.0], (6, 1))
    assert bootstrap_interval(x, statistic=np.mean) == (50, 50)
    # and each task is resampled on its own: paired resampling of y = -x would keep the mean at 0
    y = RNG.standard_normal(20)
    low, high = bootstrap_interval(np.stack([y, -y], 1), statistic=np.mean)
    width = 2 * 1.96 * y.std() / np.sqrt(2 * 20)
    assert high - low == pytest.approx(width, rel=0.15)


def test_interval_covers_at_its_level() -> None:
    hits = 0
    for seed in range(200):
        x = np.random.default_rng(seed).standard_normal(40)
        low, high = bootstrap_interval(x, statistic=np.mean, level=0.9, resamples=300, seed=seed)
        hits += low < 0 < high
    assert 0.82 < hits / 200 < 0.96


def test_interval_of_the_probability_of_improvement() -> None:
    x, y = RNG.standard_normal((30, 2)) + 1, RNG.standard_normal((30, 2))
    low, high = bootstrap_interval(x, y, statistic=probability_of_improvement)
    assert low < stats.norm.cdf(1 / np.sqrt(2)) < high  # P(N(1, 1) > N(0, 1))
    assert 0.5 < low and high < 1
    same = bootstrap_interval(x, x, statistic=probability_of_improvement)
    assert same[0] < 0.5 < same[1]


def test_interval_is_reproducible_by_seed() -> None:
    x = RNG.standard_normal((8, 3))
    assert bootstrap_interval(x, seed=1) == bootstrap_interval(x, seed=1) != bootstrap_interval(x, seed=2)


@pytest.mark.parametrize(
    ("scores", "arguments"),
    [
        ([1.0], {}),
        ([1.0, np.nan], {}),
        (np.zeros((2, 2, 2)), {}),
        ([1.0, 2.0], {"level": 1.0}),
        ([1.0, 2.0], {"resamples": 0}),
    ],
)
def test_interval_refuses_what_has_none(scores: object, arguments: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="2 seeds|finite|level"):
        bootstrap_interval(scores, **arguments)
