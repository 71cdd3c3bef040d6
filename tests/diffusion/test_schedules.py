"""Schedules by their properties, and against the published grids and diffusers."""

import copy
import math
import pickle
from collections.abc import Callable

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler

from diffrl.diffusion.denoisers import Denoiser
from diffrl.diffusion.networks.mlp import MLP
from diffrl.diffusion.samplers.ddim import DDIM
from diffrl.diffusion.samplers.loop import sample
from diffrl.diffusion.schedules.base import Schedule
from diffrl.diffusion.schedules.ddpm import DDPM
from diffrl.diffusion.schedules.edm import EDM
from diffrl.diffusion.schedules.flow import Flow
from diffrl.diffusion.schedules.registry import PROCESSES
from diffrl.diffusion.schedules.vp import VP
from diffrl.diffusion.trajectories import sample_chain
from diffrl.objectives.value import ValueLoss
from tests.kit.oracles import continuous, discrete, every_process, noisy_times


def test_registry() -> None:
    assert PROCESSES == {"edm": EDM, "ddpm": DDPM, "vp": VP, "flow": Flow}


# Levels


@every_process
@pytest.mark.parametrize("N", [1, 2, 18, 40])
def test_levels_lose_noise_strictly_down_to_the_clean_state(process: Schedule, N: int) -> None:
    t = process.time_grid(N)
    assert t.shape == (N + 1,) and t.dtype == torch.float64
    alpha, sigma, log_snr = process.alpha(t), process.sigma(t), process.log_snr(t)
    assert bool(((alpha >= 0) & (alpha <= 1)).all()) and bool((sigma[:-1] > 0).all())
    assert bool((log_snr.diff() > 0).all())
    assert t[-1] == process.t_clean and alpha[-1] == 1 and sigma[-1] == 0 and log_snr[-1] == math.inf


@every_process
def test_log_snr_is_that_of_alpha_and_sigma(process: Schedule) -> None:
    t = noisy_times(process, 12)
    snr = (process.alpha(t) / process.sigma(t)) ** 2
    torch.testing.assert_close(process.log_snr(t), snr.log())


@pytest.mark.parametrize("N", [2, 18])
def test_end_values(N: int) -> None:
    def ends(process: Schedule) -> list[float]:
        t = process.time_grid(N)
        return [float(t[0]), float(t[N - 1]), float(t[N])]

    assert ends(EDM()) == pytest.approx([80, 0.002, 0], rel=1e-12, abs=0)
    assert ends(VP(t_min=0.01, t_max=0.9)) == pytest.approx([0.9, 0.01, 0], rel=1e-12, abs=0)
    assert ends(Flow()) == pytest.approx([1, 1 / N, 0], rel=1e-12, abs=0)
    assert ends(DDPM(train_steps=N)) == [N - 1, 0, -1]
    assert float(Flow().alpha(Flow().time_grid(N))[0]) == 0  # pure noise


def test_edm_grid_is_the_published_one() -> None:
    N, low, high, rho = 18, 0.002, 80.0, 7.0
    sigmas = [
        (high ** (1 / rho) + i / (N - 1) * (low ** (1 / rho) - high ** (1 / rho))) ** rho for i in range(N)
    ]
    torch.testing.assert_close(
        EDM(low, high, rho).time_grid(N), torch.tensor([*sigmas, 0.0], dtype=torch.float64)
    )


def test_vp_is_the_solution_of_its_sde() -> None:
    """D log α/dt = -β(t)/2 with β linear, and α² + σ² = 1 for both kinds."""
    process = VP(beta_min=0.1, beta_max=20.0)
    u = torch.linspace(0, 1, 100_001, dtype=torch.float64)
    integral = torch.cumulative_trapezoid(0.1 + u * (20.0 - 0.1), u)
    torch.testing.assert_close(process.alpha(u[1:]), (-integral / 2).exp(), rtol=1e-8, atol=0)
    for vp in (process, VP("cosine")):
        torch.testing.assert_close(vp.alpha(u) ** 2 + vp.sigma(u) ** 2, torch.ones_like(u))
    torch.testing.assert_close(VP("cosine").alpha(u).acos() * 2 / math.pi, u, rtol=0, atol=1e-8)


def test_flow_shift_moves_every_level_by_the_same_log_snr() -> None:
    plain, shifted = (Flow(shift).time_grid(20)[1:-1] for shift in (1.0, 3.0))
    shift = Flow().log_snr(plain) - Flow().log_snr(shifted)
    torch.testing.assert_close(shift, torch.full_like(shift, 2 * math.log(3)))


@pytest.mark.parametrize(
    ("kind", "name"),
    [("linear", "linear"), ("scaled_linear", "scaled_linear"), ("cosine", "squaredcos_cap_v2")],
)
@pytest.mark.parametrize("T", [1000, 100])
def test_ddpm_is_that_of_diffusers(kind: str, name: str, T: int) -> None:
    witness = DDPMScheduler(num_train_timesteps=T, beta_schedule=name).alphas_cumprod
    process = DDPM(train_steps=T, kind=kind)
    torch.testing.assert_close(process.alphas_cumprod.float(), witness, rtol=2e-4, atol=1e-7)
    t = torch.arange(T)
    torch.testing.assert_close(process.alpha(t) ** 2, process.alphas_cumprod)
    torch.testing.assert_close(process.sigma(t) ** 2, 1 - process.alphas_cumprod)


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("N", [1, 2, 10, 28])
def test_flow_with_a_last_level_has_the_levels_of_diffusers(shift: float, N: int) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(N)
    process = Flow(shift, t_min=scheduler.sigma_min)
    grid = process.time_grid(N)
    torch.testing.assert_close(grid.float(), scheduler.sigmas, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(process.index(grid[:-1], N), torch.arange(N, dtype=torch.float64))


@pytest.mark.parametrize("N", [1, 2, 7, 18, 50, 333, 999, 1000])
def test_ddpm_timesteps_are_the_trailing_ones_of_diffusers(N: int) -> None:
    scheduler = DDIMScheduler(timestep_spacing="trailing")
    scheduler.set_timesteps(N)
    assert DDPM().time_grid(N)[:-1].tolist() == scheduler.timesteps.tolist()


# Inverses and derivatives


@continuous
def test_log_snr_inverts(process: Schedule) -> None:
    t = noisy_times(process, 30)
    torch.testing.assert_close(process.t_from_log_snr(process.log_snr(t)), t, rtol=1e-8, atol=1e-12)
    log_snr = torch.linspace(-8, 8, 33, dtype=torch.float64)
    torch.testing.assert_close(process.log_snr(process.t_from_log_snr(log_snr)), log_snr, rtol=0, atol=1e-8)


@discrete
def test_log_snr_inverts_to_the_nearest_timestep(process: DDPM) -> None:
    t = torch.arange(process.train_steps, dtype=torch.float64)
    log_snr = process.log_snr(t)
    torch.testing.assert_close(process.t_from_log_snr(log_snr), t, rtol=0, atol=0)
    torch.testing.assert_close(process.t_from_log_snr(log_snr[1:] + 0.49 * -log_snr.diff()), t[1:])
    assert process.t_from_log_snr(log_snr.float().view(2, -1)).dtype == torch.float32


@continuous
def test_derivatives_are_those_of_autograd(process: Schedule) -> None:
    t = torch.linspace(0.01, 0.99, 25, dtype=torch.float64, requires_grad=True)
    for value, derivative in ((process.alpha, process.alpha_dot), (process.sigma, process.sigma_dot)):
        y = value(t)
        if y.requires_grad:
            (witness,) = torch.autograd.grad(y.sum(), t)
        else:  # EDM's α is a constant
            witness = torch.zeros_like(t)
        torch.testing.assert_close(derivative(t.detach()), witness)


@continuous
@pytest.mark.parametrize("N", [2, 18])
def test_real_indices_and_times_invert(process: Schedule, N: int) -> None:
    index = torch.linspace(0, N - 1, 41, dtype=torch.float64)
    t = process.time(index, N)
    assert bool((t.diff() < 0).all())
    torch.testing.assert_close(process.index(t, N), index, rtol=0, atol=1e-9)
    torch.testing.assert_close(process.time(process.index(t, N), N), t, rtol=1e-9, atol=0)


@discrete
@pytest.mark.parametrize("N", [1, 18, 99, 100])
def test_whole_indices_and_timesteps_invert(process: Schedule, N: int) -> None:
    index = torch.arange(N, dtype=torch.float64)
    torch.testing.assert_close(process.index(process.time(index, N), N), index, rtol=0, atol=0)


@every_process
@pytest.mark.parametrize("N", [1, 2, 18])
def test_above_the_last_index_is_the_clean_state(process: Schedule, N: int) -> None:
    above = torch.tensor([N - 1 + 1e-6, N - 0.5, N, N + 7.25, math.inf], dtype=torch.float64)
    assert bool((process.time(above, N) == process.t_clean).all())
    clean = process.index(torch.tensor(process.t_clean), N)
    assert float(clean) > N - 1 and float(process.time(clean, N)) == process.t_clean
    # but a sum of fractions that is rounded up stays on the grid
    last = process.time(torch.tensor(N - 1), N)
    torch.testing.assert_close(process.time(torch.tensor(N - 1 + 1e-13, dtype=torch.float64), N), last)
    if process.continuous:
        assert float(process.time(process.index(last, N), N)) > 0


@continuous
def test_negative_indices_are_noisier_where_more_noise_exists(process: Schedule) -> None:
    t = process.time(torch.tensor([-0.5, 0.0], dtype=torch.float64), 8)
    if isinstance(process, EDM):
        assert t[0] > t[1]
    else:
        assert t[1] <= t[0] <= 1
    assert bool(torch.isfinite(torch.stack([process.alpha(t), process.sigma(t)])).all())
    assert float(process.alpha(t)[0]) >= 0


# What a network is told, dtypes


def test_edm_tells_a_network_a_quarter_of_log_sigma() -> None:
    sigma = torch.tensor([0.002, 1.0, 80.0], dtype=torch.float64)
    torch.testing.assert_close(EDM().c_noise(sigma), sigma.log() / 4)


@every_process
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_a_network_is_told_is_finite_and_falls_along_the_chain(
    process: Schedule, dtype: torch.dtype
) -> None:
    c_noise = process.c_noise(process.time_grid(18).to(dtype))
    assert c_noise.dtype == dtype
    assert bool(torch.isfinite(c_noise).all()) and bool((c_noise.diff() < 0).all())


@every_process
def test_float32_is_the_rounded_float64(process: Schedule) -> None:
    t = process.time_grid(18)
    t = t.float().double()
    for of_t in (process.alpha, process.sigma):
        value = of_t(t.float())
        assert value.dtype == torch.float32
        # the least noisy level decides training, so relative; α = 0 of pure noise is rounding there
        torch.testing.assert_close(value.double(), of_t(t), rtol=2e-5, atol=1e-7)


def test_cosine_is_never_negative() -> None:
    one = torch.ones(())
    assert float(one.mul(math.pi / 2).cos()) < 0  # float32
    assert float(VP("cosine", t_max=1.0).alpha(one)) == 0


def test_ddpm_takes_integer_timesteps() -> None:
    process, t = DDPM(), torch.tensor([[-1, 0], [7, 999]])
    for of_t in (process.alpha, process.sigma):
        assert of_t(t).dtype == torch.float64
        torch.testing.assert_close(of_t(t), of_t(t.double()), rtol=0, atol=0)


@every_process
def test_a_schedule_is_a_value(process: Schedule) -> None:
    process.time_grid(3)  # fills what is cached
    for twin in (copy.deepcopy(process), pickle.loads(pickle.dumps(process))):
        assert twin == process and hash(twin) == hash(process)
        torch.testing.assert_close(twin.sigma(twin.time_grid(5)), process.sigma(process.time_grid(5)))


# Errors


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: EDM(sigma_min=0.0), "sigma_min"),
        (lambda: EDM(sigma_min=2.0, sigma_max=1.0), "sigma_max"),
        (lambda: EDM(rho=0.0), r"rho is 0.0, but must lie in \[1, 100\]"),
        (lambda: VP("quadratic"), "linear and cosine, not 'quadratic'"),
        (lambda: VP(t_min=0.0), "t_min"),
        (lambda: VP(t_max=1.1), "t_max"),
        (lambda: VP(beta_min=0.0), "beta_min"),
        (lambda: DDPM(kind="sigmoid"), "linear and cosine, not 'sigmoid'"),
        (lambda: DDPM(train_steps=0), "train_steps is 0, but must be a whole number"),
        (lambda: DDPM(beta_end=1.0), "beta_end"),
        (lambda: Flow(shift=0.0), r"shift is 0.0, but must lie in \[0.001, 1000\]"),
        (lambda: Flow(t_min=0.0), r"t_min is 0.0, but must lie in \[1e-06, 1\)"),
        (lambda: EDM().time_grid(0), "num_steps is 0"),
        (lambda: DDPM().time_grid(1001), "only 1000 timesteps"),
        (lambda: DDPM().time(torch.tensor([0.5]), 10), "whole numbers"),
        (lambda: DDPM().alpha_dot(torch.zeros(1)), "discrete times"),
        (lambda: DDPM().sigma_dot(torch.zeros(1)), "discrete times"),
    ],
)
def test_a_bad_argument_is_named(wrong: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        wrong()


@pytest.mark.parametrize("t", [-2, 1000])
def test_ddpm_has_no_other_timesteps(t: int) -> None:
    with pytest.raises(IndexError, match=r"outside -1\.\.999"):
        DDPM().alpha(torch.tensor([t]))


@pytest.mark.parametrize(
    "process",
    [
        EDM(1e-6, 1e6),
        EDM(1e-6, 1e6, 1.0),
        EDM(1e-6, 1e6, 100.0),
        Flow(1000.0, t_min=1e-6),
        Flow(0.001),
        VP(beta_min=200.0, beta_max=200.0),
        VP(t_min=1e-6),
        VP("cosine", log_snr_max=30.0, input_scale=1000.0),
        DDPM(100_000, beta_start=1e-6, beta_end=1e-3),
    ],
)
def test_what_is_taken_at_its_limits_trains_and_samples(process: Schedule) -> None:
    """Finite losses, gradients and samples in float32; beyond these limits float32 is not enough."""
    torch.manual_seed(0)
    denoiser = Denoiser(MLP((2,), hidden=8), process)
    torch.nn.init.normal_(denoiser.network.last.weight)
    loss = ValueLoss(denoiser, lmbda=0.5)(sample_chain(process, torch.randn(8, 2), num_steps=9))["loss_value"]
    loss.backward()
    assert bool(loss.isfinite()) and all(bool(p.grad.isfinite().all()) for p in denoiser.parameters())
    assert bool(sample(denoiser.eval(), (4, 2), sampler=DDIM(), num_steps=9, seed=0).isfinite().all())
