"""Flow maps by a denoiser of two times, and their sampler: the form, its limits and derivatives, on every process."""

from typing import Any

import pytest
import torch
from torch import Tensor

from diffrl.diffusion.denoisers import Denoiser
from diffrl.diffusion.exact import GaussianDenoiser
from diffrl.diffusion.flow_maps import average_estimate, flow_map
from diffrl.diffusion.networks.mlp import MLP
from diffrl.diffusion.posterior import posterior
from diffrl.diffusion.samplers.base import velocity
from diffrl.diffusion.samplers.counting import grid_for
from diffrl.diffusion.samplers.flow_map import FlowMap
from diffrl.diffusion.samplers.loop import sample
from diffrl.diffusion.samplers.ode import Heun
from diffrl.diffusion.schedules.base import Schedule
from diffrl.diffusion.schedules.ddpm import DDPM
from diffrl.diffusion.schedules.edm import EDM
from diffrl.diffusion.schedules.flow import Flow
from diffrl.errors import InputError
from tests.kit.oracles import continuous, every_process, randn

MEAN = torch.tensor([0.5, -0.3, 0.2], dtype=torch.float64)
AXES = torch.block_diag(torch.linalg.qr(randn(2, 2, seed=9)).Q, torch.ones(1, 1)).double()
VARIANCES = torch.tensor([0.5, 0.02, 0.0], dtype=torch.float64)  # data lie in a plane


def gaussian(process: Schedule) -> GaussianDenoiser:
    return GaussianDenoiser(process, MEAN, AXES * VARIANCES @ AXES.T)


def pairs(process: Schedule, levels: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    """x, t and r for every t > r of a grid, pure noise and clean data included."""
    grid = process.time_grid(levels)
    i, j = torch.triu_indices(levels + 1, levels + 1, 1)
    t, r = grid[i], grid[j]
    return torch.hypot(process.alpha(t), process.sigma(t))[:, None] * randn(len(t), 3), t, r


def followed(process: Schedule, x: Tensor, t: Tensor, r: Tensor) -> Tensor:
    """The closed form: the ODE scales an axis of the state by its standard deviation, around its mean."""
    (alpha_t, sigma_t), (alpha_r, sigma_r) = (
        (process.alpha(s)[:, None], process.sigma(s)[:, None]) for s in (t, r)
    )
    n_t, n_r = (a**2 * VARIANCES + s**2 for a, s in ((alpha_t, sigma_t), (alpha_r, sigma_r)))
    return alpha_r * MEAN + ((x - alpha_t * MEAN) @ AXES * (n_r / n_t).sqrt()) @ AXES.T


# --- the form


@every_process
def test_the_map_of_normal_data_is_the_closed_form(process: Schedule) -> None:
    x, t, r = pairs(process)
    X = flow_map(gaussian(process), x, t, r)
    torch.testing.assert_close(X, followed(process, x, t, r), rtol=1e-9, atol=1e-11)


@every_process
def test_at_r_equal_to_t_it_is_the_denoiser_and_the_map_stays(process: Schedule) -> None:
    x, t, _ = pairs(process)
    exact = gaussian(process)
    torch.testing.assert_close(exact(x, t, None, t), exact(x, t), rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(flow_map(exact, x, t, t), x, rtol=1e-12, atol=1e-12)


@every_process
def test_the_map_is_a_deterministic_step_of_ddim_with_the_average_estimate(process: Schedule) -> None:
    x, t, r = pairs(process)
    torch.manual_seed(0)
    network = MLP((3,), hidden=8, depth=1, second_time=True)
    torch.nn.init.normal_(network.last.weight)
    denoiser = Denoiser(network.double(), process).requires_grad_(False)
    A, kappa, _ = (c[:, None] for c in posterior(process, t, r, 0.0))
    D_x = denoiser(x, t, None, r)
    X = flow_map(denoiser, x, t, r)
    torch.testing.assert_close(X, A * D_x + kappa * x, rtol=1e-12, atol=1e-12)
    clean = r == process.t_clean
    torch.testing.assert_close(X[clean], D_x[clean], rtol=0, atol=0)
    torch.testing.assert_close(average_estimate(process, X, x, t, r), D_x, rtol=1e-6, atol=1e-6)


def test_on_flow_a_velocity_network_is_the_average_velocity() -> None:
    class U(torch.nn.Module):
        second_time = True

        def forward(self, x: Tensor, c_noise: Tensor, cond: Tensor | None, c_noise_r: Tensor) -> Tensor:
            return x * c_noise[:, None] + c_noise_r[:, None]

    x, t, r = pairs(Flow())
    denoiser = Denoiser(U(), Flow(), prediction_type="velocity", scale_input=False)
    u = x * t[:, None] + r[:, None]
    torch.testing.assert_close(flow_map(denoiser, x, t, r), x - (t - r)[:, None] * u)
    torch.testing.assert_close(denoiser(x, t, None, r), x - t[:, None] * u)


def test_it_is_the_mean_of_the_estimate_along_the_path_with_weight_one_over_s_squared() -> None:
    process, exact = EDM(), gaussian(EDM())
    t, r = torch.tensor(3.0, dtype=torch.float64), torch.tensor(0.2, dtype=torch.float64)
    x = randn(1, 3) * 3
    n = 20_000
    w = ((torch.arange(n).double() + 0.5) / n) * (
        1 / r - 1 / t
    ) + 1 / t  # w = 1/s is even: the weight is 1/s²
    path = followed(process, x.expand(n, 3), t.expand(n), 1 / w)
    mean = exact(path, 1 / w).mean(0, keepdim=True)
    torch.testing.assert_close(exact(x, t.view(1), None, r.view(1)), mean, rtol=1e-7, atol=1e-8)


# --- derivatives


@continuous
def test_the_map_moves_with_the_velocity_where_it_is(process: Schedule) -> None:
    x, t, r = (a[:-1] for a in pairs(process))
    inner = (r != process.t_clean) & (process.alpha(t) > 0)
    x, t, r = x[inner], t[inner], r[inner]
    exact = gaussian(process)
    X, slope = torch.func.jvp(lambda r: flow_map(exact, x, t, r), (r,), (torch.ones_like(r),))[:2]
    torch.testing.assert_close(slope, velocity(process, X, exact(X, r), r), rtol=1e-7, atol=1e-9)


@continuous
def test_the_map_is_the_same_from_every_state_of_a_path(process: Schedule) -> None:
    # ∂_t X + ∇X · v = 0, with the clean end too: its time has no tangent
    x, t, r = pairs(process)
    inner = process.alpha(t) > 0
    x, t, r = x[inner], t[inner], r[inner]
    exact = gaussian(process)
    v = velocity(process, x, exact(x, t), t)
    slope = torch.func.jvp(lambda x, t: flow_map(exact, x, t, r), (x, t), (v, torch.ones_like(t)))[1]
    assert float((slope.abs() / (1 + v.abs())).max()) < 1e-9


# --- the sampler


@every_process
def test_one_step_of_an_exact_map_is_as_good_as_many(process: Schedule) -> None:
    made: dict[str, Any] = {"sampler": FlowMap(), "seed": 0, "dtype": torch.float64}
    one, many = (sample(gaussian(process), (50, 3), num_steps=n, **made) for n in (1, 18))
    torch.testing.assert_close(one, many, rtol=1e-9, atol=1e-9)
    plane = (many - MEAN) @ AXES
    assert float(plane[:, 2].abs().max()) < 1e-9  # on the data's plane, as no sampler of finite steps is
    assert float(plane[:, 0].std()) == pytest.approx(0.5**0.5, rel=0.3)


def test_many_steps_of_heun_come_to_the_samples_of_one_jump() -> None:
    made: dict[str, Any] = {"seed": 0, "dtype": torch.float64}
    jump = sample(gaussian(EDM()), (20, 3), sampler=FlowMap(), num_steps=1, **made)
    walk = sample(gaussian(EDM()), (20, 3), sampler=Heun(), num_steps=400, **made)
    torch.testing.assert_close(walk, jump, rtol=0, atol=2e-3)


def test_the_sampler_evaluates_once_a_step_and_asks_for_a_second_time() -> None:
    assert [grid_for(FlowMap(), Flow(), nfe) for nfe in (1, 4)] == [1, 4]
    plain = Denoiser(MLP((3,)), Flow())
    with pytest.raises(InputError, match="this Denoiser has no second time r: .*network.second_time=true"):
        sample(plain, (2, 3), sampler=FlowMap(), num_steps=2, seed=0)


# --- what is refused


def test_what_is_no_map_is_refused() -> None:
    x, t = randn(4, 3), torch.full((4,), 0.5).double()
    with pytest.raises(InputError, match="has no second time"):
        flow_map(Denoiser(MLP((3,)).double(), EDM()), x, t, t)
    with pytest.raises(InputError, match=r"r has shape \(3,\)"):
        flow_map(gaussian(DDPM()), x, t, t[:3])
    with pytest.raises(InputError, match="r is t in some row"):
        average_estimate(EDM(), x, x, t, t)
