"""Weights against the losses they were published for, number by number, and under every target."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from tensordict import TensorDict
from torch import Tensor, nn
from torchrl.objectives import SoftUpdate

from diffrl import keys
from diffrl.configs.schema import schema
from diffrl.diffusion.denoisers import Denoiser
from diffrl.diffusion.networks.mlp import MLP
from diffrl.diffusion.predictions import from_x0
from diffrl.diffusion.schedules.base import Schedule
from diffrl.diffusion.schedules.ddpm import DDPM
from diffrl.diffusion.schedules.edm import EDM
from diffrl.diffusion.schedules.flow import Flow
from diffrl.diffusion.schedules.vp import VP
from diffrl.diffusion.trajectories import sample_chain
from diffrl.objectives.registry import OBJECTIVES
from diffrl.objectives.value import ValueLoss
from diffrl.objectives.weights import WEIGHTS, ChainTerms, WeightTerms, weight_function
from tests.kit.oracles import generator, randn

PROCESSES = {
    "ddpm": DDPM(train_steps=200),
    "ddpm_cosine": DDPM(train_steps=200, kind="cosine"),
    "vp_linear": VP(),
    "vp_sigmoid": VP("sigmoid", input_scale=0.5),
}
Formula = Callable[[Tensor], Tensor]
# name, its numbers, the prediction whose squared error it was published for, and the weight on that
PUBLISHED: dict[str, tuple[str, dict[str, float], str, Formula]] = {
    "min_snr_x0": ("min_snr", {}, "x0", lambda snr: snr.clamp(max=5)),
    "min_snr_eps": ("min_snr", {}, "eps", lambda snr: snr.clamp(max=5) / snr),
    "min_snr_v": ("min_snr", {}, "v", lambda snr: snr.clamp(max=5) / (snr + 1)),
    "min_snr_1": ("min_snr", {"gamma": 1.0}, "eps", lambda snr: snr.clamp(max=1) / snr),
    "p2": ("p2", {}, "eps", lambda snr: 1 / (1 + snr)),
    "p2_half": ("p2", {"gamma": 0.5}, "eps", lambda snr: (1 + snr) ** -0.5),
    "p2_0": ("p2", {"gamma": 0.0}, "eps", torch.ones_like),
    "p2_k": ("p2", {"k": 3.0, "gamma": 2.0}, "eps", lambda snr: (3 + snr) ** -2.0),
    "debias": ("debias", {}, "eps", lambda snr: 1 / snr.sqrt()),
    "eps": ("eps", {}, "eps", torch.ones_like),
    "v": ("v", {}, "v", torch.ones_like),
    "x0": ("x0", {}, "x0", torch.ones_like),
    "snr": ("snr", {}, "x0", lambda snr: snr),
    "trunc_snr": ("trunc_snr", {}, "x0", lambda snr: snr.clamp(min=1)),
}
published = pytest.mark.parametrize(
    ("name", "options", "space", "formula"), PUBLISHED.values(), ids=PUBLISHED.keys()
)
OF_X0 = [name for name in WEIGHTS if name not in ("pairwise", "edm", "sum_sq", "sum", "none")]


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return MLP((3,), hidden=16, depth=1, x_features=8, noise_features=8).double()


def chain_of(process: Schedule, **options: Any) -> TensorDict:
    options = {"num_steps": 12, "generator": generator(1), **options}
    return sample_chain(process, randn(5, 3), **options)


def snr_of(process: Schedule, chain: TensorDict) -> Tensor:
    return process.alpha(chain["t"]) ** 2 / process.sigma(chain["t"]) ** 2


def monte_carlo(denoiser: Denoiser, **options: Any) -> ValueLoss:
    return ValueLoss(denoiser, **options).make_value_estimator("monte_carlo")


# Standard denoising


@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES.keys())
@published
def test_monte_carlo_with_a_weight_is_the_published_loss(
    process: Schedule, name: str, options: dict[str, float], space: Any, formula: Formula
) -> None:
    """The loss of a network that predicts ε, v or x0, written by hand, in values and in gradients."""
    chain = chain_of(process)
    F = network()
    denoiser = Denoiser(F, process, prediction_type=space)
    loss = monte_carlo(denoiser, weight=name, weight_options=options)(chain)["loss_value"]

    alpha, sigma = process.alpha(chain["t"]), process.sigma(chain["t"])
    x_t, x0 = chain["x_t"], chain["x0"]
    eps = (x_t - alpha * x0) / sigma
    truth = {"eps": eps, "x0": x0, "v": alpha * eps - sigma * x0}[space]
    c_in = 1 / (sigma**2 + (alpha * denoiser.sigma_data) ** 2).sqrt()
    c_noise = process.c_noise(chain["t"]).flatten()
    predicted = F((c_in * x_t).flatten(0, 1), c_noise, None).view_as(x_t)
    by_hand = (formula(alpha**2 / sigma**2) * (truth - predicted) ** 2).mean()
    torch.testing.assert_close(loss, by_hand, rtol=1e-8, atol=0)

    ours, theirs = (torch.autograd.grad(y, list(F.parameters())) for y in (loss, by_hand))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("process", [EDM(), Flow()], ids=["edm", "flow"])
@published
def test_the_weight_on_x0_holds_in_every_process(
    process: Schedule, name: str, options: dict[str, float], space: str, formula: Formula
) -> None:
    """‖ε - ε̂‖² = SNR ‖x0 - D‖² and ‖v - v̂‖² = (SNR + 1) ‖x0 - D‖² turn each into a weight on x0."""
    chain = chain_of(process)[:, 1:]  # without pure noise
    denoiser = Denoiser(network(), process)
    monte_carlo(denoiser, weight=name, weight_options=options)(chain)
    snr = snr_of(process, chain)
    factor = {"eps": snr, "v": snr + 1, "x0": 1.0}[space]
    D_x = denoiser(chain["x_t"].flatten(0, 1), chain["t"].flatten()).view_as(chain["x_t"])
    square = (D_x - chain["x0"]).square().mean(-1, keepdim=True)
    torch.testing.assert_close(chain[keys.LOSS], formula(snr) * factor * square, rtol=1e-9, atol=0)


def test_float32_is_close_to_the_published_loss() -> None:
    process = DDPM()
    x0 = randn(64, 3).float()
    chain = sample_chain(process, x0, num_steps=1000, window=1, generator=generator())
    denoiser = Denoiser(network().float(), process, prediction_type="eps")
    loss = monte_carlo(denoiser, weight="min_snr")(chain)["loss_value"]
    double = Denoiser(network(), process, prediction_type="eps")
    D_x = double(chain["x_t"].double().flatten(0, 1), chain["t"].double().flatten())
    t = chain["t"].double()
    weight = snr_of(process, chain.double()).clamp(max=5)
    by_hand = (weight * (D_x.view_as(chain["x0"]) - chain["x0"].double()) ** 2).mean()
    assert float(loss.detach()) == pytest.approx(float(by_hand.detach()), rel=1e-4)
    assert t.unique().numel() > 32  # levels all over the grid


def test_flow_matching_is_iterative_alpha_deblending() -> None:
    """Σ |d(x_a, a) - (x1 - x_noise)|², x_a = (1-a) x_noise + a x1, is Monte Carlo on velocities, a = 1-t."""
    process, F = Flow(), network()
    chain = chain_of(process)
    loss = monte_carlo(Denoiser(F, process, prediction_type="velocity", time_input="t"), weight="edm")
    loss(chain)

    x1, a = chain["x0"], 1 - chain["t"]
    x_noise = (chain["x_t"] - a * x1) / (1 - a)
    torch.testing.assert_close(chain["x_t"], (1 - a) * x_noise + a * x1)
    c_in = ((1 - a) ** 2 + (0.5 * a) ** 2).rsqrt()  # what the network is fed with
    d = -F((c_in * chain["x_t"]).flatten(0, 1), 1 - a.flatten(), None).view_as(x1)
    iadb = (d - (x1 - x_noise)).square().sum(-1, keepdim=True)
    torch.testing.assert_close(chain[keys.LOSS] * 3, iadb, rtol=1e-9, atol=0)


def test_edm_is_the_plain_loss_of_any_prediction() -> None:
    for process, space in ((EDM(), "edm"), (VP(), "v"), (VP("cosine"), "eps"), (Flow(), "velocity")):
        chain = chain_of(process)
        denoiser = Denoiser(network(), process, prediction_type=space)
        monte_carlo(denoiser, weight="edm")(chain)
        x_t, t = chain["x_t"], chain["t"]
        D_x = denoiser(x_t.flatten(0, 1), t.flatten()).view_as(x_t)
        F_x, truth = (from_x0(process, x, x_t, t, space, sigma_data=0.5) for x in (D_x, chain["x0"]))
        plain = (F_x - truth).square().mean(-1, keepdim=True)
        torch.testing.assert_close(chain[keys.LOSS], plain, rtol=1e-7, atol=0)


# Every target


TARGETS: dict[str, dict[str, Any]] = {
    "td0": {"n_steps": 1},
    "lambda": {"lmbda": 0.5},
    "n_step": {"n_steps": 3},
    "target": {"bootstrap": "target"},
    "residual": {"bootstrap": "residual"},
    "discount": {"lmbda": 0.9, "gamma": 0.9},
}


@pytest.mark.parametrize("options", TARGETS.values(), ids=TARGETS.keys())
@pytest.mark.parametrize("value", ["posterior_mean", "clean"])
@pytest.mark.parametrize("name", OF_X0)
def test_the_squared_td_error_is_weighted_by_that_on_x0_over_a_squared(
    name: str, value: str, options: dict[str, Any]
) -> None:
    process = VP()
    denoiser = Denoiser(network(), process)
    chain, plain = chain_of(process, value=value), chain_of(process, value=value)
    for weight, states in ((name, chain), ("none", plain)):
        loss = ValueLoss(denoiser, weight=weight, **options)
        if loss.bootstrap == "target":
            SoftUpdate(loss, tau=0.01)
        loss(states)
    _, _, space, formula = PUBLISHED[name if name in PUBLISHED else f"{name}_eps"]
    snr = snr_of(process, chain)
    w_x0 = formula(snr) * {"eps": snr, "v": snr + 1, "x0": 1.0}[space]
    torch.testing.assert_close(chain[keys.LOSS], w_x0 / chain["A"] ** 2 * plain[keys.LOSS])


# Where formulas end


@pytest.mark.parametrize("name", OF_X0)
def test_pure_noise_is_trained_with_weight_one_on_x0(name: str) -> None:
    process = Flow()
    chain = chain_of(process)[:, :1]
    assert float(process.alpha(chain["t"]).abs().max()) == 0
    denoiser = Denoiser(network(), process)
    loss = monte_carlo(denoiser, weight=name)
    loss(chain)["loss_value"].backward()
    D_x = denoiser(chain["x_t"].flatten(0, 1), chain["t"].flatten()).view_as(chain["x_t"])
    square = (D_x - chain["x0"]).square().mean(-1, keepdim=True)
    torch.testing.assert_close(chain[keys.LOSS], square)
    assert all(bool(torch.isfinite(p.grad).all()) for p in denoiser.parameters())


@pytest.mark.parametrize("name", OF_X0)
@pytest.mark.parametrize("A", [0.0, 1e-7, 1e-6])
def test_a_value_that_hardly_depends_on_the_denoiser_has_a_bounded_weight(name: str, A: float) -> None:
    one = torch.ones(1, 1, dtype=torch.float64)
    w = weight_function(name)
    at_A = w(WeightTerms(A * one, one, one, one, 4 * one))
    at_1 = w(WeightTerms(one, one, one, one, 4 * one))
    torch.testing.assert_close(at_A, at_1 * 1e12)


@pytest.mark.parametrize("name", OF_X0)
def test_a_state_without_noise_to_speak_of_has_a_finite_weight(name: str) -> None:
    one = torch.ones(1, 1)
    assert math.isfinite(float(weight_function(name)(WeightTerms(one, one, one, one, 1e12 * one))))


# Names and numbers


def test_an_unknown_name_or_number_is_named() -> None:
    with pytest.raises(ValueError, match="weight is 'snrr': give one of pairwise, edm"):
        weight_function("snrr")
    with pytest.raises(ValueError, match="'p2' has no number 'g': it has gamma, k"):
        weight_function("p2", {"g": 1.0})
    with pytest.raises(ValueError, match="'edm' has no number 'gamma': it has none"):
        ValueLoss(Denoiser(network(), EDM()), weight="edm", weight_options={"gamma": 1.0})


@pytest.mark.parametrize(
    "objective", ["td", "td_lambda_schedule", "monte_carlo", "edm", "denoising", "td_edm"]
)
def test_a_config_gives_a_weight_its_numbers(objective: str) -> None:
    make = OBJECTIVES[objective]
    node = OmegaConf.structured(schema(objective, make, omit=("denoiser",)))
    given = {"weight": "p2", "weight_options": {"gamma": 0.5}}
    config: Any = OmegaConf.to_container(OmegaConf.merge(node, given))
    assert config["weight_options"] == {"gamma": 0.5} and config.pop("name") == objective
    if objective == "td":
        config["lmbda"] = 0.5
    denoiser = Denoiser(network(), EDM())
    one = torch.ones(1, 1)
    weight = make(denoiser, **config)._weight(WeightTerms(one, one, one, one, 3 * one))
    assert float(weight) == pytest.approx(3 * 4**-0.5)


@pytest.mark.parametrize(
    ("coupling", "N", "states"), [("markov", 500, 0), ("markov", 1000, 1), ("shared", 1000, 35)]
)
def test_where_the_floor_of_weight_edm_binds(coupling: str, N: int, states: int) -> None:
    """Elsewhere it makes the loss of standard denoising the plain squared error of F."""
    chain = sample_chain(EDM(), torch.zeros(1, 1).double(), num_steps=N, coupling=coupling)
    D = Denoiser(network(), EDM())
    terms = ChainTerms(chain, D)
    plain = weight_function("edm")(terms) * (terms.A * terms.c_out) ** 2
    less = plain < 1 - 1e-9
    assert int(less.sum()) == states and bool((chain["t"][less] < 0.005).all())
    torch.testing.assert_close(plain[~less], torch.ones_like(plain[~less]), rtol=1e-9, atol=0)
