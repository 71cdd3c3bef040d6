"""MeanFlow against finite differences, flow matching at r = t, and the exact map of Gaussian data."""

import math

import pytest
import torch
from torch import Tensor

from diffrl.diffusion.schedules.base import Schedule
from diffrl.objectives.maps.mean_flow import MeanFlowLoss
from tests.kit.maps import PROCESSES, ExactMaps, average_velocity, gradient, states, two_times

every_straight = pytest.mark.parametrize("process", PROCESSES, ids=["flow", "edm"])


@every_straight
@pytest.mark.parametrize("p", [0.0, 0.75])
def test_the_loss_by_finite_differences(process: Schedule, p: float) -> None:
    denoiser, s = two_times(process), states(process)
    loss = MeanFlowLoss(denoiser, p=p, c=0.01)(s)["loss_value"]
    x, t, r, v = (s[k][:, 0] for k in ("x_t", "t", "r", "v"))
    t, r, h = t[:, 0], r[:, 0], 1e-5
    with torch.no_grad():
        ahead, behind = (average_velocity(denoiser, x + k * h * v, t + k * h, r) for k in (1, -1))
        target = v - (t - r)[:, None] * (ahead - behind) / (2 * h)
    square = (average_velocity(denoiser, x, t, r) - target).square().sum(1)
    expected = (square / (square.detach() + 0.01) ** p).mean()
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(gradient(loss, denoiser), gradient(expected, denoiser), rtol=1e-5, atol=1e-7)


@every_straight
def test_at_r_of_t_it_is_flow_matching(process: Schedule) -> None:
    denoiser = two_times(process)
    t = states(process)["t"].flatten()
    s = states(process, r=t, t=t)
    loss = MeanFlowLoss(denoiser, p=0)(s)["loss_value"]
    x, v = s["x_t"][:, 0], s["v"][:, 0]
    u = (x - denoiser(x, t)) / t[:, None]
    expected = (u - v).square().sum(1).mean()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient(loss, denoiser), gradient(expected, denoiser))


@every_straight
def test_the_gradient_is_zero_on_average_at_the_exact_map(process: Schedule) -> None:
    exact = ExactMaps(process)
    n = 4000
    t = torch.full((n,), 0.7, dtype=torch.float64)
    s = states(process, n, t=t, r=0.3 * t)
    s["v"] = s["v"].clone()
    losses = []
    for sign in (
        1,
        -1,
    ):  # the derivative of the loss of each row in θ, by finite differences with the target held
        with torch.no_grad():
            exact.theta.fill_(sign * 1e-4)
        losses.append(row_losses(exact, s, sign))
    slope = (losses[0] - losses[1]) / 2e-4
    assert abs(float(slope.mean())) < 4 * float(slope.std()) / math.sqrt(n)


def row_losses(exact: ExactMaps, s: object, sign: int) -> Tensor:
    """Of u at ±θ against the target at θ = 0."""
    x, t, r, v = (s[k][:, 0] for k in ("x_t", "t", "r", "v"))
    t, r, theta = t[:, 0], r[:, 0], exact.theta.data.clone()
    u = average_velocity(exact, x, t, r)
    exact.theta.data.zero_()
    du = torch.func.jvp(lambda x, t: average_velocity(exact, x, t, r), (x, t), (v, torch.ones_like(t)))[1]
    exact.theta.data.copy_(theta)
    return (u - (v - (t - r)[:, None] * du)).square().sum(1).detach()
