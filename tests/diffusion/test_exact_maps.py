"""The exact flow map of a known law against closed forms, another integrator, its own pieces, and the ODE itself."""

from typing import Any

import pytest
import torch
from torch import Tensor

from diffrl.data.synthetic import gmm
from diffrl.diffusion.adaptive_steps import integrate
from diffrl.diffusion.denoisers import Denoiser
from diffrl.diffusion.exact import EmpiricalDenoiser, GaussianDenoiser, MixtureDenoiser
from diffrl.diffusion.exact_maps import ExactFlowMap
from diffrl.diffusion.flow_maps import flow_map
from diffrl.diffusion.networks.mlp import MLP
from diffrl.diffusion.posterior import marginal
from diffrl.diffusion.samplers.base import velocity
from diffrl.diffusion.samplers.flow_map import FlowMap
from diffrl.diffusion.samplers.loop import sample
from diffrl.diffusion.schedules.base import Schedule
from diffrl.diffusion.schedules.ddpm import DDPM
from diffrl.diffusion.schedules.edm import EDM
from diffrl.diffusion.schedules.flow import Flow
from diffrl.diffusion.schedules.vp import VP
from diffrl.errors import InputError, InputTypeError
from diffrl.extras import require
from tests.diffusion.test_flow_maps import followed, gaussian, pairs
from tests.kit.oracles import every_process, randn

DATA = gmm(dim=16)
SOME = [EDM(), Flow(), VP("cosine"), DDPM()]
some = pytest.mark.parametrize("process", SOME, ids=lambda p: type(p).__name__)
two = pytest.mark.parametrize("process", SOME[:2], ids=lambda p: type(p).__name__)


def mixture(process: Schedule) -> MixtureDenoiser:
    law = DATA.mixture
    assert law is not None
    return MixtureDenoiser(process, law.means, law.stds, law.weights)


def states(process: Schedule, t: Tensor, n: int = 40) -> tuple[Tensor, Tensor]:
    """States of test points at one time, and the time of each."""
    times = t.double().expand(n)
    return marginal(process, DATA.test[:n].double(), times, randn(n, 16)), times


def clean(process: Schedule, x: Tensor) -> Tensor:
    return torch.full((len(x),), process.t_clean, dtype=torch.float64)


# --- closed forms


@every_process
def test_the_map_of_normal_data_is_the_closed_form(process: Schedule) -> None:
    x, t, r = pairs(process)
    exact = ExactFlowMap(gaussian(process))
    torch.testing.assert_close(exact.map(x, t, r), followed(process, x, t, r), rtol=1e-8, atol=1e-8)
    up = process.alpha(t) > 0  # and back, where the way is not infinitely long
    start = followed(process, x, t, r)
    noisy = up & (r != process.t_clean)
    back = exact.map(start[noisy], r[noisy], t[noisy])
    torch.testing.assert_close(back, x[noisy], rtol=1e-6, atol=1e-6)


@some
def test_one_point_draws_everything_to_it(process: Schedule) -> None:
    point = torch.tensor([[0.3, -1.2]], dtype=torch.float64)
    x, t, r = pairs(process)
    x = x[:, :2]
    found = ExactFlowMap(EmpiricalDenoiser(process, point)).map(x, t, r)
    kappa = (process.sigma(r) / process.sigma(t))[:, None]
    line = process.alpha(r)[:, None] * point + kappa * (x - process.alpha(t)[:, None] * point)
    torch.testing.assert_close(found, line, rtol=1e-8, atol=1e-8)


def test_the_middle_of_a_symmetric_law_stays() -> None:
    means = torch.tensor([[1.0], [-1.0]])
    law = MixtureDenoiser(Flow(), means, torch.full((2,), 0.1), torch.ones(2))
    x, one = torch.zeros(1, 1).double(), torch.ones(1).double()
    assert float(ExactFlowMap(law).map(x, one, 0 * one)) == 0.0


# --- the mixture in 16 dimensions


@some
def test_a_map_in_two_pieces_is_the_map(process: Schedule) -> None:
    exact, grid = ExactFlowMap(mixture(process)), process.time_grid(6)
    x, t = states(process, grid[0])
    s = grid[3].expand_as(t)
    whole = exact.map(x, t, clean(process, x))
    pieces = exact.map(exact.map(x, t, s), s, clean(process, x))
    torch.testing.assert_close(pieces, whole, rtol=0, atol=1e-7)
    assert float((whole[:, None] - DATA.mixture.means).norm(dim=2).min(1).values.max()) < 0.05 * 4 * 2


def test_another_integrator_in_another_variable_agrees() -> None:
    solve = require("scipy.integrate", "eval").solve_ivp
    process, oracle = EDM(), mixture(EDM())
    x, t = states(process, torch.tensor(80.0), 3)

    def slope(s: float, flat: Any) -> Any:
        y = torch.from_numpy(flat).view(3, 16)
        return ((y - oracle(y, torch.full((3,), s).double())) / s).flatten().numpy()

    low = 1e-4
    found = solve(slope, (80.0, low), x.flatten().numpy(), method="DOP853", rtol=1e-10, atol=1e-10).y[:, -1]
    exact = ExactFlowMap(oracle).map(x, t, torch.full((3,), low).double())
    torch.testing.assert_close(exact.flatten(), torch.from_numpy(found.copy()), rtol=0, atol=1e-7)


@two
def test_the_map_moves_with_the_velocity(process: Schedule) -> None:
    oracle, grid = mixture(process), process.time_grid(6)
    exact, r, h = ExactFlowMap(oracle, rtol=1e-11), grid[3], 1e-3 * float(grid[3])
    x, t = states(process, grid[1], 8)
    ahead, behind = (exact.map(x, t, (r + step).expand_as(t)) for step in (h, -h))
    far, near = (exact.map(x, t, (r + 2 * step).expand_as(t)) for step in (h, -h))
    slope = (8 * (ahead - behind) - (far - near)) / (12 * h)
    X = exact.map(x, t, r.expand_as(t))
    expected = velocity(process, X, oracle(X, r.expand_as(t)), r)
    torch.testing.assert_close(slope, expected, rtol=1e-5, atol=1e-5)


def test_a_row_does_not_depend_on_the_others() -> None:
    exact = ExactFlowMap(mixture(Flow()))
    x, t = states(Flow(), torch.tensor(1.0), 5)
    r = torch.linspace(0, 0.9, 5).double()
    whole = exact.map(x, t, r)
    parts = torch.cat([exact.map(x[i : i + 1], t[i : i + 1], r[i : i + 1]) for i in range(5)])
    torch.testing.assert_close(parts, whole, rtol=1e-11, atol=1e-11)


# --- as a denoiser of two times


@some
def test_as_a_denoiser_it_is_its_own_map_and_the_oracle_on_the_diagonal(process: Schedule) -> None:
    exact, oracle, grid = ExactFlowMap(mixture(process)), mixture(process), process.time_grid(5)
    x, t = states(process, grid[1], 12)
    r = torch.cat([t[:4], grid[3].expand(4), clean(process, x[:4])])
    D_x = exact(x, t, None, r)
    assert torch.equal(exact(x, t), oracle(x, t)) and torch.equal(D_x[:4], oracle(x[:4], t[:4]))
    torch.testing.assert_close(flow_map(exact, x, t, r)[4:], exact.map(x, t, r)[4:], rtol=1e-12, atol=1e-10)
    assert exact(x.float(), t.float(), None, r.float()).dtype == torch.float32


@two
def test_samples_of_one_step_are_those_of_eighteen(process: Schedule) -> None:
    exact, made = ExactFlowMap(mixture(process)), {"sampler": FlowMap(), "seed": 0, "dtype": torch.float64}
    one, many = (sample(exact, (10, 16), num_steps=n, **made) for n in (1, 18))
    torch.testing.assert_close(one, many, rtol=0, atol=1e-6)


# --- the integrator and what is refused


def test_the_integrator_follows_a_rotation_either_way_and_stands_still() -> None:
    angle = torch.tensor([2.0, -3.0, 0.0], dtype=torch.float64)
    x = torch.tensor([[1.0, 0.0]], dtype=torch.float64).repeat(3, 1)

    def slope(x: Tensor, tau: Tensor) -> Tensor:
        return torch.stack([-x[:, 1], x[:, 0]], 1)

    found = integrate(slope, x, 0 * angle, angle, rtol=1e-11)
    torch.testing.assert_close(found, torch.stack([angle.cos(), angle.sin()], 1), rtol=0, atol=1e-9)


def test_an_equation_without_a_solution_is_refused() -> None:
    one = torch.ones(1, dtype=torch.float64)
    with pytest.raises(InputError, match="no step of the equation has an error of rtol 1e-09"):
        integrate(lambda x, tau: x**2, one[:, None], 0 * one, 2 * one, rtol=1e-9)  # infinite at τ = 1


def test_what_is_no_exact_map_is_refused() -> None:
    exact, x, t = ExactFlowMap(mixture(EDM())), randn(2, 16), torch.ones(2).double()
    with pytest.raises(InputTypeError, match="oracle is a Denoiser: give an exact denoiser"):
        ExactFlowMap(Denoiser(MLP((16,)), EDM()))
    with pytest.raises(InputError, match="rtol is 0"):
        ExactFlowMap(GaussianDenoiser(EDM(), torch.zeros(1), torch.eye(1)), rtol=0)
    with pytest.raises(InputError, match="t is clean in some row"):
        exact.map(x, 0 * t, 0 * t)
    with pytest.raises(InputError, match=r"r has shape \(1,\)"):
        exact(x, t, None, t[:1])
    with pytest.raises(InputError, match="hold NaN or infinity"):
        exact.map(x * torch.nan, t, 0 * t)
