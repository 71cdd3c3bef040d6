"""Diagnostics of targets: closed forms on a Gaussian, no bias with the oracle, known gradients."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diffrl.diffusion.chains import Chain
from diffrl.diffusion.denoisers import Denoiser
from diffrl.diffusion.exact import EmpiricalDenoiser, GaussianDenoiser, MixtureDenoiser
from diffrl.diffusion.networks.mlp import MLP
from diffrl.diffusion.posterior import marginal, posterior
from diffrl.diffusion.predictions import scalings
from diffrl.diffusion.schedules.base import Schedule
from diffrl.diffusion.schedules.ddpm import DDPM
from diffrl.diffusion.schedules.edm import EDM
from diffrl.diffusion.schedules.flow import Flow
from diffrl.diffusion.schedules.vp import VP
from diffrl.diffusion.trajectories import sample_chain
from diffrl.experiments.reports.target_figure import draw_target_errors
from diffrl.metrics.diagnostics import gradient_variance, target_errors
from diffrl.objectives.value import ValueLoss
from tests.kit.oracles import generator, randn

EVEN = EDM(sigma_min=0.1, sigma_max=10.0, rho=3.0)


def standard_normal(process: Schedule, D: int = 1) -> GaussianDenoiser:
    return GaussianDenoiser(process, torch.zeros(D), torch.eye(D))


def three_clusters(process: Schedule) -> MixtureDenoiser:
    means = torch.tensor([[-1.0, 0.5], [0.2, -0.8], [1.1, 0.6]])
    return MixtureDenoiser(process, means, torch.tensor([0.1, 0.3, 0.05]), torch.tensor([0.3, 0.5, 0.2]))


def draws_of(oracle: MixtureDenoiser, n: int, seed: int = 0) -> Tensor:
    c = torch.multinomial(oracle.log_weights.exp(), n, replacement=True, generator=generator(seed))
    return oracle.means[c] + oracle.stds[c, None] * randn(n, 2, seed=seed + 1)


# Draws of x0 | x_t


@pytest.mark.parametrize("process", [EDM(), VP(), Flow(), DDPM()], ids=lambda p: type(p).__name__)
def test_posterior_draws_have_the_exact_mean(process: Schedule) -> None:
    M = 20_000
    for oracle in (
        three_clusters(process),
        EmpiricalDenoiser(process, randn(7, 2, seed=5)),
        GaussianDenoiser(process, torch.tensor([0.3, -0.2]), torch.tensor([[1.0, 0.6], [0.6, 0.5]])),
    ):
        t = process.time_grid(6)[1:6:2]
        x_t = marginal(process, randn(3, 2), t, randn(3, 2, seed=1))
        x0 = oracle.sample_posterior(x_t, t, M, generator())
        assert x0.shape == (3, M, 2)
        error = x0.std(1) / math.sqrt(M)
        assert bool(((x0.mean(1) - oracle(x_t, t)).abs() < 5 * error + 1e-9).all())


def test_posterior_draws_have_the_exact_law() -> None:
    """Joint law from both sides: x0 then x_t, or x_t then x0 | x_t, have the same moments, 3rd order too."""
    oracle, M = three_clusters(EVEN), 100_000
    t = torch.full((M,), 0.4, dtype=torch.float64)
    x0 = draws_of(oracle, M)
    x_t = marginal(EVEN, x0, t, randn(M, 2, seed=3))
    again = oracle.sample_posterior(x_t, t, 1, generator(4)).squeeze(1)
    for moment in (
        lambda x: x,
        lambda x: x[:, :1] * x_t,
        lambda x: x**2,
        lambda x: x[:, :1] ** 2 * x_t,
        lambda x: x**2 * x_t**2,
    ):
        difference = moment(again) - moment(x0)
        assert bool((difference.mean(0).abs() < 5 * difference.std(0) / math.sqrt(M)).all())


def test_posterior_of_correlated_gaussian_has_the_exact_covariance() -> None:
    C = torch.tensor([[1.0, 0.6], [0.6, 0.5]], dtype=torch.float64)
    t, M = torch.tensor([0.7], dtype=torch.float64), 200_000
    x0 = GaussianDenoiser(EVEN, torch.zeros(2), C).sample_posterior(randn(1, 2), t, M, generator())
    expected = torch.linalg.inv(torch.linalg.inv(C) + torch.eye(2) / 0.49)  # precisions add
    torch.testing.assert_close(x0[0].T.cov(), expected, atol=5e-3, rtol=0)


# Closed forms on N(0, 1)


def coefficients(N: int, coupling: str, value: str = "posterior_mean") -> tuple[Chain, Tensor]:
    chain = Chain(EVEN, N, coupling, value=value)
    A = chain.value_coefficients[0]
    c_out = scalings(EVEN, chain.t[:-1], "edm", 1.0).c_out
    return chain, (A[:-1] * c_out) ** 2


@pytest.mark.parametrize("value", ["posterior_mean", "clean"])
def test_variances_are_those_of_the_formulas(value: str) -> None:
    """TD(0): A² Var(D'|x_t) + (A - A')² E Var(x0|x_t'); Monte Carlo: A² (Var(D'|x_t) + E Var(x0|x_t'))."""
    N, S, M = 6, 150, 400
    exact = standard_normal(EVEN)
    errors = target_errors(
        exact,
        exact,
        randn(S, 1),
        EVEN,
        num_steps=N,
        sigma_data=1.0,
        draws=M,
        generator=generator(1),
        value=value,
    )
    chain, unit = coefficients(N, "markov", value)
    A = chain.value_coefficients[0]
    for i, level in enumerate(errors["levels"][:-1]):
        t, s = float(chain.t[i]), float(chain.t[i + 1])
        step = posterior(EVEN, chain.t[i], chain.t[i + 1], 1.0)
        rest_t, rest_s = t**2 / (1 + t**2), s**2 / (1 + s**2)  # Var(x0 | x)
        spread = (float(step.A) ** 2 * rest_t + float(step.std) ** 2) / (1 + s**2) ** 2  # Var(D' | x_t)
        assert spread + rest_s == pytest.approx(rest_t, rel=1e-9)  # the law of total variance
        a, a_next = float(A[i]), float(A[i + 1])
        td0 = (a**2 * spread + (a - a_next) ** 2 * rest_s) / float(unit[i])
        monte_carlo = a**2 * rest_t / float(unit[i])
        tolerance = 6 * math.sqrt(2 / (S * M))  # a variance of S·M draws
        for name, expected in (
            ("lmbda=0", td0),
            ("n_steps=1", td0),
            ("monte_carlo", monte_carlo),
            ("lmbda=1", monte_carlo),
        ):
            assert level["targets"][name]["variance"] == pytest.approx(expected, rel=tolerance)
        best = min(level["targets"].values(), key=lambda target: target["total"])
        if 0 < a_next < 2 * a:
            assert td0 < monte_carlo and level["best_lmbda"] < 1
            assert best["total"] <= level["targets"]["lmbda=0"]["total"]


@pytest.mark.parametrize(
    ("process", "chain"),
    [
        (EVEN, {"num_steps": 5}),
        (EVEN, {"num_steps": 5, "value": "clean"}),
        (EDM(), {"num_steps": 12, "span": 3, "stride": 0.2}),
        (VP(), {"num_steps": 5}),
        (Flow(), {"num_steps": 5}),
        (DDPM(), {"num_steps": 5}),
    ],
    ids=["edm", "clean", "released", "vp", "flow", "ddpm"],
)
def test_no_bias_with_the_oracle_under_markov_coupling(process: Schedule, chain: dict[str, Any]) -> None:
    exact = three_clusters(process)
    errors = target_errors(
        exact, exact, draws_of(exact, 100), process, draws=200, generator=generator(), **chain
    )
    for level in errors["levels"]:
        assert level["value_error"] == pytest.approx(0, abs=1e-20)
        assert abs(level["bellman_residual"]) < 5 * level["bellman_residual_error"] + 1e-12
        for name, target in level["targets"].items():
            assert abs(target["bias_sq"]) < 5 * target["bias_sq_error"] + 1e-12, name
            assert target["total"] == pytest.approx(target["bias_sq"] + target["variance"])


def test_bias_under_shared_noise_is_the_closed_form() -> None:
    """Slope of E[x0 - D*(x_s) | x_t]: 1/(1+σ_t²) - (1+σ_tσ_s)/((1+σ_t²)(1+σ_s²)); Monte Carlo has no bias."""
    N, S, M = 5, 400, 100
    exact = standard_normal(EVEN)
    errors = target_errors(
        exact,
        exact,
        randn(S, 1),
        EVEN,
        num_steps=N,
        coupling="shared",
        sigma_data=1.0,
        draws=M,
        generator=generator(),
    )
    chain, unit = coefficients(N, "shared")
    A = chain.value_coefficients[0]
    told = 0
    for i, level in enumerate(errors["levels"][:-1]):
        t, s = float(chain.t[i]), float(chain.t[i + 1])
        slope = 1 / (1 + t**2) - (1 + t * s) / ((1 + t**2) * (1 + s**2))
        expected = float(A[i + 1]) ** 2 * slope**2 * (1 + t**2) / float(unit[i])
        td0, monte_carlo = level["targets"]["lmbda=0"], level["targets"]["monte_carlo"]
        assert td0["bias_sq"] == pytest.approx(expected, abs=5 * td0["bias_sq_error"])
        told += td0["bias_sq"] > 5 * td0["bias_sq_error"]
        assert abs(monte_carlo["bias_sq"]) < 5 * monte_carlo["bias_sq_error"]
        assert abs(level["bellman_residual"] - td0["bias_sq"]) < 1e-9 + 1e-6 * td0["bias_sq"]  # V = V*
    assert told >= 3  # the test can tell it from none


def test_a_wrong_denoiser_biases_what_bootstraps_from_it() -> None:
    """D = D* + h everywhere: TD(0)'s mean is off by A' h, Monte Carlo's not at all, the value by A h."""
    N, h = 5, 0.3
    exact = standard_normal(EVEN)
    errors = target_errors(
        lambda x, t, c: exact(x, t) + h,
        exact,
        randn(100, 1),
        EVEN,
        num_steps=N,
        sigma_data=1.0,
        draws=200,
        lmbdas=(0.0, 0.5, 1.0),
        generator=generator(),
    )
    chain, unit = coefficients(N, "markov")
    A = chain.value_coefficients[0]
    for i, level in enumerate(errors["levels"]):
        targets = level["targets"]
        assert level["value_error"] == pytest.approx(float(A[i] ** 2 / unit[i]) * h**2, rel=1e-9)
        td0 = targets["lmbda=0"]
        assert td0["bias_sq"] == pytest.approx(
            float(A[i + 1] ** 2 / unit[i]) * h**2, abs=5 * td0["bias_sq_error"]
        )
        assert abs(targets["monte_carlo"]["bias_sq"]) < 5 * targets["monte_carlo"]["bias_sq_error"] + 1e-12
        residual = (float(A[i + 1]) - float(A[i])) ** 2 * h**2 / float(unit[i])
        assert level["bellman_residual"] == pytest.approx(
            residual, abs=5 * level["bellman_residual_error"] + 1e-12
        )
        mixed = 0.5 * sum(0.5**n * float(A[i + 1 + n]) for n in range(N - i))  # (1-λ) Σ λ^{n-1} A_{i+n} h
        middle = targets["lmbda=0.5"]
        assert middle["bias_sq"] == pytest.approx(
            mixed**2 * h**2 / float(unit[i]), abs=5 * middle["bias_sq_error"] + 1e-12
        )


def test_states_and_their_parts_are_summed_in_any_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bounded memory changes the random numbers, not the answer."""
    exact = three_clusters(EVEN)
    options = {"num_steps": 4, "draws": 50, "lmbdas": (0.0, 1.0), "n_steps": (2,)}
    whole = target_errors(exact, exact, draws_of(exact, 60), EVEN, generator=generator(), **options)
    monkeypatch.setattr("diffrl.metrics.diagnostics.NUMBERS", 3000)
    parts = target_errors(exact, exact, draws_of(exact, 60), EVEN, generator=generator(), **options)
    for a, b in zip(whole["levels"], parts["levels"], strict=True):
        for name in a["targets"]:
            assert a["targets"][name]["variance"] == pytest.approx(b["targets"][name]["variance"], rel=0.3)
    assert whole != parts


def test_images_float32_networks_and_json() -> None:
    points = 0.5 * randn(20, 1, 4, 4).float()
    network = Denoiser(MLP((1, 4, 4), hidden=8, depth=1), EDM()).eval()
    seen = []

    def denoiser(x: Tensor, t: Tensor, cond: Tensor | None) -> Tensor:
        seen.append((x.dtype, t.dtype, x.shape[1:]))
        return network(x, t, cond)

    oracle = EmpiricalDenoiser(EDM(), points)
    errors = target_errors(denoiser, oracle, points[:6], EDM(), num_steps=4, draws=3, generator=generator())
    assert set(seen) == {(torch.float32, torch.float32, torch.Size([1, 4, 4]))}
    assert json.loads(json.dumps(errors)) == errors
    assert [level["index"] for level in errors["levels"]] == [0, 1, 2, 3]
    assert (errors["states"], errors["draws"]) == (6, 3)
    names = {f"lmbda={v:g}" for v in (0, 0.25, 0.5, 0.75, 0.9, 0.95, 1)} | {
        f"n_steps={n}" for n in (1, 2, 4, 8)
    }
    assert set(errors["levels"][0]["targets"]) == names | {"monte_carlo"}


def test_discount_biases_the_target() -> None:
    """γ < 1 has another fixed point, so Monte Carlo too is biased; γ = 1 is not."""
    exact = standard_normal(EVEN)
    for gamma, biased in ((1.0, False), (0.5, True)):
        level = target_errors(
            exact, exact, randn(100, 1), EVEN, num_steps=4, gamma=gamma, draws=100, generator=generator()
        )["levels"][1]["targets"]["monte_carlo"]
        assert (level["bias_sq"] > 5 * level["bias_sq_error"]) == biased


@pytest.mark.parametrize(
    ("options", "message"),
    [({"draws": 1}, "draws is 1"), ({"lmbdas": ()}, "lmbdas is empty"), ({"n_steps": (0,)}, "n_steps is 0")],
)
def test_a_bad_argument_is_named(options: dict[str, Any], message: str) -> None:
    exact = standard_normal(EVEN)
    with pytest.raises(ValueError, match=message):
        target_errors(exact, exact, randn(3, 1), EVEN, num_steps=3, **options)


# Gradients


class Constant(nn.Module):
    """D = θ: the gradient of a squared error is known."""

    def __init__(self) -> None:
        super().__init__()
        self.theta, self.unused = nn.Parameter(torch.tensor([0.4])), nn.Parameter(torch.zeros(3))

    def forward(self, x: Tensor, c_noise: Tensor, cond: Tensor | None) -> Tensor:
        return self.theta.expand_as(x)


def test_gradient_variance_of_a_mean_of_draws() -> None:
    """Loss (θ - x0)² of B data ~ N(0, 1): g = 2 (θ - mean), variance 4/B, mean 2θ."""
    B, batches = 8, 600
    denoiser = Denoiser(Constant(), EDM(), prediction_type="x0")
    loss = ValueLoss(denoiser, lmbda=1.0, weight="none")

    def draw(g: torch.Generator) -> Any:  # noqa: ANN401
        x0 = torch.randn(B, 1, generator=g)
        return sample_chain(EDM(), x0, num_steps=1, value="clean", generator=g)

    found = gradient_variance({"monte_carlo": loss}, draw, batches=batches)["monte_carlo"]
    assert found["variance"] == pytest.approx(4 / B, rel=6 * math.sqrt(2 / batches))
    error = math.sqrt(4 * 0.64 * 0.5 / batches)  # of a mean squared
    assert found["mean_sq"] == pytest.approx(4 * 0.4**2, abs=5 * error)
    assert found["relative"] == pytest.approx(found["variance"] / found["mean_sq"])
    assert all(p.grad is None for p in denoiser.parameters())


def test_bootstrapping_makes_gradients_less_noisy() -> None:
    """Same batches for all; twice the same loss is the same number."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        denoiser = Denoiser(MLP((2,), hidden=16, depth=1), EVEN)
    exact = three_clusters(EVEN)

    def draw(g: torch.Generator) -> Any:  # noqa: ANN401
        c = torch.multinomial(exact.log_weights.exp(), 16, replacement=True, generator=g)
        x0 = exact.means[c] + exact.stds[c, None] * torch.randn(16, 2, generator=g)
        return sample_chain(EVEN, x0.float(), num_steps=10, generator=g)

    losses = {
        "td": ValueLoss(denoiser, lmbda=0.0),
        "monte_carlo": ValueLoss(denoiser, lmbda=1.0),
        "again": ValueLoss(denoiser, lmbda=1.0),
    }
    found = gradient_variance(losses, draw, batches=60)
    assert found["monte_carlo"] == found["again"]
    assert found["td"]["variance"] < found["monte_carlo"]["variance"]
    with pytest.raises(ValueError, match="batches is 1"):
        gradient_variance(losses, draw, batches=1)


# Figure


def test_figure(tmp_path: Path) -> None:
    exact = standard_normal(Flow())
    errors = target_errors(exact, exact, randn(20, 1), Flow(), num_steps=4, draws=8, generator=generator())
    assert math.isinf(
        errors["levels"][0]["sigma"]
    )  # a flow begins with pure noise, which has no place in the figure
    png = draw_target_errors(errors, tmp_path / "deep" / "targets", title="exact")
    assert png.stat().st_size > 10_000 and png.with_suffix(".pdf").exists()
    with pytest.raises(KeyError, match="no target lmbda=0.3"):
        draw_target_errors(errors, tmp_path / "x", targets=("lmbda=0.3",))
