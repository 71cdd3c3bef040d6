"""Weighted sums of rewards, plain and standardised; rewards that answer differently each time."""

import io
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from diffrl.rewards.black_box import BlackBox
from diffrl.rewards.calls import RewardError
from diffrl.rewards.faulty import Faulty
from diffrl.rewards.pixels import Brightness
from diffrl.rewards.weighted_sum import WeightedSum, as_reward, nondeterminism
from tests.kit.oracles import randn
from tests.kit.rewards import mean


def test_a_plain_sum() -> None:
    x0, cond = randn(5, 3).float(), torch.arange(5)
    total = WeightedSum(
        {"mean": (mean, 2.0), "label": (lambda x, c: c, -0.5), "watched": (Brightness(), 0.0)}
    )
    torch.testing.assert_close(total(x0, cond), 2 * mean(x0) - 0.5 * cond)
    torch.testing.assert_close(total.latest["watched"], Brightness()(x0))
    log = total.metrics()
    assert log["label/mean"] == 2 and log["label/std"] == pytest.approx(2**0.5)
    assert log["mean/queries"] == 5 and total.queries == 15
    total(x0, cond)
    assert total.queries == 15


def test_a_running_sum_standardises_each_reward_by_all_that_came_before() -> None:
    """Against numpy's moments of everything so far; one call has a single sample, one none."""
    scales = {"small": (1e-3, 5.0, 1.0), "large": (1e4, -3e4, -0.5), "constant": (0.0, 7.0, 3.0)}

    def scaled(name: str) -> Callable[[Tensor, Any], Tensor]:
        a, b, _ = scales[name]
        return lambda x, c: a * x[:, 0].pow(len(name)) + b

    total = WeightedSum({name: (scaled(name), scales[name][2]) for name in scales}, normalise="running")
    seen: dict[str, list[float]] = {name: [] for name in scales}
    for number, n in enumerate([4, 1, 0, 6, 3]):
        x0 = randn(n, 1, seed=number)
        expected = np.zeros(n)
        found = total(x0)
        for name in scales:
            values = total.latest[name].double().numpy()
            torch.testing.assert_close(total.latest[name], scaled(name)(x0, None).float())
            seen[name] += values.tolist()
            if n:
                moments = np.mean(seen[name]), np.std(seen[name])
                expected += scales[name][2] * (values - moments[0]) / (moments[1] + 1e-6)
        np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4, atol=1e-5)


def test_a_running_sum_ignores_scales() -> None:
    x0 = randn(16, 2)
    once = WeightedSum({"a": (mean, 1.0), "b": (lambda x, c: x[:, 0], 1.0)}, normalise="running")(x0)
    other = {"a": (lambda x, c: 1e3 * mean(x) + 5, 1.0), "b": (lambda x, c: x[:, 0] - 9, 1.0)}
    torch.testing.assert_close(WeightedSum(other, normalise="running")(x0), once, rtol=1e-4, atol=1e-5)


def test_a_resumed_sum_goes_on() -> None:
    rewards: dict[str, Any] = {"a": (mean, 1.0), "b": (lambda x, c: x[:, 0], -2.0)}
    first, second = (WeightedSum(rewards, normalise="running") for _ in range(2))
    first(randn(8, 2))
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second.load_state_dict(torch.load(file, weights_only=True))
    x0 = randn(8, 2, seed=1)
    torch.testing.assert_close(second(x0), first(x0), rtol=0, atol=0)
    assert first.queries == second.queries == 32
    fresh = WeightedSum(rewards, normalise="running")(x0)
    assert not torch.allclose(fresh, first(x0))


def test_a_failing_part_is_named() -> None:
    total = WeightedSum({"fine": (mean, 1.0), "broken": (Faulty("nan"), 1.0)})
    with pytest.raises(RewardError, match="reward 'broken' failed for sample 0 of 3"):
        total(randn(3, 2))
    total.close()


@pytest.mark.parametrize(
    ("rewards", "normalise", "message"),
    [
        ({}, "none", "at least one reward"),
        ({"a": (mean, math.inf)}, "none", "the weight of 'a' is inf"),
        ({"a": (mean, 1.0)}, "zscore", "normalise is 'zscore'"),
    ],
)
def test_sums_that_make_no_sense_are_refused(rewards: Any, normalise: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WeightedSum(rewards, normalise=normalise)


def test_as_reward_wraps_once() -> None:
    box, total = BlackBox(mean), WeightedSum({"a": (mean, 1.0)})
    assert as_reward(box) is box and as_reward(total) is total
    assert isinstance(as_reward(mean), BlackBox)


def test_nondeterminism_looks_past_the_cache_and_is_not_counted() -> None:
    flip = [0.0]

    def unsteady(x0: Tensor, cond: Any) -> Tensor:
        flip[0] = 0.25 - flip[0]
        return mean(x0) + flip[0]

    x0 = randn(4, 2)
    box = BlackBox(unsteady)
    box(x0)
    assert nondeterminism(box, x0) == pytest.approx(0.25)
    assert (box.queries, box.cache_hits) == (4, 0)
    assert nondeterminism(unsteady, x0) == pytest.approx(0.25)
    assert nondeterminism(mean, x0) == 0
    total = WeightedSum({"steady": (mean, 1.0), "unsteady": (unsteady, 1.0)}, normalise="running")
    assert nondeterminism(total, x0) == pytest.approx(0.25)
    steady = WeightedSum({"steady": (mean, 1.0)}, normalise="running")
    assert nondeterminism(steady, x0) == 0 and steady.queries == 0
    assert nondeterminism(mean, torch.zeros(0, 2)) == 0
