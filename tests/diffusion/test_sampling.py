"""Sampling: evaluations, seeds, kernels, dtypes and devices, gradients, what is refused."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Normal

from diffrl.diffusion.denoisers import Denoiser
from diffrl.diffusion.laws import Gaussian
from diffrl.diffusion.samplers.base import GaussianSampler, Model, Noise, Sampler
from diffrl.diffusion.samplers.consistency import LCM, Multistep
from diffrl.diffusion.samplers.ddim import DDIM, Ancestral
from diffrl.diffusion.samplers.edm_stochastic import EDMStochastic
from diffrl.diffusion.samplers.flow_map import FlowMap
from diffrl.diffusion.samplers.learned_variance import LearnedAncestral
from diffrl.diffusion.samplers.loop import sample, trajectory
from diffrl.diffusion.samplers.ode import Euler, Heun
from diffrl.diffusion.samplers.registry import SAMPLERS
from diffrl.diffusion.samplers.sde import CPS, FlowSDE
from diffrl.diffusion.schedules.base import Schedule
from diffrl.diffusion.schedules.ddpm import DDPM
from diffrl.diffusion.schedules.edm import EDM
from diffrl.diffusion.schedules.flow import Flow
from diffrl.diffusion.schedules.vp import VP
from tests.kit.oracles import continuous, every_process, generator, randn
from tests.kit.samplers import Stand, normal_denoiser

SAMPLES = [Euler(), Heun(), DDIM(), DDIM(0.5), Ancestral()]


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


# Registry and errors


def test_registry() -> None:
    built = {name: make() for name, make in SAMPLERS.items()}
    assert built == {
        "euler": Euler(),
        "heun": Heun(),
        "ddim": DDIM(),
        "ancestral": Ancestral(),
        "ancestral_learned": LearnedAncestral(),
        "edm_stochastic": EDMStochastic(),
        "consistency": Multistep(),
        "lcm": LCM(),
        "flow_sde": FlowSDE(),
        "cps": CPS(),
        "flow_map": FlowMap(),
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seed": None}, "either seed or noise"),
        ({"noise": Noise(None)}, "either seed or noise"),
        ({"seed": None, "noise": Noise.per_sample([1])}, "1 generators for 3 samples"),
        ({"denoiser": lambda x, t, cond: x}, "give process="),
        ({"sampler": EDMStochastic(), "process": VP()}, "on the EDM process, not on VP: use DDIM"),
        ({"sampler": Euler(), "process": DDPM()}, "discrete times.*ddim"),
        ({"sampler": Heun(), "process": DDPM()}, "discrete times.*ddim"),
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
