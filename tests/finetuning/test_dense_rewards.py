"""Rewards of every step from few queries: the golden numbers, end points, what is asked, what a guard prevents."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from diffrl.finetuning.placement.similarity import (
    anchor_steps,
    dense_queries,
    predict_dense,
    similarity_weighted,
)
from diffrl.rewards.black_box import BlackBox
from diffrl.rewards.calls import RewardError
from diffrl.rewards.faulty import Faulty
from diffrl.rewards.weighted_sum import WeightedSum
from tests.kit.oracles import randn

GOLDEN = torch.tensor([[[2.0, 0.0], [1.0, -1.0], [0.5, 1.5], [1.0, 1.0]]])
MODES: list[Any] = ["all", "anchor", "linear", "last"]


def golden_reward(R_A: float = 3.0) -> BlackBox:
    """The rewards of the golden example: of no other estimate than the first, the anchor and the last."""
    table = {(2.0, 0.0): 1.0, (1.0, -1.0): R_A, (1.0, 1.0): 2.0}
    return BlackBox(lambda x, c: [table[tuple(point)] for point in x.tolist()])


def bent(x0: Tensor, cond: Any = None) -> Tensor:
    """A reward that no interpolation reproduces."""
    return (3 * x0.flatten(1)[:, 0]).sin() + x0.flatten(1).square().mean(1)


class Counter:
    def __init__(self) -> None:
        self.count = 0

    def __call__(self, x0: Tensor, cond: Any) -> Tensor:
        self.count += len(x0)
        return bent(x0)


def cos(u: list[float], v: list[float]) -> float:
    return sum(a * b for a, b in zip(u, v, strict=True)) / (math.hypot(*u) * math.hypot(*v))


def by_hand(x: list[list[float]], reward: list[float], *, interior: bool, guarded: bool) -> list[float]:
    """One trajectory, one step at a time, in Python's numbers."""
    K = len(x)
    sums = [cos(x[i], x[0]) + cos(x[i], x[-1]) for i in range(K)]
    among = range(1, K - 1) if interior else range(K)
    k = min(among, key=lambda i: sums[i])
    predicted = []
    for i in range(K):
        weights = [cos(x[i], x[j]) for j in (0, k, K - 1)]
        if guarded:
            weights = [max(w, 0.0) for w in weights]
        total = sum(w * reward[j] for w, j in zip(weights, (0, k, K - 1), strict=True))
        predicted.append(total / sum(weights) if i not in (0, k, K - 1) else reward[i])
    return predicted


def test_golden_numbers() -> None:
    for interior in (True, False):
        assert anchor_steps(GOLDEN, interior=interior).tolist() == [1]
    raw = predict_dense(GOLDEN, golden_reward(), guarded=False)
    torch.testing.assert_close(raw, torch.tensor([[1.0, 3.0, 1.0, 2.0]]), rtol=0, atol=1e-6)
    # weights of the third step: .31623, max(-.44721, 0), .89443
    guarded = predict_dense(GOLDEN, golden_reward())
    expected = (0.316228 * 1 + 0.894427 * 2) / (0.316228 + 0.894427)
    torch.testing.assert_close(guarded, torch.tensor([[1.0, 3.0, expected, 2.0]]), rtol=0, atol=1e-5)


def test_a_raw_weight_turns_the_anchor_around_and_a_guarded_one_does_not() -> None:
    """A higher reward of the anchor lowers the raw prediction of the third step without bound."""
    third = {
        guarded: [
            float(predict_dense(GOLDEN, golden_reward(R_A), guarded=guarded)[0, 2])
            for R_A in (3.0, 30.0, 300.0)
        ]
        for guarded in (False, True)
    }
    assert third[False][0] > third[False][1] > third[False][2] and third[False][2] < -100
    assert max(third[True]) - min(third[True]) < 1e-4
    assert 1 < third[True][0] < 2


@pytest.mark.parametrize("interior", [True, False])
@pytest.mark.parametrize("guarded", [True, False])
@pytest.mark.parametrize("K", [4, 5, 9])
def test_anchor_against_a_plain_loop(K: int, guarded: bool, interior: bool) -> None:
    x0_hat = randn(6, K, 3) + 1.5 * randn(6, 1, 3, seed=1)  # similar enough for raw weights
    found = predict_dense(x0_hat, bent, interior=interior, guarded=guarded)
    for row, x in zip(found, x0_hat.float(), strict=True):
        expected = by_hand(x.tolist(), bent(x).tolist(), interior=interior, guarded=guarded)
        torch.testing.assert_close(row, torch.tensor(expected), rtol=2e-4, atol=2e-4)


def test_guarded_predictions_are_means_of_the_three_rewards() -> None:
    x0_hat = randn(200, 7, 2)  # zero-mean points in the plane: many negative similarities
    k = anchor_steps(x0_hat, interior=True)
    R = randn(200, 3, seed=1)
    guarded = similarity_weighted(x0_hat, k, R, guarded=True)
    low, high = R.min(1).values[:, None].float(), R.max(1).values[:, None].float()
    assert bool((guarded >= low - 1e-5).all()) and bool((guarded <= high + 1e-5).all())
    raw = similarity_weighted(x0_hat, k, R, guarded=False)
    assert not bool(((raw >= low) & (raw <= high)).all())


def test_where_no_estimate_is_similar_the_guard_gives_the_plain_mean_and_raw_weights_are_refused() -> None:
    x0_hat = torch.tensor([[[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 0.0]]])
    k, R = torch.tensor([1]), torch.tensor([[3.0, 6.0, 12.0]])
    torch.testing.assert_close(similarity_weighted(x0_hat, k, R, guarded=True)[0, 2], torch.tensor(7.0))
    with pytest.raises(ValueError, match=r"trajectory 0, step 2 is nan: .* \(give guarded=True\)"):
        similarity_weighted(x0_hat, k, R, guarded=False)


def test_the_anchor_is_each_trajectorys_own_and_the_earliest_of_equals() -> None:
    e = torch.eye(3)
    first, far, near = e[0], e[1], e[0] + 0.1 * e[2]
    x0_hat = torch.stack(
        [
            torch.stack([first, *middle, first])
            for middle in ([far, near, near], [near, far, near], [near, near, far])
        ]
        + [torch.stack([first, far, far, near, first])]
    )
    assert anchor_steps(x0_hat, interior=True).tolist() == [1, 2, 3, 1]


def test_on_an_arc_the_code_s_argmin_falls_on_an_end_and_the_interior_one_does_not() -> None:
    angle = torch.linspace(0, 1, 6)
    x0_hat = torch.stack([angle.cos(), angle.sin()], 1)[None]
    assert anchor_steps(x0_hat, interior=False).tolist()[0] in (0, 5)
    assert 1 <= int(anchor_steps(x0_hat, interior=True)) <= 4
    counter = Counter()
    wasted = predict_dense(x0_hat, counter, interior=False)
    assert counter.count == 3  # as published; a cache saves the third
    box = BlackBox(bent)
    torch.testing.assert_close(predict_dense(x0_hat, box, interior=False), wasted)
    assert box.queries == 2


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("K", [1, 2, 3, 4, 20])
def test_what_is_asked(mode: Any, K: int) -> None:
    counter, B = Counter(), 5
    assert predict_dense(randn(B, K, 2, 3), counter, mode=mode).shape == (B, K)
    expected = {"all": K, "anchor": min(K, 3), "linear": min(K, 2), "last": 1}[mode]
    assert counter.count == B * expected and dense_queries(mode, K) == expected


@pytest.mark.parametrize(
    ("mode", "each", "pair"), [("all", 9, 17), ("anchor", 3, 5), ("linear", 2, 3), ("last", 1, 2)]
)
def test_pairs_from_the_same_noise_share_the_first_query(mode: Any, each: int, pair: int) -> None:
    x0_hat = randn(8, 9, 2)
    x0_hat[1::2, 0] = x0_hat[::2, 0]  # rows 2p and 2p + 1 are a pair
    cached, plain = BlackBox(bent), BlackBox(bent, cache=False)
    torch.testing.assert_close(
        predict_dense(x0_hat, cached, mode=mode), predict_dense(x0_hat, plain, mode=mode), rtol=0, atol=0
    )
    assert plain.queries == 8 * each and cached.queries == 4 * pair
    before = cached.queries
    predict_dense(x0_hat, cached, mode=mode)
    assert cached.queries == before


@pytest.mark.parametrize(("mode", "longest"), [("all", 20), ("anchor", 3), ("linear", 2), ("last", 1)])
@pytest.mark.parametrize("guarded", [True, False])
def test_short_chains_are_exact(mode: Any, longest: int, guarded: bool) -> None:
    for K in range(1, longest + 1):
        x0_hat = randn(6, K, 2, seed=K)
        exact = bent(x0_hat.flatten(0, 1)).view(6, K).float()
        torch.testing.assert_close(
            predict_dense(x0_hat, bent, mode=mode, guarded=guarded), exact, rtol=0, atol=0
        )
    x0_hat = randn(6, longest + 1, 2)
    if mode != "all":  # and the next longer ones are not
        exact = bent(x0_hat.flatten(0, 1)).view(6, -1).float()
        assert not torch.allclose(predict_dense(x0_hat, bent, mode=mode), exact)


def test_with_the_code_s_argmin_three_steps_may_miss_the_middle() -> None:
    x0_hat = torch.tensor([[[1.0, 0.0], [1.0, 1.0], [0.0, 1.0]]])  # the middle is the likest to both
    exact = bent(x0_hat[0])
    torch.testing.assert_close(predict_dense(x0_hat, bent, interior=True)[0], exact)
    missed = predict_dense(x0_hat, bent, interior=False)[0]
    torch.testing.assert_close(missed[[0, 2]], exact[[0, 2]])
    assert not torch.allclose(missed[1], exact[1])


def test_linear_and_last() -> None:
    x0_hat = randn(3, 5, 2)
    R = bent(x0_hat.flatten(0, 1)).view(3, 5).float()
    linear, last = predict_dense(x0_hat, bent, mode="linear"), predict_dense(x0_hat, bent, mode="last")
    for i in range(5):
        torch.testing.assert_close(linear[:, i], R[:, 0] * (1 - i / 4) + R[:, 4] * (i / 4))
        torch.testing.assert_close(last[:, i], R[:, 4])
    assert linear[:, 0].equal(R[:, 0]) and linear[:, 4].equal(R[:, 4])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("guarded", [True, False])
def test_predictions_follow_the_reward_s_offset_and_scale(mode: Any, guarded: bool) -> None:
    """R → a R + b gives a R̂ + b: differences of pairs ignore offsets."""
    x0_hat = randn(4, 6, 3) + 2
    before = predict_dense(x0_hat, bent, mode=mode, guarded=guarded)
    after = predict_dense(x0_hat, lambda x, c: 5 * bent(x) - 7, mode=mode, guarded=guarded)
    torch.testing.assert_close(after, 5 * before - 7, rtol=1e-4, atol=1e-4)


def test_predictions_ignore_the_length_of_estimates_their_layout_and_other_trajectories() -> None:
    def direction(x0: Tensor, cond: Any) -> Tensor:
        return torch.nn.functional.normalize(x0.flatten(1), dim=1)[:, 0]

    x0_hat = randn(5, 6, 4)
    R_hat = predict_dense(x0_hat, direction)
    lengths = randn(5, 6, 1, seed=1).exp()
    torch.testing.assert_close(predict_dense(lengths * x0_hat, direction), R_hat, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(predict_dense(x0_hat.view(5, 6, 1, 2, 2), direction), R_hat)
    order = torch.tensor([3, 0, 4, 2, 1])
    torch.testing.assert_close(predict_dense(x0_hat[order], direction), R_hat[order])
    torch.testing.assert_close(predict_dense(x0_hat[2:3], direction), R_hat[2:3])


@pytest.mark.parametrize("mode", MODES)
def test_each_query_has_its_trajectory_s_condition(mode: Any) -> None:
    x0_hat = torch.arange(3.0)[:, None, None] + torch.zeros(3, 5, 1)  # the estimates say whose they are

    def reward(x0: Tensor, cond: Any) -> list[float]:
        assert [round(v) for v in x0[:, 0].tolist()] == [int(c) for c in cond]
        return [float(c) for c in cond]

    expected = torch.arange(3.0)[:, None].expand(3, 5)
    for cond in (torch.arange(3), ["0", "1", "2"]):
        torch.testing.assert_close(predict_dense(x0_hat, reward, cond, mode=mode), expected)


def test_low_precision_estimates_are_compared_in_float32() -> None:
    """Sums of 16,384 squares would overflow in float16."""
    x0_hat = (8 * randn(2, 6, 4, 64, 64) + 4).half()
    found = predict_dense(x0_hat, bent_float)
    torch.testing.assert_close(found, predict_dense(x0_hat.float(), bent_float), rtol=1e-4, atol=1e-4)
    assert found.dtype == torch.float32
    # similarities that bfloat16 cannot tell apart: 0.99228 and 0.99216
    close = torch.tensor([[[1.0, 0.0], [1.0, 0.125], [1.0, 0.126], [1.0, 0.0]]]).bfloat16()
    assert anchor_steps(close, interior=True).tolist() == [2]


def bent_float(x0: Tensor, cond: Any) -> Tensor:
    return bent(x0.float())


def test_no_gradient_and_no_trace_on_the_estimates() -> None:
    x0_hat = randn(2, 4, 3).requires_grad_()
    before = x0_hat.detach().clone()
    assert not predict_dense(x0_hat, lambda x, c: x.mul_(2).sum(1)).requires_grad
    assert x0_hat.detach().equal(before) and x0_hat.grad is None


def test_sums_are_predicted_and_failures_raise() -> None:
    x0_hat = randn(2, 5, 3)
    total = WeightedSum({"bent": (bent, 2.0)})
    torch.testing.assert_close(predict_dense(x0_hat, total), 2 * predict_dense(x0_hat, bent))
    assert total.queries == 6
    with pytest.raises(RewardError, match="sample 0 of 6"):
        predict_dense(x0_hat, Faulty("nan"))


def test_estimates_that_are_not_finite_are_refused() -> None:
    x0_hat = randn(2, 5, 3)
    x0_hat[1, 3] = math.nan
    with pytest.raises((ValueError, RewardError), match="not finite|holds NaN"):
        predict_dense(x0_hat, bent)


def test_arguments_that_do_not_fit_are_refused() -> None:
    x0_hat = randn(2, 5, 3)
    with pytest.raises(ValueError, match="mode is 'anchors': give one of all, anchor, linear, last"):
        predict_dense(x0_hat, bent, mode="anchors")
    with pytest.raises(ValueError, match=r"shape \(2, 5\)"):
        predict_dense(x0_hat[..., 0], bent)
    with pytest.raises(ValueError, match="10 conditions for 2 trajectories"):
        predict_dense(x0_hat, bent, torch.zeros(10))
    with pytest.raises(ValueError, match="0 steps"):
        predict_dense(x0_hat[:, :0], bent)
