"""Black boxes: what is asked, what is checked, what is remembered."""

import functools
import io
import math
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from diffrl.rewards import cache as reward_cache
from diffrl.rewards.black_box import BlackBox
from diffrl.rewards.decoded import DecodedReward
from diffrl.rewards.pixels import Brightness
from tests.kit.oracles import randn
from tests.kit.rewards import Recorder, mean, points

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
        ({"retries": -1}, "retries is -1"),
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


class Net(torch.nn.Module):
    """A scorer of samples alone."""

    def forward(self, x0: Tensor) -> Tensor:
        return x0.sum(1)


def first(x0: Tensor) -> Tensor:
    return x0.sum(1)


ALONE = [first, Net(), functools.partial(lambda x0, cond: x0.sum(1), cond=None)]


@pytest.mark.parametrize("reward", ALONE, ids=["function", "module", "partial"])
def test_a_reward_may_take_the_samples_alone(reward: Any) -> None:
    x0, cond = randn(3, 2), ["a", "b", "c"]
    torch.testing.assert_close(BlackBox(reward)(x0, cond), x0.sum(1).float())
    torch.testing.assert_close(BlackBox(reward, workers=1, backend="thread")(x0, cond), x0.sum(1).float())
    decoded = DecodedReward(reward, lambda z: 2 * z, ["a", "b"])
    torch.testing.assert_close(decoded(x0, torch.tensor([0, 1, 1])), 2 * x0.sum(1))


@pytest.mark.parametrize(
    "reward", [lambda: 1, lambda x0, *, cond=None: x0.sum(1), lambda x0, cond, model: x0.sum(1)]
)
def test_what_takes_other_arguments_is_refused_at_once(reward: Any) -> None:
    for make in (BlackBox, lambda reward: DecodedReward(reward, lambda z: z)):
        with pytest.raises(
            TypeError, match=r"the reward takes \(.*give it a second argument `cond`"
        ) as error:
            make(reward)
        assert "\n" not in str(error.value)


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
