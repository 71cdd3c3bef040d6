"""Rewards that fail, hang or die: what is raised, what stands in, what is asked again."""

import math
import os
import sys
import threading
import time
from typing import Any

import pytest
import torch
from torch import Tensor

from diffrl import workers
from diffrl.rewards.black_box import BlackBox
from diffrl.rewards.calls import RewardError
from diffrl.rewards.faulty import Faulty
from tests.kit.oracles import randn
from tests.kit.rewards import Recorder, mean, points


def troublesome(x0: Tensor, cond: Any = None) -> list[float]:
    """Hangs on a batch that holds 100, ends its process on 200, raises on 300."""
    if bool((x0 == 100).any()):
        time.sleep(60)
    if bool((x0 == 200).any()):
        os._exit(7)
    if bool((x0 == 300).any()):
        raise KeyError("three hundred")
    return mean(x0).tolist()


# Failures


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("nan", r"reward 'Faulty' failed for sample 2 of 6: it gave NaN or None"),
        ("none", r"reward 'Faulty' failed for sample 2 of 6: it gave NaN or None"),
        ("inf", r"reward 'Faulty' failed for sample 2 of 6: it gave inf"),
        (
            "shape",
            r"'Faulty' failed for samples 2, 3 of 6: it gave shape \[2, 1\], not \[2\]: take .squeeze\(1\)",
        ),
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


@pytest.mark.parametrize(
    ("reward", "says"),
    [
        (lambda x, c: x, r"it gave shape \[3, 1\], not \[3\]: take .squeeze\(1\) of it"),
        (
            lambda x, c: x.mean(),
            r"it gave shape \[\], not \[3\]: let it give one number a sample, no mean of all",
        ),
        (lambda x, c: x[:2, 0], r"it gave shape \[2\], not \[3\]: let it give one number a sample"),
    ],
)
def test_a_wrong_shape_is_told_with_the_remedy(reward: Any, says: str) -> None:
    with pytest.raises(RewardError, match=says) as error:
        BlackBox(reward)(points(1, 2, 3))
    assert "\n" not in str(error.value)


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


@pytest.mark.parametrize("threads", [0, 1])
def test_a_reward_that_leaves_is_a_failure_like_others(threads: int) -> None:
    """`sys.exit` ends neither the run nor the worker: it is tried again, and `on_failure` says what stands in."""

    def reward(x0: Tensor, cond: Any) -> Tensor:
        if float(x0[0, 0]) == 300:
            sys.exit("out of licences")
        return mean(x0)

    box = BlackBox(reward, batch_size=1, workers=threads, retries=1, on_failure=-1.0)
    with pytest.warns(RuntimeWarning, match="sample 1 of 2: SystemExit: out of licences; -1 stands in"):
        assert box(points(1, 300)).tolist() == [1, -1]
    assert (box.retried, box.failures) == (1, 1)
    with pytest.raises(RewardError, match="sample 0 of 1: SystemExit: out of licences"):
        BlackBox(reward, workers=threads)(points(300))


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


def test_a_reward_that_always_hangs_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each thread that is left costs a descriptor too: there is an end to it, whatever `on_failure` says."""
    monkeypatch.setattr(workers, "MOST_ABANDONED", 4)
    release = threading.Event()
    box = BlackBox(
        lambda x, c: release.wait(30), batch_size=1, workers=2, timeout=0.05, retries=9, on_failure=0.0
    )
    with pytest.raises(
        RewardError, match="longer than 0.05 s, and 4 threads that did so still run: backend='pro"
    ):
        box(points(1, 2))
    release.set()


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


@pytest.mark.soak  # threads do so above, and processes are replaced in tests/test_workers.py
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
