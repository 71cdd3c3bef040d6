"""One-step posteriors against Gaussian conditioning, the published formula and Bayes' rule; densities."""

from decimal import Decimal, localcontext

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal

from diffrl.diffusion.posterior import coupling_eta, marginal, posterior, transition
from diffrl.diffusion.schedules.base import Schedule
from diffrl.diffusion.schedules.ddpm import DDPM
from diffrl.diffusion.schedules.edm import EDM
from diffrl.diffusion.schedules.flow import Flow
from diffrl.diffusion.schedules.vp import VP
from tests.kit.oracles import (
    assert_within,
    continuous,
    every_process,
    fit_line,
    generator,
    noisy_times,
    randn,
)

etas = pytest.mark.parametrize("eta", [0.0, 0.3, 0.5, 0.9, 1.0])


def pairs(process: Schedule, num_steps: int = 9) -> tuple[Tensor, Tensor]:
    """Every pair (t, s) of levels, s less noisy than t, neither of them clean or pure noise."""
    t = noisy_times(process, num_steps)
    i, j = torch.triu_indices(len(t), len(t), offset=1)
    return t[i], t[j]


def by_the_paper(
    alpha_t: float, sigma_t: float, alpha_s: float, sigma_s: float, eta: float
) -> tuple[float, float, float]:
    """A, κ, std in 50 digits, in the form that cancels: κ² = (σ_s² - η² ṽ)/σ_t²."""
    with localcontext() as context:
        context.prec = 50
        at, st, as_, ss, e = (Decimal(c) for c in (alpha_t, sigma_t, alpha_s, sigma_s, eta))
        v = (st**2 - (at / as_) ** 2 * ss**2) * ss**2 / st**2
        kappa = (ss**2 - e**2 * v).sqrt() / st
        return float(as_ - at * kappa), float(kappa), float(e * v.sqrt())


@every_process
@etas
def test_posterior_is_the_published_formula(process: Schedule, eta: float) -> None:
    t, s = pairs(process)
    scales = (process.alpha(t), process.sigma(t), process.alpha(s), process.sigma(s))
    witness = torch.tensor(
        [by_the_paper(*row) for row in zip(*(c.tolist() for c in scales), [eta] * len(t), strict=True)],
        dtype=torch.float64,
    )
    # α² + σ² = 1 only up to rounding, which the variance of a short step feels
    torch.testing.assert_close(torch.stack(posterior(process, t, s, eta), 1), witness, rtol=1e-9, atol=1e-12)


@every_process
def test_markov_posterior_is_gaussian_conditioning(process: Schedule) -> None:
    """x_s given (x0, x_t), from the covariance of the three as linear maps of independent normals."""
    for t, s in zip(*pairs(process, 6), strict=True):
        alpha_s, sigma_s = float(process.alpha(s)), float(process.sigma(s))
        a = float(process.alpha(t)) / alpha_s
        b = (float(process.sigma(t)) ** 2 - (a * sigma_s) ** 2) ** 0.5
        L = torch.tensor([[1, 0, 0], [a * alpha_s, a * sigma_s, b], [alpha_s, sigma_s, 0]]).double()
        C = L @ L.T
        gain = torch.linalg.solve(C[:2, :2], C[:2, 2])
        variance = C[2, 2] - gain @ C[:2, 2]
        A, kappa, std = posterior(process, t, s, 1.0)
        torch.testing.assert_close(torch.stack([A, kappa]), gain, rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(std**2, variance, rtol=1e-6, atol=1e-8)


@every_process
@etas
def test_every_coupling_keeps_the_marginals(process: Schedule, eta: float) -> None:
    t, s = pairs(process)
    A, kappa, std = posterior(process, t, s, eta)
    torch.testing.assert_close(A + kappa * process.alpha(t), process.alpha(s))
    torch.testing.assert_close((kappa * process.sigma(t)) ** 2 + std**2, process.sigma(s) ** 2)


@every_process
def test_bayes_rule(process: Schedule) -> None:
    """Log q(x_s | x_t, x0) = log q(x_t | x_s) + log q(x_s | x0) - log q(x_t | x0)."""
    t, s = pairs(process)
    x0, n, z = randn(3, len(t))
    x_s = marginal(process, x0, s, n)
    a, b = transition(process, s, t)
    x_t = a * x_s + b * z
    A, kappa, std = posterior(process, t, s, 1.0)
    left = Normal(A * x0 + kappa * x_t, std).log_prob(x_s)
    right = (
        Normal(a * x_s, b).log_prob(x_t)
        + Normal(process.alpha(s) * x0, process.sigma(s)).log_prob(x_s)
        - Normal(process.alpha(t) * x0, process.sigma(t)).log_prob(x_t)
    )
    torch.testing.assert_close(left, right, rtol=1e-6, atol=1e-6)


@every_process
def test_noising_in_two_steps_is_noising_at_once(process: Schedule) -> None:
    t, s = pairs(process)
    a, b = transition(process, s, t)
    torch.testing.assert_close(a * process.alpha(s), process.alpha(t))
    torch.testing.assert_close((a * process.sigma(s)) ** 2 + b**2, process.sigma(t) ** 2)


def test_variance_exploding_closed_forms() -> None:
    t, s = pairs(EDM())
    for eta, kappa in ((0.0, s / t), (1.0, (s / t) ** 2)):
        law = posterior(EDM(), t, s, eta)
        torch.testing.assert_close(law.kappa, kappa, rtol=1e-12, atol=0)
        torch.testing.assert_close(law.A, 1 - kappa, rtol=1e-12, atol=0)
    torch.testing.assert_close(law.std, s * (1 - (s / t) ** 2).sqrt())


def test_one_long_step_does_not_cancel() -> None:
    t, s = torch.tensor(80.0), torch.tensor(0.002)
    v = (t**2 - s**2) * s**2 / t**2
    assert float((s**2 - v) / t**2) == 0  # what float32 makes of the published form
    assert float(posterior(EDM(), t, s, 1.0).kappa) == pytest.approx((0.002 / 80) ** 2, rel=1e-6)


@every_process
@etas
def test_no_step_and_the_last_step(process: Schedule, eta: float) -> None:
    t = process.time_grid(9)[:-1]
    clean = torch.tensor(process.t_clean).expand(len(t))
    one, zero = torch.ones_like(t), torch.zeros_like(t)
    stay, land = posterior(process, t, t, eta), posterior(process, t, clean, eta)
    for law, (A, kappa) in ((stay, (zero, one)), (land, (one, zero))):
        torch.testing.assert_close(law.A, A, rtol=0, atol=1e-14)
        torch.testing.assert_close(law.kappa, kappa, rtol=0, atol=1e-14)
        torch.testing.assert_close(law.std, zero, rtol=0, atol=1e-7)


@continuous
@etas
def test_the_shortest_step_is_finite(process: Schedule, eta: float) -> None:
    """Rounding must not make a variance negative."""
    t = torch.linspace(0.01, 0.99, 999, dtype=torch.float64)
    s = torch.nextafter(t, torch.zeros(()).double())
    law = posterior(process, t, s, eta)
    torch.testing.assert_close(law.kappa, torch.ones_like(t))
    torch.testing.assert_close(law.std, torch.zeros_like(t), rtol=0, atol=1e-6)
    assert bool(torch.isfinite(transition(process, s, t)[1]).all())


@etas
def test_from_pure_noise(eta: float) -> None:
    """x_t tells nothing of x0 there: x_s = α_s x0 + σ_s (√(1-η²) x_t + η z)."""
    s = torch.tensor([0.9, 0.3, 0.0], dtype=torch.float64)
    A, kappa, std = posterior(Flow(), torch.ones(()), s, eta)
    torch.testing.assert_close(A, 1 - s)
    torch.testing.assert_close(kappa, s * (1 - eta**2) ** 0.5)
    torch.testing.assert_close(std, s * eta)


def test_noising_to_and_at_pure_noise() -> None:
    a, b = transition(Flow(), torch.tensor([0.5, 1.0]), torch.ones(2))
    torch.testing.assert_close(a, torch.tensor([0.0, 1.0]).double())
    torch.testing.assert_close(b, torch.tensor([1.0, 0.0]).double())


def test_posterior_broadcasts_and_is_float64() -> None:
    t, s = torch.rand(3, 1) + 1, torch.rand(4)
    law = posterior(EDM(), t, s, 0.7)
    for c in law:
        assert c.shape == (3, 4) and c.dtype == torch.float64
    torch.testing.assert_close(law.kappa[2, 1], posterior(EDM(), t[2, 0], s[1], 0.7).kappa)


# Marginals


@pytest.mark.parametrize("event", [(2,), (1, 4, 4), (5,)])
def test_marginal_is_a_loop_over_states(event: tuple[int, ...]) -> None:
    process, (B, K) = VP(), (3, 5)  # K is also an event size: a wrong broadcast would not raise
    x0, noise = randn(2, B, K, *event)
    t = torch.rand(B, K, generator=generator())
    for times in (t, t.unsqueeze(-1)):
        x_t = marginal(process, x0, times, noise)
        for b in range(B):
            for k in range(K):
                witness = process.alpha(t[b, k]) * x0[b, k] + process.sigma(t[b, k]) * noise[b, k]
                torch.testing.assert_close(x_t[b, k], witness)
    assert marginal(process, x0.float(), t.double(), noise.float()).dtype == torch.float32


@continuous
def test_drawn_steps_have_the_marginal_of_s(process: Schedule) -> None:
    t, s = (process.time(torch.tensor(i), 6) for i in (1, 3))
    x0, n, z = randn(3, 20_000)
    A, kappa, std = posterior(process, t, s, 0.5)
    x_s = A * x0 + kappa * marginal(process, x0, t.expand(20_000), n) + std * z
    line = fit_line(x0, x_s)
    assert_within(line.slope, process.alpha(s))
    assert_within(line.level, process.alpha(s) * x0.mean())
    rest = (x_s - process.alpha(s) * x0).std()
    assert float(rest) == pytest.approx(float(process.sigma(s)), rel=5 / (2 * 20_000) ** 0.5)


# Names of couplings


def test_couplings_by_name_and_number() -> None:
    assert [coupling_eta(c) for c in ("markov", "shared", 0, 0.25, 1)] == [1.0, 0.0, 0.0, 0.25, 1.0]


@pytest.mark.parametrize("wrong", ["ancestral", -0.1, 1.1, float("nan")])
def test_another_coupling_is_refused(wrong: str | float) -> None:
    expected = "give 'markov', 'shared' or a number in" if isinstance(wrong, str) else r"must lie in \[0, 1\]"
    with pytest.raises(ValueError, match=expected):
        coupling_eta(wrong)


def test_discrete_posterior_is_the_one_of_ddpm() -> None:
    """Ho et al., eq. 7: β̃_t = (1-ᾱ_{t-1})/(1-ᾱ_t) β_t, with the betas themselves."""
    beta = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    bar = (1 - beta).cumprod(0)
    t = torch.arange(1, 1000)
    A, kappa, std = posterior(DDPM(), t, t - 1, 1.0)
    b, bar_t, bar_s = beta[1:], bar[1:], bar[:-1]
    torch.testing.assert_close(A, bar_s.sqrt() * b / (1 - bar_t), rtol=1e-9, atol=0)
    torch.testing.assert_close(kappa, (1 - b).sqrt() * (1 - bar_s) / (1 - bar_t), rtol=1e-9, atol=0)
    torch.testing.assert_close(std**2, (1 - bar_s) / (1 - bar_t) * b, rtol=1e-9, atol=0)
