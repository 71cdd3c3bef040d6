"""The value loss against a plain denoising step, and against the returns written out one state at a time."""

import math
from itertools import product
from typing import Any

import pytest
import torch

from diffrl.diffusion.schedules.base import Schedule
from diffrl.diffusion.schedules.ddpm import DDPM
from diffrl.diffusion.schedules.edm import EDM
from diffrl.diffusion.schedules.flow import Flow
from diffrl.diffusion.schedules.vp import VP
from diffrl.objectives import ValueLoss
from tests.kit.value_loss import (
    SD,
    TARGETS,
    N,
    Target,
    check,
    data,
    denoised_by_hand,
    denoiser,
    distance,
    draw,
    gradient,
    loss_by_hand,
    number,
)

# Monte Carlo is the plain denoising step


@pytest.mark.parametrize("event_shape", [(2,), (1, 3, 4)])
@pytest.mark.parametrize("target", ["lambda", "n_steps", "monte_carlo"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
@pytest.mark.parametrize("coupling", ["markov", "shared", 0.5])
def test_monte_carlo_is_the_edm_step(
    event_shape: tuple[int, ...], target: str, dtype: torch.dtype, tolerance: float, coupling: str | float
) -> None:
    D = denoiser(process=EDM(), event_shape=event_shape, dtype=dtype)
    chain = draw(EDM(), data(8, event_shape, dtype), num_steps=18, coupling=coupling)
    if target == "monte_carlo":
        loss = ValueLoss(D).make_value_estimator("monte_carlo")
    else:
        loss = ValueLoss(D, lmbda=1.0) if target == "lambda" else ValueLoss(D, n_steps=18)
    value = loss(chain)["loss_value"]

    x_t, x0 = chain["x_t"].flatten(0, 1), chain["x0"].flatten(0, 1)
    sigma = chain["t"].flatten().view(-1, *[1] * len(event_shape))
    weight = (sigma**2 + SD**2) / (sigma * SD) ** 2
    plain = (weight * (denoised_by_hand(D.network, x_t, sigma) - x0) ** 2).mean()
    assert abs(number(value) / number(plain) - 1) < tolerance
    assert distance(gradient(value, D), gradient(plain, D)) < tolerance
    assert loss.network_evaluations == 8 * 18


def test_without_a_weight_monte_carlo_has_the_square_of_the_coefficient() -> None:
    D, chain = denoiser(), draw()
    value = ValueLoss(D, lmbda=1.0, weight="none")(chain)["loss_value"]
    sigma = chain["t"]
    A = 1 - (chain["next", "t"] / sigma) ** 2
    x_t, x0 = chain["x_t"].flatten(0, 1), chain["x0"].flatten(0, 1)
    error = (denoised_by_hand(D.network, x_t, sigma.reshape(-1, 1)) - x0).view_as(chain["x0"])
    plain = (A**2 * error**2).mean()
    assert distance(gradient(value, D), gradient(plain, D)) < 1e-12


@pytest.mark.parametrize(
    ("process", "prediction_type"),
    [
        (DDPM(), "eps"),
        (DDPM(kind="cosine"), "v"),
        (DDPM(), "x0"),
        (VP(), "v"),
        (VP(), "velocity"),
        (Flow(), "velocity"),
        (EDM(sigma_min=0.05), "score"),
    ],
)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.float64, 1e-12)])
def test_monte_carlo_is_the_plain_loss_of_what_the_network_predicts(
    process: Schedule, prediction_type: str, dtype: torch.dtype, tolerance: float
) -> None:
    D = denoiser(process, prediction_type, dtype=dtype)
    noise = torch.randn(8, 12, 2, generator=torch.Generator().manual_seed(5), dtype=dtype)
    chain = draw(process, data(8, dtype=dtype), num_steps=12, coupling="shared", noise=noise)
    value = ValueLoss(D, lmbda=1.0)(chain)["loss_value"]

    t, x0, x_t = chain["t"].double(), chain["x0"], chain["x_t"]
    eps = noise[:, :1].expand_as(x_t)
    if isinstance(process, DDPM):
        table = process.alphas_cumprod[t.long()]
        alpha, sigma = table.sqrt(), (1 - table).sqrt()
    elif isinstance(process, VP):
        alpha = (-0.5 * (0.1 * t + 0.5 * 19.9 * t**2)).exp()
        sigma = (1 - alpha**2).sqrt()
    else:
        alpha, sigma = (1 - t, t) if isinstance(process, Flow) else (torch.ones_like(t), t)
    c_noise = t if isinstance(process, Flow) else (sigma / alpha).log() / 4
    c_in = 1 / (sigma**2 + alpha**2 * SD**2).sqrt()
    if isinstance(process, VP):
        alpha_dot = -0.5 * (0.1 + 19.9 * t) * alpha
        velocity = alpha_dot * x0 - alpha * alpha_dot / sigma * eps
    else:
        velocity = eps - x0
    wanted = {
        "eps": eps,
        "x0": x0,
        "score": -eps / sigma,
        "v": alpha * eps - sigma * x0,
        "velocity": velocity,
    }[prediction_type]
    F_x = D.network((c_in.to(dtype) * x_t).flatten(0, 1), c_noise.to(dtype).flatten()).view_as(x_t)
    plain = ((F_x - wanted.to(dtype)) ** 2).mean()
    assert distance(gradient(value, D), gradient(plain, D)) < tolerance


# Every target, one state at a time


@pytest.mark.parametrize("window", [None, 1, 2])
@pytest.mark.parametrize(("span", "stride"), [(1, 1.0), (1, 0.5), (3, 1.25)])
@pytest.mark.parametrize("value", ["posterior_mean", "clean"])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_targets_are_the_closed_forms(
    eta: float, value: str, span: int, stride: float, window: int | None
) -> None:
    spec: dict[str, Any] = {"span": span, "stride": stride, "value": value}
    D = denoiser()
    chain = draw(x0=data(2), coupling=eta, window=window, **spec)
    hidden = chain.exclude("x0")
    for target, gamma in product(TARGETS, (0.0, 0.9, 1.0)):
        loss = ValueLoss(D, gamma=gamma, **target)
        options = {"target": target, "gamma": gamma, "eta": eta, **spec}
        check(loss, chain, loss_by_hand(chain, D.network, D.network, **options))
        seen, unseen = (loss(c) for c in (chain, hidden))
        for name in ("loss_value", "td_error"):
            torch.testing.assert_close(seen[name], unseen[name], rtol=1e-11, atol=0)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("num_steps", "B"), [(1, 3), (N, 1), (1, 1)])
def test_short_chains_and_single_data(target: Target, num_steps: int, B: int) -> None:
    D = denoiser()
    whole = draw(x0=data(B))
    chain = whole[:, -num_steps:]
    check(ValueLoss(D, **target), chain, loss_by_hand(chain, D.network, D.network, target=target))


def test_one_level_is_standard_denoising() -> None:
    D, chain = denoiser(), draw(num_steps=1)
    values = [ValueLoss(D, **target)(chain)["loss_value"] for target in TARGETS]
    for value in values[1:]:
        torch.testing.assert_close(value, values[0])


def test_lambda_may_depend_on_the_step() -> None:
    D, chain = denoiser(), draw(x0=data(2), num_steps=4)
    lmbda = torch.tensor([0.3, 0.0, 1.0, 0.7], dtype=torch.float64).view(1, 4, 1)
    value = ValueLoss(D).make_value_estimator("td_lambda", lmbda=lmbda)(chain)["loss_value"]
    A = torch.cat([chain["A"], chain["next", "A"][:, -1:]], 1)
    x = torch.cat([chain["x_t"], chain["next", "x_t"][:, -1:]], 1)
    D_x = D(x[:, :-1].flatten(0, 1), chain["t"].flatten()).view_as(chain["x_t"])
    e = A[:, :-1] * (chain["x0"] - D_x)
    ahead = torch.zeros_like(e[:, 0])
    deltas = []
    for k in reversed(range(4)):
        if k < 3:
            ahead = (1 - lmbda[0, k]) * e[:, k + 1].detach() + lmbda[0, k] * ahead
        deltas.append(e[:, k] - ahead)
    c_out = chain["t"] * SD / (chain["t"] ** 2 + SD**2).sqrt()
    delta = torch.stack(deltas[::-1], 1)
    torch.testing.assert_close(value, ((delta / (chain["A"] * c_out)) ** 2).mean(), rtol=1e-12, atol=0)


def test_td_error_is_the_root_mean_square() -> None:
    D, chain = denoiser(), draw()
    result = ValueLoss(D, weight="none", lmbda=0.5)(chain)
    assert number(result["td_error"]) == pytest.approx(math.sqrt(number(result["loss_value"])), rel=1e-12)
    assert not result["td_error"].requires_grad


# What the target bootstraps from


@pytest.mark.parametrize("window", [None, 2])
@pytest.mark.parametrize("gamma", [1.0, 0.9])
@pytest.mark.parametrize("target", TARGETS)
def test_residual_gradient_passes_both_ends(target: Target, gamma: float, window: int | None) -> None:
    D, chain = denoiser(), draw(x0=data(2), window=window)
    by_hand = loss_by_hand(chain, D.network, D.network, target=target, gamma=gamma, semi_gradient=False)
    for states in (chain, chain.exclude("x0")):
        loss = ValueLoss(D, bootstrap="residual", gamma=gamma, **target)
        value = loss(states)["loss_value"]
        torch.testing.assert_close(value, by_hand, rtol=1e-11, atol=0)
        assert distance(gradient(value, D), gradient(by_hand, D)) < 1e-10
