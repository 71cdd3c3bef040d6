"""Samplers: order of convergence, laws recovered, equality with diffusers, evaluations, seeds."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, LCMScheduler
from torch import Tensor, nn
from torch.distributions import Normal

from diffrl.diffusion.denoisers import Denoiser
from diffrl.diffusion.exact import GaussianDenoiser
from diffrl.diffusion.laws import Gaussian
from diffrl.diffusion.samplers.base import GaussianSampler, Model, Noise, Sampler
from diffrl.diffusion.samplers.consistency import LCM, Multistep
from diffrl.diffusion.samplers.ddim import DDIM, Ancestral
from diffrl.diffusion.samplers.edm_stochastic import EDMStochastic
from diffrl.diffusion.samplers.loop import sample, trajectory
from diffrl.diffusion.samplers.ode import Euler, Heun
from diffrl.diffusion.samplers.registry import SAMPLERS
from diffrl.diffusion.samplers.sde import CPS, FlowSDE
from diffrl.diffusion.schedules.base import Schedule
from diffrl.diffusion.schedules.ddpm import DDPM
from diffrl.diffusion.schedules.edm import EDM
from diffrl.diffusion.schedules.flow import Flow
from diffrl.diffusion.schedules.vp import VP
from tests.kit.oracles import (
    CONTINUOUS,
    Estimate,
    assert_within,
    continuous,
    every_process,
    generator,
    randn,
)

SAMPLES = [Euler(), Heun(), DDIM(), DDIM(0.5), Ancestral()]


def normal_denoiser(process: Schedule, mean: float = 0.5, std: float = 0.8, D: int = 1) -> GaussianDenoiser:
    return GaussianDenoiser(process, torch.full((D,), mean), std**2 * torch.eye(D))


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


class Stand(nn.Module):
    """A network of no meaning: a fixed map of state and timestep."""

    def forward(self, x: Tensor, t: Tensor, cond: Tensor | None) -> Tensor:
        return (x * (1 + t.to(x)[:, None, None, None] / 1000)).tanh() + 0.1 * x.flip(-1)


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


# Evaluations


@pytest.mark.parametrize("N", [1, 2, 9])
@pytest.mark.parametrize(
    ("sampler", "nfe"),
    [
        (Euler(), lambda N: N),
        (Heun(), lambda N: 2 * N - 1),
        (DDIM(), lambda N: N),
        (Ancestral(), lambda N: N),
        (EDMStochastic(), lambda N: 2 * N - 1),
    ],
)
def test_network_evaluations(sampler: Sampler, nfe: Callable[[int], int], N: int) -> None:
    calls: list[Tensor] = []

    def denoiser(x: Tensor, t: Tensor, cond: Tensor | None) -> Tensor:
        assert t.shape == (4,) and bool((t == t[0]).all())
        calls.append(t)
        return 0 * x

    model = Model(denoiser, EDM(), N)
    states = list(trajectory(model, sampler, torch.empty(4, 2), Noise.per_sample(range(4))))
    assert len(states) == N + 1
    assert model.nfe == len(calls) == nfe(N)


def test_the_condition_is_handed_on() -> None:
    cond = torch.tensor([3, 4])
    x = sample(
        lambda x, t, c: torch.zeros_like(x) + c[:, None],
        (2, 5),
        sampler=DDIM(),
        num_steps=3,
        process=VP(),
        cond=cond,
        seed=0,
    )
    torch.testing.assert_close(x, cond[:, None].float().expand(2, 5))


# Noise and seeds


@pytest.mark.parametrize("sampler", [*SAMPLES, EDMStochastic()], ids=str)
@pytest.mark.parametrize("batch", [1, 2, 5])
def test_a_sample_does_not_depend_on_its_batch(sampler: Sampler, batch: int) -> None:
    exact = normal_denoiser(EDM(), D=3)

    def draw(seed: int, n: int) -> Tensor:
        return sample(exact, (n, 3), sampler=sampler, num_steps=6, seed=seed, dtype=torch.float64)

    together = draw(10, 6)
    pieces = torch.cat([draw(10 + first, min(batch, 6 - first)) for first in range(0, 6, batch)])
    torch.testing.assert_close(pieces, together, rtol=1e-12, atol=1e-12)
    assert len({round(float(x), 9) for x in together[:, 0]}) == 6


def test_one_generator_draws_in_order() -> None:
    noise, g = Noise(generator(3)), generator(3)
    for shape in ((4, 2), (1, 3, 3)):
        expected = torch.randn(shape, generator=g)
        torch.testing.assert_close(noise(torch.empty(shape)), expected, rtol=0, atol=0)
    torch.manual_seed(0)
    first = Noise(None)(torch.empty(4, 2))
    torch.manual_seed(0)
    torch.testing.assert_close(first, torch.randn(4, 2), rtol=0, atol=0)


# Kernels


@every_process
@pytest.mark.parametrize("eta", [0.3, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_kernel_is_the_law_of_its_draws(process: Schedule, eta: float, dtype: torch.dtype) -> None:
    t, s = process.time_grid(6)[2:4]
    model, x = Model(normal_denoiser(process, D=3), process, 6), randn(4, 3, dtype=dtype)
    kernel = DDIM(eta).kernel(model, x, t, s)
    assert kernel.std.ndim == 0 and kernel.mean.dtype == dtype
    z = randn(4, 3, seed=1, dtype=dtype)
    x_s = kernel.sample(lambda x: z)
    torch.testing.assert_close(x_s, kernel.mean + kernel.std * z)
    torch.testing.assert_close(DDIM(eta).step(model, x, t, s, lambda x: z), x_s, rtol=0, atol=0)
    log_p = Normal(kernel.mean, kernel.std.to(dtype)).log_prob(x_s)
    for reduction, witness in (("sum", log_p.sum(1)), ("mean", log_p.mean(1))):
        result = kernel.log_prob(x_s, reduction)
        assert result.dtype == dtype
        torch.testing.assert_close(result, witness)


@continuous
@pytest.mark.parametrize("sampler", [s for s in SAMPLES if isinstance(s, GaussianSampler)], ids=str)
def test_states_may_be_at_times_of_their_own(process: Schedule, sampler: GaussianSampler) -> None:
    """As in a minibatch of transitions; as many states as coordinates, where a wrong broadcast would pass."""
    grid, x = process.time_grid(5), randn(5, 5)
    exact = normal_denoiser(process, D=5)
    t, s = grid[torch.tensor([0, 3, 4, 1, 1])], grid[torch.tensor([1, 4, 5, 2, 3])]
    together, z = sampler.kernel(Model(exact, process, 5), x, t, s), randn(5, 5, seed=1)
    drawn = together.sample(lambda x: z)
    for n in range(5):
        alone = sampler.kernel(Model(exact, process, 5), x[n : n + 1], t[n], s[n])
        torch.testing.assert_close(together.mean[n], alone.mean[0])
        torch.testing.assert_close(together.std[n], alone.std)
        torch.testing.assert_close(drawn[n], alone.sample(lambda x: z[n : n + 1])[0])  # noqa: B023


@pytest.mark.parametrize("sampler", [Euler(), DDIM(0.0)], ids=str)
def test_an_ode_step_is_a_point(sampler: GaussianSampler) -> None:
    t, s = EDM().time_grid(6)[2:4]
    model, x = Model(normal_denoiser(EDM()), EDM(), 6), randn(4, 1)

    def never(x: Tensor) -> Tensor:
        raise AssertionError("an ODE draws no noise")

    kernel = sampler.kernel(model, x, t, s)
    assert isinstance(kernel, Gaussian) and float(kernel.std) == 0
    torch.testing.assert_close(sampler.step(model, x, t, s, never), kernel.mean, rtol=0, atol=0)
    with pytest.raises(ValueError, match="std is 0"):
        kernel.log_prob(x, "sum")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("sampler", [*SAMPLES, EDMStochastic()], ids=str)
def test_samples_have_the_dtype_asked_for(sampler: Sampler, dtype: torch.dtype) -> None:
    x = sample(normal_denoiser(EDM(), D=2), (3, 2), sampler=sampler, num_steps=4, seed=0, dtype=dtype)
    assert x.dtype == dtype and bool(torch.isfinite(x).all())


@every_process
def test_samples_live_on_the_device_asked_for(process: Schedule) -> None:
    """The meta device refuses, as an accelerator does, to meet tensors of the CPU."""
    exact, like = normal_denoiser(process, D=2).to("meta"), torch.empty(3, 2, device="meta")
    samplers = [DDIM(), Ancestral(), *([Euler(), Heun()] if process.continuous else [])]
    for sampler in samplers:
        x = sample(exact, (3, 2), sampler=sampler, num_steps=3, noise=Noise(None), device="meta")
        assert x.device.type == "meta" and x.shape == (3, 2)
    kernel = Ancestral().kernel(Model(exact, process, 3), like, *process.time_grid(3)[1:3])
    assert kernel.log_prob(like, "sum").device.type == "meta"


def test_times_are_told_in_float32_at_least() -> None:
    """bfloat16 would round timestep 999 to 1000, which does not exist."""
    x = sample(
        normal_denoiser(DDPM(), D=2), (3, 2), sampler=DDIM(), num_steps=4, seed=0, dtype=torch.bfloat16
    )
    assert bool(torch.isfinite(x).all())


def test_gradients_flow_through_a_trajectory_and_not_through_sample() -> None:
    denoiser = Denoiser(Stand(), Flow(), 1.0, "velocity")
    scale = nn.Parameter(torch.ones(()))
    model = Model(lambda x, t, cond: scale * denoiser(x, t, cond), Flow(), 3)
    *_, x = trajectory(model, Heun(), torch.empty(2, 1, 4, 4), Noise(generator()))
    x.sum().backward()
    assert float(scale.grad.abs()) > 0
    assert not sample(
        model.denoiser, (2, 1, 4, 4), sampler=Heun(), num_steps=3, process=Flow(), seed=0
    ).requires_grad


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


# Registry and errors


def test_registry() -> None:
    built = {name: make() for name, make in SAMPLERS.items()}
    assert built == {
        "euler": Euler(),
        "heun": Heun(),
        "ddim": DDIM(),
        "ancestral": Ancestral(),
        "edm_stochastic": EDMStochastic(),
        "consistency": Multistep(),
        "lcm": LCM(),
        "flow_sde": FlowSDE(),
        "cps": CPS(),
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seed": None}, "either seed or noise"),
        ({"noise": Noise(None)}, "either seed or noise"),
        ({"seed": None, "noise": Noise.per_sample([1])}, "1 generators for 3 samples"),
        ({"denoiser": lambda x, t, cond: x}, "give process="),
        ({"sampler": EDMStochastic(), "process": VP()}, "on the EDM process, not on VP: use DDIM"),
        ({"sampler": Euler(), "process": DDPM()}, "discrete times.*DDIM"),
        ({"sampler": Heun(), "process": DDPM()}, "discrete times.*DDIM"),
        ({"sampler": LCM()}, "on the DDPM process, not on EDM: use CPS"),
        (
            {"sampler": LCM(2), "process": DDPM()},
            "num_steps <= solver_steps <= train_steps, not 3, 2 and 1000",
        ),
        ({"num_steps": 0}, "num_steps is 0"),
    ],
)
def test_a_bad_argument_is_named(arguments: dict[str, Any], message: str) -> None:
    good = {
        "denoiser": normal_denoiser(EDM(), D=2),
        "shape": (3, 2),
        "sampler": Heun(),
        "num_steps": 3,
        "seed": 0,
    }
    with pytest.raises(ValueError, match=message):
        sample(**{**good, **arguments})


@pytest.mark.parametrize("eta", [-0.1, 1.1, math.nan])
def test_eta_lies_in_the_unit_interval(eta: float) -> None:
    with pytest.raises(ValueError, match="eta is"):
        DDIM(eta)
