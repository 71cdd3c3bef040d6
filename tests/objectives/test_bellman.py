"""The Bellman oracle: schedule, process, chain, flags, denoiser and returns have to fit for it to hold.

Bootstrapped from the exact denoiser along a Markov chain, every target has the exact value as its conditional
mean. With shared noise it has not, by a known amount, and TD(0) on the 'clean' value learns the ODE's flow
map.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor, nn

from diffrl.diffusion.chains import Chain
from diffrl.diffusion.exact import GaussianDenoiser, MixtureDenoiser
from diffrl.diffusion.schedules.base import Schedule
from diffrl.diffusion.schedules.edm import EDM
from diffrl.diffusion.trajectories import sample_chain
from diffrl.rl.returns import lambda_returns, monte_carlo_returns, n_step_returns
from tests.kit.oracles import CONTINUOUS, DISCRETE, Estimate, assert_within, fit_line, generator, randn

EVEN = CONTINUOUS["edm_even"]
# levels, process and value of K = 6 transitions each
CHAINS: dict[str, tuple[Schedule, dict[str, Any]]] = {
    "edm": (EVEN, {"num_steps": 6}),
    "edm-as-released": (EDM(), {"num_steps": 18, "span": 3, "stride": 0.2}),
    "edm-clean": (EDM(), {"num_steps": 6, "value": "clean"}),
    "vp": (CONTINUOUS["vp_linear"], {"num_steps": 12, "span": 2, "stride": 0.5}),
    "flow-from-pure-noise": (CONTINUOUS["flow"], {"num_steps": 6}),
    "ddpm": (DISCRETE["ddpm_linear"], {"num_steps": 11, "span": 2, "stride": 3.0}),
}
chains = pytest.mark.parametrize(("process", "chain"), CHAINS.values(), ids=CHAINS.keys())


def values(rows: TensorDict, denoiser: nn.Module) -> Tensor:
    """V* = A D* + κ x, shape [B, K, D]."""
    x, A, kappa = rows["x_t"], rows["A"], rows["kappa"]
    return A * denoiser(x.flatten(0, 1), rows["t"].flatten(), None).view_as(x) + kappa * x


def targets(chain: TensorDict, denoiser: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every target, bootstrapped from the exact denoiser."""
    reached, K = chain["next"], chain.shape[1]
    arguments = (reached["reward"], values(reached, denoiser), reached["terminated"], reached["done"])
    for lmbda in (0.0, 0.5, 1.0):
        yield f"lmbda={lmbda}", lambda_returns(*arguments, lmbda=lmbda)
    for n in (1, 3, K):
        yield f"n_steps={n}", n_step_returns(*arguments, n_steps=n)
    yield "monte_carlo", monte_carlo_returns(*arguments)


@chains
@pytest.mark.parametrize("window", [None, 4])
def test_targets_on_gaussian_data_have_the_exact_value_as_mean(
    process: Schedule, chain: dict[str, Any], window: int | None
) -> None:
    mean, std, M = 0.4, 0.6, 100_000
    exact = GaussianDenoiser(process, torch.tensor([mean]), torch.tensor([[std**2]]))
    rows = sample_chain(
        process, mean + std * randn(M, 1), coupling="markov", window=window, generator=generator(1), **chain
    )
    V, x = values(rows, exact), rows["x_t"]
    for name, G in targets(rows, exact):
        assert bool(torch.isfinite(G).all()), name
        for level in rows["index"].unique():
            here = (rows["index"] == level).squeeze(-1)  # windows start anywhere
            line = fit_line(x[here], (G - V)[here])
            assert_within(line.level, 0.0)
            assert_within(line.slope, 0.0)


@pytest.mark.parametrize("D", [1, 2])
@chains
def test_targets_on_a_mixture_have_the_exact_value_as_mean(
    process: Schedule, chain: dict[str, Any], D: int
) -> None:
    """By bins of the first coordinate, as the posterior mean bends."""
    M, bins = 100_000, 12
    means, stds = torch.tensor([[-1.0, 0.5], [0.2, -0.8], [1.1, 0.6]])[:, :D], torch.tensor([0.1, 0.3, 0.05])
    weights = torch.tensor([0.3, 0.5, 0.2])
    c = torch.multinomial(weights, M, replacement=True, generator=generator(2))
    x0 = (means[c] + stds[c, None] * randn(M, D)).double()
    exact = MixtureDenoiser(process, means, stds, weights)
    rows = sample_chain(process, x0, coupling="markov", generator=generator(3), **chain)
    V, order = values(rows, exact), rows["x_t"][..., 0].argsort(dim=0)
    for _, G in targets(rows, exact):
        for k in range(rows.shape[1]):
            error = (G - V)[order[:, k], k][: M // bins * bins].view(bins, -1, D)
            assert_within(Estimate(error.mean(1), error.std(1) / error.shape[1] ** 0.5), 0.0)


def pair_slope(sigma_t: Tensor, sigma_s: Tensor, rho: Tensor | float) -> Tensor:
    """Slope on x_t of E[x0 - D*(x_s) | x_t] for x0 ~ N(0, 1), α = 1, and noises that correlate by ρ."""
    v, w = 1 + sigma_t**2, 1 + sigma_s**2
    return 1 / v - (1 + rho * sigma_t * sigma_s) / (v * w)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_what_the_coupling_adds_to_a_bootstrapped_target(eta: float) -> None:
    """TD(0)'s bias: the closed form of shared noise, zero for a Markov chain, and what lies between."""
    exact = GaussianDenoiser(EVEN, torch.zeros(1), torch.eye(1))
    rows = sample_chain(EVEN, randn(400_000, 1), num_steps=5, coupling=eta, generator=generator(4))
    x, x_s, t, s = (
        c.squeeze(-1)[:, :-1] for c in (rows["x_t"], rows["next", "x_t"], rows["t"], rows["next", "t"])
    )
    D_s = exact(x_s.reshape(-1, 1), s.reshape(-1), None).view_as(x)
    line = fit_line(x, rows["x0"].squeeze(-1)[:, :-1] - D_s)
    t, s = t[0], s[0]
    expected = pair_slope(t, s, (1 - eta**2 + (eta * s / t) ** 2).sqrt())
    assert_within(line.slope, expected)
    if eta == 0:
        torch.testing.assert_close(
            expected, 1 / (1 + t**2) - (1 + t * s) / ((1 + t**2) * (1 + s**2)), rtol=0, atol=1e-12
        )
        assert bool((line.slope.value.abs() > 20 * line.slope.error).all())
    if eta == 1:
        torch.testing.assert_close(expected, torch.zeros(4).double(), rtol=0, atol=1e-12)


def test_variance_that_bootstrapping_saves() -> None:
    """TD(0): A² Var(D'|x_t) + (A-A')² E Var(x0|x_t'); Monte Carlo: A² [Var(D'|x_t) + E Var(x0|x_t')]."""
    M = 200_000
    exact = GaussianDenoiser(EVEN, torch.zeros(1), torch.eye(1))
    rows = sample_chain(EVEN, randn(M, 1), num_steps=6, coupling="markov", generator=generator(5))
    V = values(rows, exact)
    measured = {name: (G - V)[:, :-1].var(0).flatten() for name, G in targets(rows, exact)}
    t, s, A, A_next = (
        c[0, :-1].flatten() for c in (rows["t"], rows["next", "t"], rows["A"], rows["next", "A"])
    )
    left = s**2 / (1 + s**2)  # E Var(x0 | x_t')
    seen = t**2 / (1 + t**2) - left  # Var(D' | x_t), as the two make up Var(x0 | x_t)
    expected = {
        "lmbda=0.0": A**2 * seen + (A - A_next) ** 2 * left,
        "monte_carlo": A**2 * (seen + left),
    }
    for name, variance in expected.items():
        torch.testing.assert_close(measured[name], variance, rtol=5 * (2 / M) ** 0.5, atol=0)
    pays = (A_next > 0) & (A_next < 2 * A)
    assert torch.equal(measured["lmbda=0.0"] < measured["monte_carlo"], pays)


# TD(0)'s fixed point on the 'clean' value, x0 ~ N(0, 1): D_i(x) = b_i x with b_i regressed on b_{i+1}


def fixed_point(num_steps: int, coupling: str, value: str = "clean") -> Tensor:
    """Slopes b_i of the linear fixed point: A_i E[x0 - b_i x_i|x_i] = A_{i+1} E[x0 - b_{i+1} x_{i+1}|x_i]."""
    chain = Chain(EDM(), num_steps, coupling, value=value)
    sigma, rho, A = (c.tolist() for c in (chain.t, chain.noise_mixing[0], chain.value_coefficients[0]))
    b = [1 / (1 + sigma[-2] ** 2)]  # the last target is x0 itself
    for i in reversed(range(num_steps - 1)):
        v = 1 + sigma[i] ** 2
        error = 1 / v - b[0] * (1 + rho[i + 1] * sigma[i] * sigma[i + 1]) / v
        b.insert(0, 1 / v - A[i + 1] / A[i] * error)
    return torch.tensor(b, dtype=torch.float64)


@pytest.mark.parametrize(("num_steps", "slope"), [(18, 0.01074), (180, 0.01232), (18_000, 0.01250)])
def test_shared_noise_learns_the_flow_map(num_steps: int, slope: float) -> None:
    b = fixed_point(num_steps, "shared")
    assert float(b[0]) == pytest.approx(slope, abs=5e-6)
    flow_map = (1 + EDM().time_grid(num_steps)[:-1] ** 2).rsqrt()
    assert float((b / flow_map - 1).abs().max()) < 2.7 / num_steps


def test_markov_noise_learns_the_posterior_mean() -> None:
    for value in ("clean", "posterior_mean"):
        b = fixed_point(180, "markov", value)
        torch.testing.assert_close(b, 1 / (1 + EDM().time_grid(180)[:-1] ** 2), rtol=1e-9, atol=0)


def test_the_posterior_mean_value_does_not_learn_the_flow_map() -> None:
    """Its A vanishes with the step, so what shared noise adds stays at the level of one step."""
    flow_map, posterior_mean = 1 / (1 + 80.0**2) ** 0.5, 1 / (1 + 80.0**2)
    learned = float(fixed_point(18_000, "shared", "posterior_mean")[0])
    assert abs(learned / flow_map - 1) > 0.2 and abs(learned / posterior_mean - 1) > 0.2


def test_drawn_chains_have_the_same_fixed_point() -> None:
    """Least squares on TD(0) targets, level by level from the end: slopes, not formulas."""
    M, K = 100_000, 18
    x0 = randn(M, 1)
    for coupling in ("shared", "markov"):
        rows = sample_chain(EDM(), x0, num_steps=K, coupling=coupling, value="clean", generator=generator(6))
        exact, b, error = fixed_point(K, coupling), torch.zeros(()), torch.zeros(())
        for k in reversed(range(K)):
            row = rows[:, k : k + 1]
            reached = row["next"]
            G = n_step_returns(
                reached["reward"], b * reached["x_t"], reached["terminated"], reached["done"], n_steps=1
            )
            slope = fit_line(row["x_t"].flatten(), G.flatten()).slope
            # the error of the next level's slope is handed on by the slope of x_{k+1} on x_k
            error = slope.error if k == K - 1 else slope.error + slope.value / b * error
            b = slope.value
            assert_within(Estimate(b, error), exact[k])
        assert float(error / b) < 0.05  # so the flow map is told from the posterior mean
