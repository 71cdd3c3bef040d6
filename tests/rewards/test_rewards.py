"""Black boxes and weighted sums: what is asked, what is checked, what is remembered, what happens on failure."""

import functools
import io
import math
import os
import pickle
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from diffrl.rewards import cache as reward_cache
from diffrl.rewards.black_box import BlackBox
from diffrl.rewards.calls import RewardError
from diffrl.rewards.faulty import Faulty
from diffrl.rewards.pixels import Brightness
from diffrl.rewards.weighted_sum import WeightedSum, as_reward, nondeterminism
from tests.kit.oracles import randn


def mean(x0: Tensor, cond: Any = None) -> Tensor:
    """The plain reward of these tests."""
    return x0.flatten(1).mean(1)


class Recorder:
    """Notes the samples of each call, then answers with means."""

    def __init__(self) -> None:
        self.calls: list[Tensor] = []

    def __call__(self, x0: Tensor, cond: Any = None) -> Tensor:
        self.calls.append(x0.clone())
        return mean(x0)

    @property
    def samples(self) -> int:
        return sum(map(len, self.calls))


def troublesome(x0: Tensor, cond: Any = None) -> list[float]:
    """Hangs on a batch that holds 100, ends its process on 200, raises on 300."""
    if bool((x0 == 100).any()):
        time.sleep(60)
    if bool((x0 == 200).any()):
        os._exit(7)
    if bool((x0 == 300).any()):
        raise KeyError("three hundred")
    return mean(x0).tolist()


def points(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float32)[:, None]


# What is asked


@pytest.mark.parametrize(
    "answer",
    [
        lambda r: r,
        lambda r: r.double(),
        lambda r: r.bfloat16(),
        lambda r: r.tolist(),
        lambda r: tuple(r.tolist()),
        lambda r: r.numpy(),
        lambda r: list(r),
        lambda r: r.int(),
        lambda r: r.numpy().astype(np.int16),
        lambda r: np.array(r.tolist(), dtype=object),
        lambda r: r > 0,
    ],
)
def test_every_kind_of_numbers_is_taken(answer: Callable[[Tensor], Any]) -> None:
    x0 = torch.arange(5.0)[:, None]
    rewards = BlackBox(lambda x, c: answer(x[:, 0]))(x0)
    expected = torch.tensor([float(a) for a in answer(x0[:, 0])])
    assert rewards.dtype == torch.float32 and not rewards.requires_grad
    torch.testing.assert_close(rewards, expected, rtol=0, atol=0)


@pytest.mark.parametrize("batch_size", [1, 3, 7, 100, None])
@pytest.mark.parametrize("workers", [0, 3])
def test_batches_and_threads_change_nothing(batch_size: int | None, workers: int) -> None:
    seen = Recorder()
    x0, cond = randn(7, 2, 3), torch.arange(7)
    box = BlackBox(lambda x, c: seen(x) + c, batch_size=batch_size, workers=workers)
    torch.testing.assert_close(box(x0, cond), (mean(x0) + cond).float())
    sizes = sorted(map(len, seen.calls))
    most = batch_size or (7 if workers == 0 else 3)
    assert max(sizes) <= most and sum(sizes) == 7 and len(sizes) == math.ceil(7 / most)


def test_gradients_are_off_in_every_thread() -> None:
    modes: list[bool] = []
    weight = torch.ones((), requires_grad=True)

    def reward(x0: Tensor, cond: Any) -> Tensor:
        modes.append(torch.is_grad_enabled())
        return weight * x0.sum(1)

    x0 = randn(4, 2).requires_grad_()
    for workers in (0, 2):
        assert not BlackBox(reward, workers=workers)(x0).requires_grad
    assert modes and not any(modes) and torch.is_grad_enabled()


def test_the_reward_may_spoil_its_copy() -> None:
    def spoil(x0: Tensor, cond: Any) -> Tensor:
        cond.zero_()
        return x0.zero_()[:, 0]

    x0, cond = torch.ones(3, 2), torch.ones(3)
    BlackBox(spoil)(x0, cond)
    assert bool((x0 == 1).all()) and bool((cond == 1).all())


@pytest.mark.parametrize("cond", [["a", "b", "a"], ("a", "b", "a")])
def test_conditions_may_be_prompts(cond: Any) -> None:
    box = BlackBox(lambda x, prompts: [ord(p) for p in prompts], batch_size=2)
    assert box(torch.zeros(3, 1), cond).tolist() == [97, 98, 97]


def test_conditions_that_do_not_fit_are_refused() -> None:
    box = BlackBox(mean)
    with pytest.raises(ValueError, match="2 conditions for 3 samples"):
        box(torch.zeros(3, 1), torch.zeros(2))
    with pytest.raises(TypeError, match="cond is a str"):
        box(torch.zeros(3, 1), "cat")


def test_no_samples_no_call() -> None:
    seen = Recorder()
    assert BlackBox(seen)(torch.zeros(0, 2)).shape == (0,)
    assert BlackBox(seen, cache=False)(torch.zeros(0, 2)).shape == (0,)
    assert not seen.calls


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"workers": -1}, "workers is -1"),
        ({"retries": -1}, "retries -1"),
        ({"workers": 1, "backend": "fork"}, "backend is 'fork'"),
        ({"timeout": 1.0}, "workers >= 1, which can be left"),
        ({"workers": 1, "timeout": 0.0}, "timeout is 0.0"),
        ({"on_failure": "zero"}, "on_failure is 'zero'"),
        ({"on_failure": math.nan}, "on_failure is nan"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BlackBox(mean, **arguments)


def test_what_cannot_be_called_is_refused() -> None:
    with pytest.raises(TypeError, match="give a callable"):
        BlackBox(3.0)


def test_names() -> None:
    assert BlackBox(mean).name == "mean"
    assert BlackBox(Brightness()).name == "Brightness"
    assert BlackBox(functools.partial(mean, cond=None)).name == "mean"


# The cache


def test_equal_samples_are_scored_once() -> None:
    seen = Recorder()
    box = BlackBox(seen)
    x0 = points(1, 2, 1, 3)
    assert box(x0).tolist() == [1, 2, 1, 3]
    assert (box.queries, box.cache_hits, seen.samples) == (3, 1, 3)
    assert box(points(3, 4)).tolist() == [3, 4]
    assert (box.queries, box.cache_hits, seen.samples) == (4, 2, 4)
    assert box.metrics() == {"queries": 4, "cache_hits": 2, "retried": 0, "failures": 0}


def test_without_a_cache_every_sample_is_scored() -> None:
    seen = Recorder()
    box = BlackBox(seen, cache=False)
    box(points(1, 2, 1))
    box(points(1))
    assert (box.queries, box.cache_hits, seen.samples) == (4, 0, 4)


def test_whatever_differs_is_another_sample() -> None:
    """Condition, dtype and shape count; batch and memory layout don't."""
    box = BlackBox(mean)
    x = torch.arange(6.0).reshape(1, 2, 3)
    inputs = [
        (x, None),
        (x.double(), None),
        (x.reshape(1, 3, 2), None),
        (x + 1e-6, None),
        (x, torch.tensor([1])),
        (x, torch.tensor([2])),
        (x, torch.tensor([1], dtype=torch.int32)),
        (x, torch.tensor([1], dtype=torch.int32).view(torch.float32)),  # the same bytes
        (x, ["a"]),
        (x, ["b"]),
    ]
    for number, given in enumerate(inputs, 1):
        box(*given)
        assert box.queries == number
    box(x.transpose(1, 2).contiguous().transpose(1, 2))
    box(torch.cat([x + 1e-6, x]))
    box(x, ["b"])
    assert (box.queries, box.cache_hits) == (len(inputs), 4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.uint8, torch.bool])
def test_samples_of_every_dtype_are_remembered(dtype: torch.dtype) -> None:
    box = BlackBox(lambda x, c: x.flatten(1).double().sum(1))
    x0 = torch.tensor([[0, 1, 1], [1, 0, 0]]).to(dtype)
    assert box(x0).tolist() == box(x0).tolist() == [2, 1]
    assert box.queries == 2


def test_what_was_not_used_for_longest_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reward_cache, "CACHE_SIZE", 2)
    box = BlackBox(mean)
    assert box(points(1, 2, 3)).tolist() == [1, 2, 3]  # more than it holds
    box(points(2))
    box(points(4))  # 3 goes
    assert box.queries == 4
    box(points(2, 4))
    assert box.queries == 4
    box(points(3))
    assert box.queries == 5


def test_a_resumed_box_asks_what_the_first_would_have_asked() -> None:
    first = BlackBox(mean)
    first(points(1, 2, 3))
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second = BlackBox(mean)
    second.load_state_dict(torch.load(file, weights_only=True))
    for box in (first, second):
        assert box(points(3, 4)).tolist() == [3, 4]
    assert first.metrics() == second.metrics() == {"queries": 4, "cache_hits": 1, "retried": 0, "failures": 0}
    empty = BlackBox(mean)
    empty.load_state_dict(BlackBox(mean).state_dict())
    assert empty(points(5)).tolist() == [5]


def test_a_copy_has_workers_of_its_own() -> None:
    box = BlackBox(mean, workers=1)
    box(points(1))
    copy = pickle.loads(pickle.dumps(box))
    box.close()
    assert copy(points(1, 2)).tolist() == [1, 2] and copy.queries == 2
    assert box(points(5)).tolist() == [5]  # and a closed one starts again


# Failures


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("nan", r"reward 'Faulty' failed for sample 2 of 6: it gave NaN or None"),
        ("none", r"reward 'Faulty' failed for sample 2 of 6: it gave NaN or None"),
        ("inf", r"reward 'Faulty' failed for sample 2 of 6: it gave inf"),
        ("shape", r"reward 'Faulty' failed for samples 2, 3 of 6: it gave shape \[2, 1\], not \[2\]"),
        ("exception", r"reward 'Faulty' failed for samples 2, 3 of 6: RuntimeError: this reward is faulty"),
    ],
)
def test_a_failure_raises_and_names_reward_and_samples(kind: Any, message: str, workers: int) -> None:
    faulty, x0 = Faulty(kind), randn(6, 2)

    def reward(x: Tensor, cond: Tensor) -> Any:
        return faulty(x) if int(cond[0]) == 2 else mean(x)

    box = BlackBox(reward, batch_size=2, workers=workers)
    box.name = "Faulty"
    with pytest.raises(RewardError, match=message) as raised:
        box(x0, torch.arange(6))
    if kind == "exception":
        assert isinstance(raised.value.__cause__, RuntimeError)
    box.reward = mean
    if workers == 0:  # nothing of the failed call is left over
        torch.testing.assert_close(box(x0, torch.arange(6)), mean(x0).float())


@pytest.mark.parametrize(
    "answer",
    [
        None,
        1.0,
        [1.0],
        [[1.0], [2.0], [3.0]],
        torch.ones(4),
        ["a", "b", "c"],
        [1.0, [2.0], 3.0],
        [1j, 1j, 1j],
        "abc",
    ],
)
@pytest.mark.parametrize("on_failure", ["raise", "worst", "mean", -1.0])
def test_no_answer_and_wrong_shapes_and_types_are_never_zeros(answer: Any, on_failure: Any) -> None:
    """None for all three is a failure of samples, which a number may stand in for; the rest always raises."""
    box = BlackBox(lambda x, c: answer, on_failure=on_failure, retries=2)
    if answer is None and on_failure == -1.0:
        with pytest.warns(RuntimeWarning, match="-1 stands in"):
            assert box(points(1, 2, 3)).tolist() == [-1, -1, -1]
    else:
        with pytest.raises(RewardError, match="failed for sample.* of 3"):
            box(points(1, 2, 3))


def test_numbers_too_large_for_float32_fail() -> None:
    with pytest.raises(RewardError, match="sample 1 of 2: it gave 1e\\+300"):
        BlackBox(lambda x, c: [1.0, 1e300])(points(1, 2))


def test_a_sample_that_is_not_finite_is_never_shown() -> None:
    seen = Recorder()
    x0 = points(1, math.nan, 3, -math.inf)
    with pytest.raises(RewardError, match="samples 1, 3 of 4: the sample itself holds NaN"):
        BlackBox(seen)(x0)
    assert not seen.calls
    box = BlackBox(seen, on_failure="worst")
    with pytest.warns(RuntimeWarning, match="samples 1, 3 of 4"):
        assert box(x0).tolist() == [1, 1, 3, 1]
    assert (box.queries, box.failures, seen.samples) == (2, 2, 2)


@pytest.mark.parametrize(("on_failure", "expected"), [("worst", -5.0), ("mean", 2.5), (-7.5, -7.5)])
def test_stand_ins(on_failure: Any, expected: float) -> None:
    box = BlackBox(lambda x, c: [None if v == 9 else v for v in x[:, 0].tolist()], on_failure=on_failure)
    box(points(-5, 4))
    with pytest.warns(RuntimeWarning, match="samples 1, 3 of 4: it gave NaN or None; .* stands in"):
        rewards = box(points(1, 9, 4, 9))
    assert rewards.tolist() == [1, expected, 4, expected]
    assert box.failures == 2
    queries = box.queries
    with pytest.warns(RuntimeWarning):  # a stand-in is not remembered
        box(points(9)) if on_failure != "mean" else box(points(9, 1))
    assert box.queries == queries + 1


@pytest.mark.parametrize("on_failure", ["worst", "mean"])
def test_there_may_be_nothing_to_stand_in(on_failure: Any) -> None:
    with pytest.raises(RewardError, match=f"no reward to take the {on_failure} of"):
        BlackBox(Faulty("exception"), on_failure=on_failure)(torch.zeros(2, 1))


def test_the_worst_reward_survives_a_checkpoint() -> None:
    first = BlackBox(mean)
    first(points(-3, 1))
    box = BlackBox(Faulty("exception"), on_failure="worst")
    box.load_state_dict(first.state_dict())
    with pytest.warns(RuntimeWarning, match="-3 stands in"):
        assert box(points(5)).tolist() == [-3]


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("kind", ["nan", "none", "exception"])
def test_retries(kind: Any, workers: int) -> None:
    x0 = randn(4, 2)
    box = BlackBox(Faulty(kind, calls=2), retries=2, workers=workers)
    torch.testing.assert_close(box(x0), mean(x0).float())
    assert (box.queries, box.failures) == (4, 0)
    assert box.retried == (
        8 if kind == "exception" else 2
    )  # the whole batch, or the one sample without a number
    with pytest.raises(RewardError):
        BlackBox(Faulty(kind, calls=2), retries=1, workers=workers)(x0)
    box = BlackBox(Faulty(kind, calls=2), retries=1, workers=workers, on_failure=0.0)
    with pytest.warns(RuntimeWarning, match="0 stands in"):
        box(x0)
    assert box.retried == box.failures == (4 if kind == "exception" else 1)


# Workers


def test_threads_work_side_by_side() -> None:
    barrier = threading.Barrier(3)

    def reward(x0: Tensor, cond: Any) -> Tensor:
        barrier.wait(timeout=20)  # passes only if three calls are under way
        return mean(x0)

    x0 = randn(6, 2)
    torch.testing.assert_close(BlackBox(reward, workers=3)(x0), mean(x0).float())


def test_a_thread_that_takes_too_long_is_left() -> None:
    release = threading.Event()

    def reward(x0: Tensor, cond: Any) -> Tensor:
        if float(x0[0, 0]) == 100:
            release.wait(30)
            return mean(x0) * 0
        return mean(x0)

    box = BlackBox(reward, batch_size=1, workers=2, timeout=0.3, on_failure=-1.0)
    start = time.monotonic()
    with pytest.warns(RuntimeWarning, match="sample 1 of 4: it took longer than 0.3 s; -1 stands in"):
        assert box(points(1, 100, 3, 4)).tolist() == [1, -1, 3, 4]
    assert time.monotonic() - start < 10
    release.set()  # the late answer goes nowhere
    assert box(points(5, 6, 7)).tolist() == [5, 6, 7]
    assert box.failures == 1


def test_a_call_that_was_left_early_leaves_no_answers_behind() -> None:
    release = threading.Event()

    def reward(x0: Tensor, cond: Any) -> Tensor:
        if float(x0[0, 0]) == 100:
            release.wait(30)
        if float(x0[0, 0]) == 300:
            raise KeyError("three hundred")
        return mean(x0)

    box = BlackBox(reward, batch_size=1, workers=2)
    with pytest.raises(RewardError, match="three hundred"):
        box(points(100, 300))
    release.set()
    assert box(points(1, 2)).tolist() == [1, 2]


def test_processes() -> None:
    """One box, in the order that costs the fewest starts of a process."""
    box = BlackBox(troublesome, workers=1, backend="process", timeout=1.0, retries=0, on_failure=-1.0)
    x0 = randn(4, 2).bfloat16()
    torch.testing.assert_close(box(x0, ["a", "b", "c", "d"]), mean(x0).float())
    with pytest.warns(RuntimeWarning, match="sample 0 of 1: KeyError: 'three hundred'"):
        box(points(300))
    with pytest.warns(RuntimeWarning, match="sample 0 of 1: it took longer than 1 s"):
        box(points(100))
    box.batch_size = 1
    with pytest.warns(RuntimeWarning, match="sample 1 of 2: its worker process ended with status 7"):
        assert box(points(1, 200)).tolist() == [1, -1]
    assert box.failures == 3
    box.close()


@pytest.mark.slow
def test_processes_side_by_side_are_replaced_and_retried() -> None:
    box = BlackBox(
        troublesome, batch_size=1, workers=2, backend="process", timeout=2.0, retries=1, on_failure="mean"
    )
    with pytest.warns(RuntimeWarning, match="samples 1, 2 of 5"):
        assert box(points(1, 100, 200, 4, 7)).tolist() == [1, 4, 4, 4, 7]
    assert box.retried == 2
    assert box(points(8, 9)).tolist() == [8, 9]
    box.close()


class Unloadable:
    """Pickles, but cannot be made again."""

    def __reduce__(self) -> tuple[Any, ...]:
        return int, ("no number",)

    def __call__(self, x0: Tensor, cond: Any) -> Tensor:
        return mean(x0)


def test_rewards_that_no_process_can_hold() -> None:
    with pytest.raises(
        RewardError, match="reward '<lambda>': it cannot be sent to a process .* backend='thread'"
    ):
        BlackBox(lambda x, c: mean(x), workers=1, backend="process")
    box = BlackBox(Unloadable(), workers=1, backend="process")
    with pytest.raises(
        RewardError, match="reward 'Unloadable' failed for sample 0 of 1: its worker process could not start"
    ):
        box(points(1))


# Weighted sums


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


# Helpers


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
