"""Exact denoisers against integrals, sums and autograd; the preconditioned network; guidance."""

from typing import get_args

import pytest
import torch
from torch import Tensor, nn

from diffrl.diffusion.denoisers import Denoiser
from diffrl.diffusion.exact import EmpiricalDenoiser, GaussianDenoiser, MixtureDenoiser
from diffrl.diffusion.guidance import GuidedDenoiser
from diffrl.diffusion.predictions import PredictionType
from diffrl.diffusion.schedules.base import Schedule
from diffrl.diffusion.schedules.ddpm import DDPM
from diffrl.diffusion.schedules.edm import EDM
from diffrl.diffusion.schedules.flow import Flow
from diffrl.diffusion.schedules.vp import VP
from tests.kit.oracles import every_process, noisy_times, randn

MEANS = torch.tensor([[-1.0, 0.5], [0.2, -0.8], [1.1, 0.6]], dtype=torch.float64)
STDS = torch.tensor([0.15, 0.3, 0.2], dtype=torch.float64)
WEIGHTS = torch.tensor([0.3, 0.5, 0.2], dtype=torch.float64)


def log_normal(x: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    """Of isotropic normals over the last dim, up to a constant."""
    return -(x - mean).square().sum(-1) / (2 * variance) - 0.5 * x.shape[-1] * variance.log()


def by_integration(process: Schedule, grid: Tensor, log_prior: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """E[x0 | x_t] as a sum over a fine grid [G, D] of x0."""
    alpha, sigma = process.alpha(t)[:, None], process.sigma(t)[:, None]
    squares = (x_t[:, None] - alpha[:, :, None] * grid).square().sum(-1)
    return (log_prior - squares / (2 * sigma**2)).softmax(1) @ grid


def moderate_times(process: Schedule) -> Tensor:
    """Noise to signal from 0.2 to 20: an integral over a grid resolves these."""
    t = noisy_times(process, 60)
    nsr = process.sigma(t) / process.alpha(t)
    t = t[(nsr > 0.2) & (nsr < 20)]
    return t[:: max(len(t) // 6, 1)]


def mixture(process: Schedule, **options: int) -> MixtureDenoiser:
    return MixtureDenoiser(process, MEANS, STDS, WEIGHTS, **options)


# Exact denoisers


@every_process
def test_gaussian_in_one_dimension_is_its_integral(process: Schedule) -> None:
    m, s, t = 0.7, 0.4, moderate_times(process)
    x_t = 2 * randn(len(t), 1)
    grid = torch.linspace(m - 10 * s, m + 10 * s, 4001, dtype=torch.float64)[:, None]
    witness = by_integration(process, grid, log_normal(grid, torch.tensor([m]), torch.tensor(s**2)), x_t, t)
    exact = GaussianDenoiser(process, torch.tensor([m]), torch.tensor([[s**2]]).double())
    torch.testing.assert_close(exact(x_t, t), witness, rtol=1e-5, atol=1e-7)


@every_process
def test_correlated_gaussian_is_its_integral(process: Schedule) -> None:
    mean, C = torch.tensor([0.5, -1.0]).double(), torch.tensor([[1.0, 0.6], [0.6, 0.5]]).double()
    t = moderate_times(process)
    x_t = 2 * randn(len(t), 2)
    axis = torch.linspace(-6, 6, 241, dtype=torch.float64)
    grid = mean + torch.cartesian_prod(axis, axis)
    log_prior = torch.distributions.MultivariateNormal(mean, C).log_prob(grid)
    witness = by_integration(process, grid, log_prior, x_t, t)
    torch.testing.assert_close(GaussianDenoiser(process, mean, C)(x_t, t), witness, rtol=1e-5, atol=1e-6)


@every_process
def test_mixture_is_its_integral(process: Schedule) -> None:
    t = moderate_times(process)
    x_t = 1.5 * randn(len(t), 2)
    axis = torch.linspace(-3, 3, 301, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis)
    log_prior = torch.logsumexp(WEIGHTS.log() + log_normal(grid[:, None], MEANS, STDS**2), 1)
    witness = by_integration(process, grid, log_prior, x_t, t)
    torch.testing.assert_close(mixture(process)(x_t, t), witness, rtol=1e-5, atol=1e-6)


def test_mixture_is_the_weighted_mean_of_its_draws() -> None:
    """In 16 dims, where no grid reaches: importance weights on draws of x0."""
    M, D, process = 200_000, 16, EDM()
    means, stds = 0.5 * randn(4, D), torch.tensor([0.1, 0.2, 0.3, 0.4]).double()
    weights = torch.tensor([0.1, 0.2, 0.3, 0.4]).double()
    c = torch.multinomial(weights, M, replacement=True, generator=torch.Generator().manual_seed(1))
    x0 = means[c] + stds[c, None] * randn(M, D, seed=2)
    sigma = torch.tensor([2.0, 1.0]).double()
    x_t = x0[:2] + sigma[:, None] * randn(2, D, seed=3)
    D_x = MixtureDenoiser(process, means, stds, weights)(x_t, sigma)
    for n in range(2):
        w = (-(x_t[n] - x0).square().sum(1) / (2 * sigma[n] ** 2)).softmax(0)
        estimate = w @ x0
        error = (w.square() @ (x0 - estimate).square()).sqrt()  # of a self-normalised mean
        assert float(error.max()) < 0.01
        assert float(((D_x[n] - estimate) / error).abs().max()) < 5


@every_process
def test_mixture_of_one_is_a_gaussian(process: Schedule) -> None:
    t = process.time_grid(9)[:-1]
    x_t = randn(len(t), 2)
    one = MixtureDenoiser(process, MEANS[:1], STDS[:1], torch.tensor([3.0]))
    gaussian = GaussianDenoiser(process, MEANS[0], STDS[0] ** 2 * torch.eye(2).double())
    torch.testing.assert_close(one(x_t, t), gaussian(x_t, t), rtol=1e-9, atol=1e-9)


@every_process
@pytest.mark.parametrize("event", [(2,), (1, 3, 3)])
def test_empirical_is_a_softmax_over_the_data(process: Schedule, event: tuple[int, ...]) -> None:
    points, t = randn(7, *event), process.time_grid(5)[:-1]
    x_t = randn(len(t), *event, seed=1)
    D_x = EmpiricalDenoiser(process, points)(x_t, t)
    for n in range(len(t)):
        alpha, sigma = process.alpha(t[n]), process.sigma(t[n])
        logits = [-float((x_t[n] - alpha * p).square().sum() / (2 * sigma**2)) for p in points]
        weights = [torch.tensor(logit - max(logits)).double().exp() for logit in logits]
        mean = sum((w * p for w, p in zip(weights, points, strict=True)), torch.zeros(event)) / sum(weights)
        torch.testing.assert_close(D_x[n], mean, rtol=1e-6, atol=1e-6)


@every_process
def test_tweedie(process: Schedule) -> None:
    """α D = x + σ² ∇ log p(x_t), the gradient by autograd through a logsumexp."""
    t = process.time_grid(12)[:-1]
    alpha, sigma = process.alpha(t)[:, None], process.sigma(t)[:, None]
    x_t = (alpha * MEANS[1] + sigma * randn(len(t), 2)).requires_grad_()
    v = alpha**2 * STDS**2 + sigma**2
    log_p = torch.logsumexp(WEIGHTS.log() + log_normal(x_t[:, None], alpha[..., None] * MEANS, v), 1)
    (score,) = torch.autograd.grad(log_p.sum(), x_t)
    x_t = x_t.detach()
    torch.testing.assert_close(alpha * mixture(process)(x_t, t), x_t + sigma**2 * score, rtol=1e-7, atol=1e-7)


def exact_denoisers(process: Schedule) -> list[tuple[nn.Module, Tensor]]:
    """Each with the mean of its law."""
    C = torch.tensor([[1.0, 0.6], [0.6, 0.5]]).double()
    return [
        (GaussianDenoiser(process, MEANS[0], C), MEANS[0]),
        (mixture(process), WEIGHTS @ MEANS),
        (EmpiricalDenoiser(process, MEANS), MEANS.mean(0)),
    ]


def test_limits() -> None:
    x = randn(6, 2)
    for process, much in ((EDM(), 1e5), (Flow(), 1.0)):
        for exact, mean in exact_denoisers(process):
            noisy = exact(x, torch.full((6,), much))
            torch.testing.assert_close(noisy, mean.expand(6, 2), rtol=0, atol=1e-4)
    for exact, _ in exact_denoisers(EDM())[:2]:  # the empirical one returns the nearest point
        torch.testing.assert_close(exact(x, torch.full((6,), 1e-5)), x, rtol=0, atol=1e-6)
    nearest = MEANS[torch.cdist(x, MEANS).argmin(1)]
    torch.testing.assert_close(exact_denoisers(EDM())[2][0](x, torch.full((6,), 1e-3)), nearest)


def test_gaussian_may_be_flat() -> None:
    """All data on a line: D is the projection, shrunk along it."""
    u = torch.tensor([0.6, 0.8], dtype=torch.float64)
    exact = GaussianDenoiser(EDM(), torch.zeros(2), torch.outer(u, u))
    x = randn(5, 2)
    expected = (x @ u)[:, None] * u / (1 + 0.5**2)
    torch.testing.assert_close(exact(x, torch.full((5,), 0.5)), expected)


@pytest.mark.parametrize("batch_size", [1, 3, 7, 100])
def test_splitting_changes_nothing(batch_size: int) -> None:
    x_t, t = randn(7, 2), EDM().time_grid(7)[:-1]
    whole, split = mixture(EDM()), mixture(EDM(), batch_size=batch_size)
    torch.testing.assert_close(split(x_t, t), whole(x_t, t), rtol=0, atol=1e-14)


def test_responsibilities_are_bayes_rule() -> None:
    x_t, t = randn(5, 2), torch.linspace(0.1, 2, 5).double()
    v = STDS**2 + t[:, None] ** 2
    density = WEIGHTS * (-(x_t[:, None] - MEANS).square().sum(-1) / (2 * v)).exp() / v
    p = mixture(EDM()).responsibilities(x_t, t)
    torch.testing.assert_close(p, density / density.sum(1, keepdim=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_exact_denoisers_keep_the_dtype(dtype: torch.dtype) -> None:
    x_t = randn(4, 2, dtype=torch.float32)
    for exact, _ in exact_denoisers(VP()):
        D_x = exact(x_t.to(dtype), torch.full((4,), 0.5, dtype=torch.float64))
        assert D_x.dtype == dtype and D_x.shape == x_t.shape
        witness = exact(x_t.to(dtype).double(), torch.full((4,), 0.5))
        torch.testing.assert_close(D_x, witness.to(dtype))


def test_exact_denoisers_refuse_what_does_not_fit() -> None:
    for exact, _ in exact_denoisers(EDM()):
        with pytest.raises(TypeError, match="x_t has dtype torch.int64"):
            exact(torch.zeros(3, 2, dtype=torch.long), torch.ones(3))
        for wrong in (torch.ones(1), torch.ones(()), torch.ones(3, 1)):
            with pytest.raises(ValueError, match=r"t has shape .*give \[3\]"):
                exact(torch.zeros(3, 2), wrong)
    with pytest.raises(ValueError, match=r"event shape \(3,\), the mixture has \(2,\)"):
        mixture(EDM())(torch.zeros(4, 3), torch.ones(4))
    with pytest.raises(ValueError, match=r"as many means \(3\) as stds \(2\) and weights \(3\)"):
        MixtureDenoiser(EDM(), MEANS, STDS[:2], WEIGHTS)


# A network between preconditioning


class Recorder(nn.Module):
    """A network that keeps what it was given and answers with a fixed map of it."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(0.5))

    def forward(self, x: Tensor, c_noise: Tensor, cond: Tensor | None) -> Tensor:
        self.given = (x, c_noise, cond)
        return self.gain.to(x.dtype) * x.tanh()


def test_edm_denoiser_is_table_1() -> None:
    network, sd = Recorder(), 0.5
    denoiser = Denoiser(network, EDM(), sigma_data=sd)
    x, sigma, cond = randn(4, 1, 3, 3), torch.tensor([0.01, 0.3, 5.0, 80.0]).double(), torch.arange(4)
    D_x = denoiser(x, sigma, cond)
    inputs, c_noise, given = network.given
    torch.testing.assert_close(c_noise, sigma.log() / 4)
    assert given is cond
    for n, s in enumerate(sigma):
        norm = (s**2 + sd**2) ** 0.5
        torch.testing.assert_close(inputs[n], x[n] / norm)
        F_x = 0.5 * (x[n] / norm).tanh()
        torch.testing.assert_close(D_x[n], sd**2 / norm**2 * x[n] + s * sd / norm * F_x)


@every_process
@pytest.mark.parametrize("prediction_type", get_args(PredictionType))
def test_every_prediction_trains_the_network(process: Schedule, prediction_type: PredictionType) -> None:
    if prediction_type == "velocity" and not process.continuous:
        with pytest.raises(ValueError, match="discrete times"):
            Denoiser(Recorder(), process, prediction_type=prediction_type)
        return
    denoiser = Denoiser(Recorder(), process, prediction_type=prediction_type)
    t = noisy_times(process, 6).float()
    x = randn(len(t), 2, dtype=torch.float32)
    D_x = denoiser(x, t)
    assert bool(torch.isfinite(D_x).all())
    c_skip, c_out, c_in = (c[:, None] for c in denoiser.scalings(t))
    torch.testing.assert_close(D_x, c_skip * x + c_out * 0.5 * (c_in * x).tanh())
    D_x.sum().backward()
    assert float(denoiser.network.gain.grad.abs()) > 0


def test_time_input_tells_the_time_itself() -> None:
    network, t = Recorder(), torch.tensor([0, 499, 999])
    Denoiser(network, DDPM(), prediction_type="eps", time_input="t")(torch.zeros(3, 2), t)
    assert network.given[1] is t


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("t_dtype", [torch.float32, torch.float64, torch.int64])
def test_denoiser_keeps_the_dtype_of_the_states(x_dtype: torch.dtype, t_dtype: torch.dtype) -> None:
    network, t = Recorder(), torch.tensor([5, 999], dtype=t_dtype)
    denoiser, x = Denoiser(network, DDPM()), randn(2, 3, dtype=torch.float32)
    D_x = denoiser(x.to(x_dtype), t)
    assert D_x.dtype == x_dtype
    inputs, c_noise, _ = network.given
    assert inputs.dtype == x_dtype
    assert c_noise.dtype == (torch.float64 if x_dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(D_x, denoiser(x.double(), t.double()).to(x_dtype), rtol=2e-2, atol=2e-2)


def test_no_noise_returns_the_state() -> None:
    x = randn(3, 2)
    torch.testing.assert_close(Denoiser(Recorder(), EDM())(x, torch.full((3,), 1e-9)), x)


def test_a_chain_of_one_timestep_is_possible() -> None:
    Denoiser(Recorder(), DDPM(train_steps=1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prediction_type": "noise"}, "prediction_type is 'noise'"),
        ({"sigma_data": 0.0}, "sigma_data is 0.0"),
        ({"time_input": "sigma"}, "time_input is 'sigma'"),
    ],
)
def test_a_bad_argument_is_named(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Denoiser(Recorder(), EDM(), **options)


def test_denoiser_refuses_what_does_not_fit() -> None:
    denoiser = Denoiser(Recorder(), EDM())
    with pytest.raises(TypeError, match=r"x_t has dtype torch.uint8.*/ 127.5 - 1"):
        denoiser(torch.zeros(3, 2, dtype=torch.uint8), torch.ones(3))
    for wrong in (torch.ones(1), torch.ones(()), torch.ones(3, 1)):
        with pytest.raises(ValueError, match=r"t has shape .*3 states: give \[3\]"):
            denoiser(torch.zeros(3, 2), wrong)


# Guidance


class Labelled(nn.Module):
    """D = label, counted; label 9 means none."""

    process = EDM()

    def __init__(self) -> None:
        super().__init__()
        self.labels: list[list[int]] = []

    def forward(self, x_t: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        self.labels.append(cond.tolist())
        return x_t + cond[:, None]


@pytest.mark.parametrize(
    ("w", "expected", "calls"),
    [(0.0, [9, 9], [[9, 9]]), (1.0, [1, 2], [[1, 2]]), (2.0, [-7, -5], [[9, 9], [1, 2]])],
)
def test_guidance_extrapolates_from_no_label(w: float, expected: list[int], calls: list[list[int]]) -> None:
    denoiser, x = Labelled(), randn(2, 3)
    guided = GuidedDenoiser(denoiser, null_label=9, guidance_scale=w)
    D_x = guided(x, torch.ones(2), torch.tensor([1, 2]))
    torch.testing.assert_close(D_x, x + torch.tensor(expected)[:, None])
    assert denoiser.labels == calls and guided.process == EDM()


def test_guidance_needs_labels() -> None:
    with pytest.raises(ValueError, match="give cond"):
        GuidedDenoiser(Labelled(), null_label=9, guidance_scale=2.0)(torch.zeros(2, 3), torch.ones(2))
