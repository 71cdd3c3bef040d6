"""Improved MeanFlow against finite differences, MeanFlow, flow matching, and the exact map of Gaussian data."""

import math

import pytest
import torch

from diffrl.diffusion.schedules.base import Schedule
from diffrl.diffusion.schedules.flow import Flow
from diffrl.objectives.maps.improved_mean_flow import ImprovedMeanFlowLoss, ImprovedMeanFlowPairs
from diffrl.objectives.maps.mean_flow import MeanFlowLoss
from tests.kit.maps import PROCESSES, ExactMaps, average_velocity, gradient, states, two_times

every_straight = pytest.mark.parametrize("process", PROCESSES, ids=["flow", "edm"])


@every_straight
@pytest.mark.parametrize("p", [0.0, 1.0])
def test_the_loss_by_finite_differences(process: Schedule, p: float) -> None:
    denoiser, s = two_times(process), states(process)
    loss = ImprovedMeanFlowLoss(denoiser, p=p)(s)["loss_value"]
    x, t, r, v = (s[k][:, 0] for k in ("x_t", "t", "r", "v"))
    t, r, h = t[:, 0], r[:, 0], 1e-5
    with torch.no_grad():
        w = average_velocity(denoiser, x, t, t)
        ahead, behind = (average_velocity(denoiser, x + k * h * w, t + k * h, r) for k in (1, -1))
        ahead = (t - r)[:, None] * (ahead - behind) / (2 * h)
    square = (average_velocity(denoiser, x, t, r) + ahead - v).square().sum(1)
    expected = (square / (square.detach() + 0.01) ** p).mean()
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(gradient(loss, denoiser), gradient(expected, denoiser), rtol=1e-5, atol=1e-7)


@every_straight
def test_it_is_mean_flow_where_the_predicted_velocity_is_the_data(process: Schedule) -> None:
    denoiser, s = two_times(process), states(process)
    with torch.no_grad():
        s["v"] = average_velocity(denoiser, s["x_t"][:, 0], s["t"].flatten(), s["t"].flatten())[:, None]
    improved, plain = (
        kind(denoiser, p=0.5, c=0.1)(s)["loss_value"] for kind in (ImprovedMeanFlowLoss, MeanFlowLoss)
    )
    torch.testing.assert_close(improved, plain)
    torch.testing.assert_close(gradient(improved, denoiser), gradient(plain, denoiser))


@every_straight
def test_at_r_of_t_it_is_flow_matching(process: Schedule) -> None:
    denoiser = two_times(process)
    t = states(process)["t"].flatten()
    s = states(process, r=t, t=t)
    loss = ImprovedMeanFlowLoss(denoiser, p=0)(s)["loss_value"]
    x, v = s["x_t"][:, 0], s["v"][:, 0]
    expected = ((x - denoiser(x, t)) / t[:, None] - v).square().sum(1).mean()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient(loss, denoiser), gradient(expected, denoiser))


@every_straight
def test_the_gradient_is_zero_on_average_at_the_exact_map(process: Schedule) -> None:
    """Row by row it is 2 (V - v)·∂u/∂θ, of which V - v is the error of the data, with mean 0 given x."""
    exact, n = ExactMaps(process), 4000
    t = torch.full((n,), 0.7, dtype=torch.float64)
    s = states(process, n, t=t, r=torch.zeros_like(t))
    loss = ImprovedMeanFlowLoss(exact, p=0)
    slope = float(gradient(loss(s)["loss_value"], exact))
    exact.requires_grad_(False)
    x, v = s["x_t"][:, 0], s["v"][:, 0]
    velocity = average_velocity(exact, x, t, t)
    rows = (2 * (velocity - v) * -x / t[:, None]).sum(1)
    assert slope == pytest.approx(float(rows.mean()), abs=1e-9)
    assert abs(slope) < 4 * float(rows.std()) / math.sqrt(n)


def test_half_of_its_states_have_a_jump() -> None:
    s = ImprovedMeanFlowPairs(Flow())(torch.zeros(1000, 1), generator=torch.Generator().manual_seed(0))
    assert abs(float((s["r"] < s["t"]).double().mean()) - 0.5) < 4 * 0.5 / math.sqrt(1000)
