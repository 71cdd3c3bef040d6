"""Samplers: order of convergence, laws recovered, equality with diffusers and the published algorithm."""

import itertools
import math
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, LCMScheduler
from torch import Tensor

from diffrl.diffusion.denoisers import Denoiser
from diffrl.diffusion.exact import GaussianDenoiser
from diffrl.diffusion.samplers.base import Model, Noise, Sampler
from diffrl.diffusion.samplers.consistency import LCM
from diffrl.diffusion.samplers.ddim import DDIM, Ancestral
from diffrl.diffusion.samplers.edm_stochastic import EDMStochastic
from diffrl.diffusion.samplers.loop import sample, trajectory
from diffrl.diffusion.samplers.ode import Euler, Heun
from diffrl.diffusion.schedules.base import Schedule
from diffrl.diffusion.schedules.ddpm import DDPM
from diffrl.diffusion.schedules.edm import EDM
from diffrl.diffusion.schedules.flow import Flow
from tests.kit.oracles import CONTINUOUS, Estimate, assert_within, continuous, every_process, generator, randn
from tests.kit.samplers import Stand, normal_denoiser


def walk(sampler: Sampler, process: Schedule, num_steps: int, noise: Tensor) -> list[Tensor]:
    """All states of a chain, started from given normal numbers."""
    pool = iter([noise])
    model = Model(normal_denoiser(process), process, num_steps)
    return list(trajectory(model, sampler, noise, lambda x: next(pool)))


def flow_map(
    process: Schedule, x: Tensor, t: Tensor, s: Tensor, mean: float = 0.5, std: float = 0.8
) -> Tensor:
    """Exact probability-flow ODE of N(m, v): (x_t - α_t m)/√(α_t² v + σ_t²) does not change."""
    mean, std = 0.5, 0.8

    def scale(t: Tensor) -> Tensor:
        return (process.alpha(t) ** 2 * std**2 + process.sigma(t) ** 2).sqrt()

    return process.alpha(s) * mean + scale(s) / scale(t) * (x - process.alpha(t) * mean)


# Accuracy


@pytest.mark.parametrize("name", ["edm_even", "vp_linear", "vp_cosine", "flow"])
@pytest.mark.parametrize(("sampler", "order"), [(Euler(), 1), (DDIM(0.0), 1), (Heun(), 2)])
def test_order_of_convergence(name: str, sampler: Sampler, order: int) -> None:
    """Error at the least noisy level that all grids share, against the exact map, as the step is halved."""
    process, noise, errors = CONTINUOUS[name], randn(64, 1), []
    for steps in (128, 256, 512):
        # steps between the noisiest level and the last: a flow grid of N levels ends at 1/N, so stop halfway
        N, stop = (steps, steps // 2) if isinstance(process, Flow) else (steps + 1, steps)
        t = process.time_grid(N)
        states = walk(sampler, process, N, noise)
        errors.append(float((states[stop] - flow_map(process, states[0], t[0], t[stop])).abs().max()))
    orders = [math.log2(a / b) for a, b in itertools.pairwise(errors)]
    assert orders == pytest.approx([order, order], abs=0.1)


STEPS = {Euler(): 200, Heun(): 40, DDIM(): 200, DDIM(0.5): 200, Ancestral(): 200, EDMStochastic(): 60}
LAWS = [
    pytest.param(CONTINUOUS[name], s, n, id=f"{name}-{s}")
    for name in ("edm", "vp_linear", "vp_cosine", "flow")
    for s, n in STEPS.items()
    if name == "edm" or not isinstance(s, EDMStochastic)
] + [
    pytest.param(DDPM(kind=kind), s, 500, id=f"ddpm_{kind}-{s}")
    for kind in ("linear", "cosine")
    for s in (DDIM(), DDIM(0.5), Ancestral())
]


@pytest.mark.parametrize(("process", "sampler", "num_steps"), LAWS)
def test_mean_and_covariance_are_recovered(process: Schedule, sampler: Sampler, num_steps: int) -> None:
    mean = torch.tensor([0.5, -1.0], dtype=torch.float64)
    C = torch.tensor([[1.0, 0.6], [0.6, 0.5]], dtype=torch.float64)
    M = 8_000
    x = sample(
        GaussianDenoiser(process, mean, C),
        (M, 2),
        sampler=sampler,
        num_steps=num_steps,
        noise=Noise(generator(1)),
        dtype=torch.float64,
    )
    # start and steps are approximate: allow 2 % of the scale beyond the sampling error
    centred = x - x.mean(0)
    products = centred[:, :, None] * centred[:, None]
    for draws, expected in ((x, mean), (products, C)):
        error = draws.std(0) / M**0.5 + 0.02 / 4
        assert_within(Estimate(draws.mean(0), error), expected, errors=4.0)


@pytest.mark.parametrize("name", ["edm", "flow", "flow_shifted"])
def test_where_the_path_of_the_noise_is_straight_ddim_is_euler(name: str) -> None:
    process, noise = CONTINUOUS[name], randn(8, 1)
    for a, b in zip(walk(DDIM(0.0), process, 10, noise), walk(Euler(), process, 10, noise), strict=True):
        torch.testing.assert_close(a, b)


@every_process
def test_one_step_lands_on_the_clean_estimate(process: Schedule) -> None:
    noise, exact = randn(8, 1), normal_denoiser(process)
    start = process.sigma(process.time_grid(1)[0]) * noise
    D_x = exact(start, process.time_grid(1)[:1].expand(8))
    sampler: Sampler
    for sampler in [DDIM(), DDIM(0.5), Ancestral()]:
        torch.testing.assert_close(walk(sampler, process, 1, noise)[-1], D_x)
    if isinstance(process, EDM | Flow):  # straight paths, which Euler follows exactly
        for sampler in [Euler(), Heun()]:
            torch.testing.assert_close(walk(sampler, process, 1, noise)[-1], D_x)


@continuous
def test_velocity_is_that_of_the_flow_map(process: Schedule) -> None:
    """dx/ds of the exact map at s = t."""
    t = process.time(torch.tensor(3.3), 8).requires_grad_()
    x = randn(5, 1)
    model = Model(normal_denoiser(process), process, 8)
    moved = flow_map(process, x, t.detach(), t)
    witness = torch.stack([torch.autograd.grad(c, t, retain_graph=True)[0] for c in moved.flatten()])
    torch.testing.assert_close(model.velocity(x, t.detach()).flatten(), witness)


# Against diffusers, step by step, with the same noise


def stand_in(prediction_type: Any, process: Schedule) -> Denoiser:  # noqa: ANN401
    """σd = 1, with which the input of a variance-preserving process is not rescaled."""
    return Denoiser(Stand(), process, 1.0, prediction_type, time_input="t")


PREDICTIONS = pytest.mark.parametrize(
    ("ours", "theirs"), [("eps", "epsilon"), ("v", "v_prediction"), ("x0", "sample")]
)


@PREDICTIONS
@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("N", [10, 50])
def test_ddim_is_that_of_diffusers(ours: str, theirs: str, eta: float, N: int) -> None:
    process = DDPM()
    scheduler = DDIMScheduler(
        timestep_spacing="trailing", clip_sample=False, set_alpha_to_one=True, prediction_type=theirs
    )
    scheduler.set_timesteps(N)
    scheduler.alphas_cumprod = process.alphas_cumprod  # theirs are float32
    pool = randn(N + 1, 3, 2, 4, 4)
    ahead = iter(pool)
    model = Model(stand_in(ours, process), process, N)
    states = list(trajectory(model, DDIM(eta), pool[0], lambda x: next(ahead)))
    x = states[0]
    for k, t in enumerate(scheduler.timesteps):
        output = Stand()(x, t.expand(3), None)
        noise = pool[k + 1] if eta > 0 and k + 1 < N else torch.zeros_like(x)
        x = scheduler.step(output, t, x, eta=eta, variance_noise=noise).prev_sample
        torch.testing.assert_close(states[k + 1], x, rtol=1e-9, atol=1e-9)


@PREDICTIONS
@pytest.mark.parametrize("N", [10, 18, 1000])  # 18 does not divide 1000
def test_ancestral_is_ddpm_of_diffusers(ours: str, theirs: str, N: int) -> None:
    process = DDPM()
    scheduler = DDPMScheduler(
        timestep_spacing="trailing",
        clip_sample=False,
        variance_type="fixed_small",
        prediction_type=theirs,
    )
    scheduler.set_timesteps(N)
    scheduler.alphas_cumprod = process.alphas_cumprod
    shape = (2, 1, 4, 4)
    model = Model(stand_in(ours, process), process, N)
    states = list(trajectory(model, Ancestral(), torch.empty(shape).double(), Noise(generator(5))))
    x, g = states[0], generator(5)
    torch.randn(shape, generator=g, dtype=torch.float64)  # the start's
    for k, t in enumerate(scheduler.timesteps):
        output = Stand()(x, t.expand(2), None)
        x = scheduler.step(output, int(t), x, generator=g).prev_sample
        if k + 1 < N:
            torch.testing.assert_close(states[k + 1], x, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(states[-1], x, rtol=1e-8, atol=1e-8)  # their last std is 1e-10, ours 0


def test_ancestral_is_ddim_of_eta_one() -> None:
    assert Ancestral() == DDIM(eta=1.0)


def test_edm_stochastic_is_algorithm_2() -> None:
    """Written from the listing, with D = tanh(x/(1+σ)), in plain Python."""
    N, S_churn, S_min, S_max, S_noise = 12, 5.0, 0.05, 20.0, 1.01
    pool = randn(N + 1, 6, 2).tolist()

    def denoise(x: float, sigma: float) -> float:
        return math.tanh(x / (1 + sigma))

    times = [*((80 ** (1 / 7) + i / 11 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7 for i in range(12)), 0.0]
    churned = [S_min <= t <= S_max for t in times[:-1]]
    assert any(churned) and not all(churned)
    witness = []
    for n, d in itertools.product(range(6), range(2)):
        draws = iter(pool)
        x = 80.0 * next(draws)[n][d]
        for i in range(N):
            gamma = min(S_churn / N, math.sqrt(2) - 1) if churned[i] else 0.0
            t_hat = times[i] + gamma * times[i]
            if churned[i]:
                x += math.sqrt(t_hat**2 - times[i] ** 2) * S_noise * next(draws)[n][d]
            slope = (x - denoise(x, t_hat)) / t_hat
            new = x + (times[i + 1] - t_hat) * slope
            if times[i + 1] != 0:
                slope_there = (new - denoise(new, times[i + 1])) / times[i + 1]
                new = x + (times[i + 1] - t_hat) * (slope + slope_there) / 2
            x = new
        witness.append(x)
    ahead = iter(torch.tensor(pool, dtype=torch.float64))
    x = sample(
        lambda x, t, cond: (x / (1 + t[:, None])).tanh(),
        (6, 2),
        sampler=EDMStochastic(S_churn, S_min, S_max, S_noise),
        num_steps=N,
        process=EDM(),
        noise=lambda x: next(ahead),
        dtype=torch.float64,
    )
    torch.testing.assert_close(x.flatten(), torch.tensor(witness, dtype=torch.float64))


def test_edm_stochastic_without_churn_is_heun() -> None:
    exact = normal_denoiser(EDM(), D=2)
    a, b = (
        sample(exact, (5, 2), sampler=s, num_steps=9, seed=3, dtype=torch.float64)
        for s in (EDMStochastic(S_churn=0.0), Heun())
    )
    torch.testing.assert_close(a, b, rtol=0, atol=0)


@PREDICTIONS
@pytest.mark.parametrize("N", [1, 2, 4, 7, 50])
def test_lcm_is_that_of_diffusers(ours: str, theirs: str, N: int) -> None:
    """But for its boundary condition, which is the denoiser's business: a large time scale makes it vanish."""
    process = DDPM(kind="scaled_linear")
    scheduler = LCMScheduler(prediction_type=theirs, timestep_scaling=1e9)
    scheduler.set_timesteps(N)
    scheduler.alphas_cumprod = process.alphas_cumprod
    scheduler.final_alpha_cumprod = torch.ones((), dtype=torch.float64)
    assert LCM().grid(process, N).tolist() == [*scheduler.timesteps.tolist(), -1]
    like, gen = randn(3, 2, 4, 4), generator(2)
    states = trajectory(Model(stand_in(ours, process), process, N), LCM(), like, Noise(generator(2)))
    witness = next(states)
    torch.randn(like.shape, generator=gen, dtype=like.dtype)  # the start's noise
    for t, state in zip(scheduler.timesteps, states, strict=True):
        output = Stand()(witness, t.expand(3), None)
        witness = scheduler.step(output, t, witness, generator=gen).prev_sample
        torch.testing.assert_close(state, witness, rtol=1e-9, atol=1e-9)
