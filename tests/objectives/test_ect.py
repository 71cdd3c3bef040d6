"""ECT: its levels, its loss in a plain loop, its dropout, what it is at both ends, and its fixed point."""

import math
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor, nn

from diffrl.diffusion.denoisers import Denoiser
from diffrl.diffusion.schedules.edm import EDM
from diffrl.diffusion.schedules.vp import VP
from diffrl.objectives.ect import ECTLoss
from diffrl.objectives.ect_pairs import ECTPairs, sample_ect_pairs, t_to_r
from diffrl.objectives.scheme import Progressive
from tests.kit.value_loss import (
    PROCESS,
    SD,
    data,
    denoised_by_hand,
    denoiser,
    distance,
    gradient,
    number,
    perturb,
)

S = 0.6  # standard deviation of the data where the answer is known


def pairs_of(x0: Tensor | None = None, seed: int = 0, **options: Any) -> TensorDict:  # noqa: ANN401
    g = torch.Generator().manual_seed(seed)
    return sample_ect_pairs(PROCESS, data(8) if x0 is None else x0, **{"stage": 1, "generator": g, **options})


# The levels


@pytest.mark.parametrize("t", [0.05, 0.7, 3.0, 40.0])
@pytest.mark.parametrize("stage", [0, 1, 5])
@pytest.mark.parametrize(("q", "k", "b"), [(2.0, 8.0, 1.0), (4.0, 8.0, 1.0), (256.0, 3.0, 0.5)])
def test_the_lower_level_is_the_published_one(t: float, stage: int, q: float, k: float, b: float) -> None:
    n = 1 + k / (1 + math.exp(b * t))
    expected = max(0.0, t * (1 - n / q ** (stage + 1)))
    assert float(t_to_r(torch.tensor(t, dtype=torch.float64), stage, q, k, b)) == pytest.approx(expected)


def test_at_the_ends_it_is_denoising_and_td0() -> None:
    """At stage 0 r = 0 up to t = ln 7; with the stage the gap goes to 0, from t/2 at large t."""
    t = torch.logspace(-3, 3, 400, dtype=torch.float64)
    assert torch.equal(t_to_r(t, 0) == 0, t <= math.log(7))
    assert float(t_to_r(t, 0)[-1] / t[-1]) == pytest.approx(0.5)
    gaps = torch.stack([(t - t_to_r(t, stage)) / t for stage in range(20)])
    assert bool((gaps > 0).all() and (gaps.diff(dim=0) <= 0).all() and (gaps[-1] < 1e-5).all())


def test_the_share_of_denoising_is_that_of_its_law() -> None:
    valid = pairs_of(torch.zeros(20_000, 1), stage=0)["valid"].double().mean()
    expected = 0.5 * math.erfc((math.log(math.log(7)) + 1.1) / 2 / math.sqrt(2))  # 19 %
    assert abs(float(valid) - expected) < 4 * math.sqrt(expected * (1 - expected) / 20_000)


def test_pairs_share_their_noise() -> None:
    x0 = data(50)
    pairs = pairs_of(x0)
    t, r = pairs["t"].flatten(1), pairs["next", "t"].flatten(1)
    noise = (pairs["x_t"].squeeze(1) - x0) / t
    torch.testing.assert_close(pairs["next", "x_t"].squeeze(1), x0 + r * noise, rtol=1e-9, atol=1e-12)
    assert torch.equal(pairs["valid"], pairs["next", "t"] > 0) and 0 < int(pairs["valid"].sum()) < 50
    g = torch.Generator().manual_seed(0)
    z = torch.randn(50, generator=g, dtype=torch.float64)
    assert torch.equal(pairs["t"].flatten(), (-1.1 + 2 * z).exp())


def test_stages_have_equal_lengths() -> None:
    draw = ECTPairs(EDM(), stages=4)
    assert isinstance(draw, Progressive) and draw.stage == 0
    stages = []
    for step in range(12):
        draw.set_progress(step, 12)
        stages.append(draw.stage)
    assert stages == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3
    draw.set_progress(12, 12)
    assert draw.stage == 3


# The loss


@pytest.mark.parametrize("c", [0.0, 0.03])
@pytest.mark.parametrize("weight", ["gap", "snr"])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_the_loss_in_a_plain_loop(c: float, weight: str, share: float) -> None:
    D, x0 = denoiser(), data(12)
    perturb(D)
    pairs = pairs_of(x0)
    total = torch.zeros((), dtype=torch.float64)
    for i in range(12):
        t, r = float(pairs["t"][i]), float(pairs["next", "t"][i])
        y = x0[i]
        if r > 0:
            with torch.no_grad():
                y = (1 - share) * x0[i] + share * denoised_by_hand(D.network, pairs["next", "x_t"][i], r)[0]
        square = (denoised_by_hand(D.network, pairs["x_t"][i], t)[0] - y).square().sum()
        w = 1 / (t - r) if weight == "gap" else 1 / t**2 + 1 / SD**2
        total = total + w * ((square + c**2).sqrt() - c) / 12
    loss = ECTLoss(D, c=c, ect_weight=weight, bootstrap_share=share)
    value = loss(pairs)["loss_value"]
    torch.testing.assert_close(value, total, rtol=1e-11, atol=0)
    assert distance(gradient(value, D), gradient(total, D)) < 1e-10
    assert loss.network_evaluations == (12 if share == 0 else 24)


def test_where_r_is_0_it_is_denoising() -> None:
    """All pairs of small t at stage 0: the bootstrapped loss is the one without a bootstrap, at its cost."""
    D = denoiser()
    pairs = pairs_of(stage=0, sigma=torch.linspace(0.01, math.log(7), 8, dtype=torch.float64))
    found, plain = ECTLoss(D), ECTLoss(D, bootstrap_share=0.0)
    assert number(found(pairs)["loss_value"]) == number(plain(pairs)["loss_value"])
    assert found.network_evaluations == 8


def test_no_error_has_no_gradient_and_no_nan() -> None:
    class Datum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def exact(x: Tensor, t: Tensor, cond: Tensor | None) -> Tensor:
        return x * 0 + module.a

    module = Datum()
    D = denoiser()
    D.forward, D.network = exact, module  # type: ignore[method-assign, assignment]
    value = ECTLoss(D)(pairs_of(torch.zeros(4, 2, dtype=torch.float64), stage=0))["loss_value"]
    value.backward()
    assert number(value) == 0 and module.a.grad is not None and float(module.a.grad) == 0


# Dropout


def at_one_level() -> TensorDict:
    """Pairs whose two states are the same one, and count as bootstrapped."""
    pairs = pairs_of(stage=30)
    pairs["next"]["x_t"], pairs["next"]["t"] = pairs["x_t"], pairs["t"]
    assert bool(pairs["valid"].all())
    return pairs


def test_both_sides_have_the_same_dropout() -> None:
    D, pairs = denoiser(dropout=0.5).train(), at_one_level()
    loss = ECTLoss(D, ect_weight="snr")
    for _ in range(3):
        assert number(loss(pairs)["td_error"]) == 0
    assert not torch.equal(*(D(pairs["x_t"].squeeze(1), pairs["t"].flatten(), None) for _ in range(2)))


def test_each_step_has_a_dropout_of_its_own() -> None:
    torch.manual_seed(0)
    D, pairs = denoiser(dropout=0.5).train(), pairs_of()
    loss = ECTLoss(D)
    assert len({number(loss(pairs)["loss_value"]) for _ in range(4)}) == 4


# The fixed point, of data from N(0, S²): D(x, σ) = x S/√(S² + σ²) carries x to the end of its trajectory


class Flow(Denoiser):
    """The exact consistency function."""

    def forward(self, x_t: Tensor, t: Tensor, cond: Tensor | None = None, r: Tensor | None = None) -> Tensor:
        return x_t * S / (S**2 + t[:, None] ** 2).sqrt()


def exact() -> Flow:
    return Flow(denoiser().network, PROCESS, S)


@pytest.mark.parametrize("stage", [2, 4, 8])
def test_on_one_trajectory_the_consistency_function_has_no_loss(stage: int) -> None:
    pairs = pairs_of(data(64), stage=stage, sigma=torch.logspace(-1, 1, 64, dtype=torch.float64))
    pairs = pairs[pairs["valid"].flatten()]
    t, r = pairs["t"], pairs["next", "t"]
    assert len(pairs) > 20
    pairs["next"]["x_t"] = pairs["x_t"] * ((S**2 + r**2) / (S**2 + t**2)).sqrt()
    assert number(ECTLoss(exact())(pairs)["td_error"]) < 1e-15


def test_on_pairs_of_one_noise_its_mean_error_is_of_second_order_in_the_gap() -> None:
    """E[D(x_r) | x_t] = a x_t: by least squares on drawn pairs, against the closed form; half the gap, a quarter."""
    N, t = 200_000, 0.8
    x0 = S * torch.randn(N, 1, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    bias = []
    for q in (8.0, 16.0, 32.0):
        sigma = torch.full((N,), t, dtype=torch.float64)
        pairs = pairs_of(x0, stage=0, q=q, k=0.0, sigma=sigma)
        x_t, x_r = pairs["x_t"].flatten(), pairs["next", "x_t"].flatten()
        r = float(pairs["next", "t"][0])
        assert r == pytest.approx(t * (1 - 1 / q))
        D_r = exact()(x_r[:, None], torch.full_like(x_r, r))
        slope = float((D_r.flatten() * x_t).sum() / x_t.square().sum())
        expected = S / math.sqrt(S**2 + r**2) * (S**2 + r * t) / (S**2 + t**2)
        assert slope == pytest.approx(expected, abs=4 * S / math.sqrt(N) * (t - r))
        bias.append(expected - S / math.sqrt(S**2 + t**2))
    assert bias[0] / bias[1] == pytest.approx(4, rel=0.15) and bias[1] / bias[2] == pytest.approx(4, rel=0.1)


# What is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"c": -1.0}, "c is -1"),
        ({"ect_weight": "edm"}, "ect_weight is 'edm': give one of gap, snr"),
        ({"bootstrap_share": 2}, "bootstrap_share is 2"),
        ({"anneal": {"lmbda": [1, 0]}}, "what can be annealed here is bootstrap_share"),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ECTLoss(denoiser(), **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"q": 1.0}, "q is 1"),
        ({"k": -1.0}, "k is -1"),
        ({"b": -1.0}, "b is -1"),
        ({"P_mean": 20}, "P_mean is 20"),
        ({"P_std": -1}, "P_std is -1"),
        ({"stages": 0}, "stages is 0"),
        ({"q": 256.0}, "stages is 8, q is 256: .* less than floats resolve"),
    ],
)
def test_wrong_pairs_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ECTPairs(EDM(), **options)


def test_other_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match="the process is VP: ECT is defined for EDM"):
        ECTPairs(VP())
    with pytest.raises(ValueError, match=r"sigma has shape \(3,\), expected \(8,\)"):
        pairs_of(sigma=torch.ones(3))
    with pytest.raises(KeyError, match="valid missing in what the loss is given: give the states of"):
        ECTLoss(denoiser())(pairs_of().exclude("valid"))
