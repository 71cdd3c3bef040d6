"""Schedules of the catalogue: against their published formulas, autograd and their own inverses."""

import copy
import math
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from diffrl.diffusion.chains import Chain
from diffrl.diffusion.posterior import marginal, posterior
from diffrl.diffusion.schedules.vp import VP
from tests.kit.oracles import randn

SCHEDULES = {
    "sigmoid": VP("sigmoid"),
    "sigmoid_late": VP("sigmoid", start=0.0, end=3.0, tau=0.7),
    "sigmoid_steep": VP("sigmoid", tau=0.1),
    "sigmoid_shifted": VP("sigmoid", input_scale=0.3),
    "cosine_shifted": VP("cosine", input_scale=0.25),
    "linear_shifted": VP("linear", input_scale=2.0),
    "simple_diffusion": VP("cosine", log_snr_max=15.0),
    "simple_diffusion_shifted": VP("cosine", log_snr_max=15.0, input_scale=64 / 256),
}
every_schedule = pytest.mark.parametrize("process", SCHEDULES.values(), ids=SCHEDULES.keys())


def inner(n: int = 41) -> Tensor:
    return torch.linspace(0.01, 0.99, n, dtype=torch.float64)


# Formulas


@pytest.mark.parametrize(("start", "end", "tau"), [(-3.0, 3.0, 1.0), (0.0, 3.0, 0.3), (-3.0, 3.0, 0.1)])
def test_sigmoid_is_the_published_one(start: float, end: float, tau: float) -> None:
    def s(x: float) -> float:
        return 1 / (1 + math.exp(-x))

    t = inner()
    by_hand = [
        (s(end / tau) - s((u * (end - start) + start) / tau)) / (s(end / tau) - s(start / tau))
        for u in t.tolist()
    ]
    g = torch.tensor(by_hand, dtype=torch.float64)
    process = VP("sigmoid", start=start, end=end, tau=tau)
    torch.testing.assert_close(process.alpha(t) ** 2, g, rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(process.sigma(t) ** 2, 1 - g, rtol=1e-9, atol=1e-14)


def test_sigmoid_runs_from_clean_data_to_pure_noise() -> None:
    process, ends = VP("sigmoid"), torch.tensor([0.0, 1.0], dtype=torch.float64)
    assert process.alpha(ends).tolist() == pytest.approx([1, 0], abs=1e-15)
    assert process.sigma(ends).tolist() == pytest.approx([0, 1], abs=1e-15)


@pytest.mark.parametrize("tau", [0.1, 1.0])
def test_sigmoid_keeps_its_precision_at_both_ends(tau: float) -> None:
    """1 - α² and 1 - σ² would cancel; the slopes at the ends say what is right there."""
    process, h = VP("sigmoid", tau=tau), 1e-9
    slope = [-3 / tau, 3 / tau]
    s = [1 / (1 + math.exp(-x)) for x in slope]
    rise = (6 / tau) / (s[1] - s[0])
    near = torch.tensor(h, dtype=torch.float64)
    assert float(process.sigma(near) ** 2) == pytest.approx(h * rise * s[0] * (1 - s[0]), rel=1e-6)
    h = 2.0**-30
    assert float(process.alpha(1 - torch.tensor(h, dtype=torch.float64)) ** 2) == pytest.approx(
        h * rise * s[1] * s[0], rel=1e-6
    )


@pytest.mark.parametrize("ratio", [1.0, 64 / 256, 2.0])
@pytest.mark.parametrize("N", [2, 18])
def test_the_levels_of_simple_diffusion(ratio: float, N: int) -> None:
    """Those of log SNR(t) = -2 log tan(t_min + t (t_max - t_min)) + 2 log(d_noise/d_img), t from 1 to 0."""
    t_min, t_max = math.atan(math.exp(-7.5)), math.atan(math.exp(7.5))
    published = [
        -2 * math.log(math.tan(t_min + (1 - i / (N - 1)) * (t_max - t_min))) + 2 * math.log(ratio)
        for i in range(N)
    ]
    process = VP("cosine", log_snr_max=15.0, input_scale=ratio)
    log_snr = process.log_snr(process.time_grid(N)[:-1])
    torch.testing.assert_close(log_snr, torch.tensor(published, dtype=torch.float64), rtol=0, atol=1e-8)
    assert log_snr[[0, -1]].tolist() == pytest.approx(
        [-15 + 2 * math.log(ratio), 15 + 2 * math.log(ratio)], abs=1e-8
    )


@pytest.mark.parametrize("kind", ["linear", "cosine", "sigmoid"])
@pytest.mark.parametrize("b", [0.1, 0.5, 3.0])
def test_input_scale_is_that_of_the_scaled_state_at_unit_variance(kind: str, b: float) -> None:
    """x_t = √g b x0 + √(1-g) ε, divided by √(g b² + 1 - g); the log-SNR moves by 2 log b everywhere."""
    t, x0, noise = inner(), randn(41, 3), randn(41, 3, seed=1)
    g = VP(kind).alpha(t)[:, None] ** 2
    scaled = (g.sqrt() * b * x0 + (1 - g).sqrt() * noise) / (g * b**2 + 1 - g).sqrt()
    process = VP(kind, input_scale=b)
    torch.testing.assert_close(marginal(process, x0, t, noise), scaled)
    shift = process.log_snr(t) - VP(kind).log_snr(t)
    torch.testing.assert_close(shift, torch.full_like(t, 2 * math.log(b)))
    end = torch.zeros(1, dtype=torch.float64)
    assert float(process.alpha(end)) == 1 and float(process.sigma(end)) == 0


def test_shifts_compose() -> None:
    t = inner()
    once, twice = VP("sigmoid", input_scale=0.06), VP("sigmoid", input_scale=0.2)
    shift = once.log_snr(t) - twice.log_snr(t)
    torch.testing.assert_close(shift, torch.full_like(t, 2 * math.log(0.3)))


# Properties


@every_schedule
def test_variance_is_preserved(process: VP) -> None:
    t = inner()
    torch.testing.assert_close(process.alpha(t) ** 2 + process.sigma(t) ** 2, torch.ones_like(t))


@every_schedule
def test_derivatives_are_those_of_autograd(process: VP) -> None:
    t = inner().requires_grad_()
    for value, derivative in ((process.alpha, process.alpha_dot), (process.sigma, process.sigma_dot)):
        (witness,) = torch.autograd.grad(value(t).sum(), t)
        torch.testing.assert_close(derivative(t.detach()), witness, rtol=1e-8, atol=1e-12)


@every_schedule
def test_log_snr_inverts(process: VP) -> None:
    t = torch.cat([torch.tensor([1e-4, 1e-3], dtype=torch.float64), inner()])
    torch.testing.assert_close(process.t_from_log_snr(process.log_snr(t)), t, rtol=1e-8, atol=1e-12)
    log_snr = torch.linspace(-8, 12, 41, dtype=torch.float64)
    torch.testing.assert_close(process.log_snr(process.t_from_log_snr(log_snr)), log_snr, rtol=0, atol=1e-8)


@every_schedule
@pytest.mark.parametrize("N", [1, 2, 18])
def test_levels_lose_noise_down_to_the_clean_state(process: VP, N: int) -> None:
    t = process.time_grid(N)
    log_snr = process.log_snr(t)
    assert bool((log_snr.diff() > 0).all()) and log_snr[-1] == math.inf
    index = torch.arange(N, dtype=torch.float64)
    if N > 1:
        torch.testing.assert_close(process.index(t[:-1], N), index, rtol=0, atol=1e-9)
    c_noise = process.c_noise(t.float())
    assert bool(torch.isfinite(c_noise).all()) and bool((c_noise.diff() < 0).all())


@every_schedule
def test_float32_is_the_rounded_float64(process: VP) -> None:
    t = process.time_grid(18).float()
    for of_t in (process.alpha, process.sigma):
        assert of_t(t).dtype == torch.float32
        torch.testing.assert_close(of_t(t).double(), of_t(t.double()), rtol=2e-5, atol=1e-6)


@every_schedule
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_a_step_leads_from_marginal_to_marginal(process: VP, eta: float) -> None:
    """A x0 + κ (α_t x0 + σ_t ε) + std z has the mean α_s x0 and the variance σ_s²."""
    chain = Chain(process, num_steps=9, coupling=eta)
    t, s = chain.t[:-1], chain.t[1:]
    A, kappa, std = posterior(process, t, s, eta)
    torch.testing.assert_close(A + kappa * process.alpha(t), process.alpha(s))
    torch.testing.assert_close((kappa * process.sigma(t)) ** 2 + std**2, process.sigma(s) ** 2)


@every_schedule
def test_a_schedule_is_a_value(process: VP) -> None:
    process.time_grid(3)  # fills what is cached
    for twin in (copy.deepcopy(process), pickle.loads(pickle.dumps(process))):
        assert twin == process and hash(twin) == hash(process)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: VP("sigmoid", start=1.0, end=1.0), r"end is 1.0, but must lie in \(1, "),
        (lambda: VP("sigmoid", tau=0.0), r"tau is 0.0, but must lie in \(0, "),
        (lambda: VP(input_scale=0.0), "input_scale is 0.0, but must lie in"),
        (lambda: VP(log_snr_max=-1.0), r"log_snr_max is -1.0, but must lie in \(0, 50\]"),
        (lambda: VP("linear", log_snr_max=15.0), "log_snr_max is 15"),
    ],
)
def test_a_bad_argument_is_named(wrong: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        wrong()
