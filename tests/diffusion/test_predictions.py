"""Prediction types by their definitions, and round trips."""

from typing import get_args

import pytest
import torch
from torch import Tensor

from diffrl.diffusion.exact import GaussianDenoiser
from diffrl.diffusion.posterior import marginal
from diffrl.diffusion.predictions import PredictionType, from_x0, scalings, to_x0
from diffrl.diffusion.schedules.base import Schedule
from diffrl.diffusion.schedules.ddpm import DDPM
from diffrl.diffusion.schedules.edm import EDM
from diffrl.diffusion.schedules.flow import Flow
from diffrl.diffusion.schedules.vp import VP
from tests.kit.oracles import continuous, every_process, noisy_times, randn

TYPES = get_args(PredictionType)
every_type = pytest.mark.parametrize("prediction_type", TYPES)
SIGMA_DATA = 0.7


def states(process: Schedule, N: int = 12) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """t, x_t and what it is made of: x0, eps."""
    t = noisy_times(process, N)
    x0, eps = randn(2, len(t), 3)
    return t, marginal(process, x0, t, eps), x0, eps


@every_process
@every_type
def test_predictions_and_clean_estimates_invert(process: Schedule, prediction_type: PredictionType) -> None:
    if prediction_type == "velocity" and not process.continuous:
        with pytest.raises(ValueError, match="discrete times"):
            scalings(process, torch.zeros(1), prediction_type, SIGMA_DATA)
        return
    t, x_t, x0, F_x = states(process)
    F_again = from_x0(
        process,
        to_x0(process, F_x, x_t, t, prediction_type, sigma_data=SIGMA_DATA),
        x_t,
        t,
        prediction_type,
        sigma_data=SIGMA_DATA,
    )
    torch.testing.assert_close(F_again, F_x, rtol=1e-7, atol=1e-7)
    x0_again = to_x0(
        process,
        from_x0(process, x0, x_t, t, prediction_type, sigma_data=SIGMA_DATA),
        x_t,
        t,
        prediction_type,
        sigma_data=SIGMA_DATA,
    )
    torch.testing.assert_close(x0_again, x0, rtol=1e-9, atol=1e-9)


@every_process
def test_definitions(process: Schedule) -> None:
    t, x_t, x0, eps = states(process)
    alpha, sigma = process.alpha(t)[:, None], process.sigma(t)[:, None]
    expected = {"x0": x0, "eps": eps, "v": alpha * eps - sigma * x0, "score": -eps / sigma}
    if isinstance(process, EDM):  # dx/dσ
        expected["velocity"] = eps
    if isinstance(process, Flow):
        expected["velocity"] = eps - x0
    for prediction_type, F_x in expected.items():
        F_again = from_x0(process, x0, x_t, t, prediction_type)
        torch.testing.assert_close(F_again, F_x, rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(to_x0(process, F_x, x_t, t, prediction_type), x0, rtol=1e-8, atol=1e-8)


@continuous
def test_velocity_is_the_derivative_of_the_path(process: Schedule) -> None:
    t, x_t, x0, eps = states(process)
    t = t.requires_grad_()
    path = marginal(process, x0, t, eps)
    slopes = [torch.autograd.grad(c.sum(), t, retain_graph=True)[0] for c in path.unbind(1)]
    velocity, t = torch.stack(slopes, 1), t.detach()
    torch.testing.assert_close(from_x0(process, x0, x_t, t, "velocity"), velocity, rtol=1e-8, atol=1e-8)


@every_process
def test_score_and_eps_of_a_gaussian(process: Schedule) -> None:
    """The exact denoiser's score is that of p(x_t), its eps -σ times that."""
    mean, covariance = torch.tensor([0.5, -1.0]).double(), torch.tensor([[1.0, 0.6], [0.6, 0.5]]).double()
    t = noisy_times(process, 8)
    x_t = randn(len(t), 2).requires_grad_()
    alpha, sigma = process.alpha(t), process.sigma(t)
    C = alpha[:, None, None] ** 2 * covariance + sigma[:, None, None] ** 2 * torch.eye(2)
    law = torch.distributions.MultivariateNormal(alpha[:, None] * mean, C)
    (score,) = torch.autograd.grad(law.log_prob(x_t).sum(), x_t)
    x_t = x_t.detach()
    D_x = GaussianDenoiser(process, mean, covariance)(x_t, t)
    torch.testing.assert_close(from_x0(process, D_x, x_t, t, "score"), score, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(
        from_x0(process, D_x, x_t, t, "eps"), -sigma[:, None] * score, rtol=1e-6, atol=1e-8
    )


@every_process
def test_edm_scales_input_and_target_to_unit_variance(process: Schedule) -> None:
    """For x0 ~ N(0, σd² I): Var(c_in x_t) = Var((x0 - c_skip x_t)/c_out) = 1, and no c_skip asks for less."""
    t = noisy_times(process, 12)
    alpha, sigma = process.alpha(t), process.sigma(t)
    c_skip, c_out, c_in = scalings(process, t, "edm", SIGMA_DATA)

    def variance(skip: Tensor) -> Tensor:  # of x0 - skip x_t
        return (1 - skip * alpha) ** 2 * SIGMA_DATA**2 + (skip * sigma) ** 2

    one = torch.ones_like(t)
    torch.testing.assert_close(c_in**2 * (alpha**2 * SIGMA_DATA**2 + sigma**2), one)
    torch.testing.assert_close(variance(c_skip) / c_out**2, one, rtol=1e-6, atol=0)
    assert bool((variance(c_skip * 1.1) > variance(c_skip)).all())
    assert bool((variance(c_skip * 0.9) > variance(c_skip)).all())


def test_edm_scalings_are_those_of_table_1() -> None:
    sigma, sd = torch.tensor([0.002, 0.3, 5.0, 80.0], dtype=torch.float64), 0.5
    c_skip, c_out, c_in = scalings(EDM(), sigma, "edm", sd)
    torch.testing.assert_close(c_skip, sd**2 / (sigma**2 + sd**2))
    torch.testing.assert_close(c_out, sigma * sd / (sd**2 + sigma**2) ** 0.5)
    torch.testing.assert_close(c_in, 1 / (sigma**2 + sd**2) ** 0.5)


@every_type
def test_pure_noise(prediction_type: PredictionType) -> None:
    """x0, v, velocity and edm are defined at flow's t = 1; eps and score do not determine x0 there."""
    c_skip, c_out, _ = scalings(Flow(), torch.ones(1), prediction_type, SIGMA_DATA)
    assert bool(torch.isfinite(torch.cat([c_skip, c_out])).all()) == (prediction_type not in ("eps", "score"))


@pytest.mark.parametrize("event", [(4,), (4, 4, 4)])
@every_type
def test_times_belong_to_states_not_to_coordinates(
    event: tuple[int, ...], prediction_type: PredictionType
) -> None:
    """As many states as coordinates: a broadcast along the wrong dim would go unnoticed."""
    process, t = VP(), torch.tensor([0.2, 0.4, 0.6, 0.8])
    x_t, F_x = randn(2, 4, *event, dtype=torch.float32)
    together = to_x0(process, F_x, x_t, t, prediction_type, sigma_data=0.5)
    assert together.dtype == torch.float32 and together.shape == x_t.shape
    for n in range(4):
        alone = to_x0(process, F_x[n], x_t[n], t[n], prediction_type, sigma_data=0.5)
        torch.testing.assert_close(together[n], alone)
    chain = to_x0(process, F_x[None], x_t[None], t[None, :, None].double(), prediction_type, sigma_data=0.5)
    assert chain.dtype == torch.float32
    torch.testing.assert_close(chain[0], together)


def test_errors() -> None:
    x, t = torch.zeros(1, 2), torch.ones(1)
    with pytest.raises(ValueError, match="prediction_type is 'flow'.*x0, eps, v, velocity, score, edm"):
        scalings(EDM(), t, "flow", 0.5)
    for convert in (to_x0, from_x0):
        with pytest.raises(ValueError, match="give sigma_data"):
            convert(EDM(), x, x, t, "edm")
        with pytest.raises(ValueError, match="discrete times"):
            convert(DDPM(), x, x, t, "velocity")
