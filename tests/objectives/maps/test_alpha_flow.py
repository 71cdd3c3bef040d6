"""α-Flow against a plain loop, and against what it is at both ends and at one half."""

import math

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor

from diffrl.diffusion.flow_maps import flow_map
from diffrl.diffusion.schedules.base import Schedule
from diffrl.diffusion.schedules.flow import Flow
from diffrl.errors import InputError
from diffrl.objectives.maps.alpha_flow import AlphaFlowLoss, alpha_at
from diffrl.objectives.maps.mean_flow import MeanFlowLoss
from diffrl.objectives.maps.shortcut import ShortcutLoss
from tests.kit.maps import DIM, PROCESSES, ExactMaps, average_velocity, gradient, states, two_times

every_straight = pytest.mark.parametrize("process", PROCESSES, ids=["flow", "edm"])


def entries(s: TensorDict) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return s["x_t"][:, 0], s["t"].flatten(), s["r"].flatten(), s["v"][:, 0]


@every_straight
@pytest.mark.parametrize("p", [0.0, 1.0])
def test_the_loss_by_a_plain_loop(process: Schedule, p: float) -> None:
    """Clean data and r = t are among the times."""
    denoiser, s, α, c = two_times(process), states(process), 0.3, 0.2
    r = s["r"].clone()
    r[0], r[1] = 0, s["t"][1]
    s["r"] = r
    loss = AlphaFlowLoss(denoiser, alpha=α, p=p, c=c)(s)["loss_value"]
    total = torch.zeros((), dtype=torch.float64)
    for i, (x, t, r, v) in enumerate(zip(*entries(s), strict=True)):
        mid = α * r + (1 - α) * t
        with torch.no_grad():
            x_s = x0_path(s, i, mid, process)
            y = (
                v
                if i == 1
                else α * v + (1 - α) * average_velocity(denoiser, x_s[None], mid[None], r[None])[0]
            )
        square = (average_velocity(denoiser, x[None], t[None], r[None])[0] - y).square().mean()
        total = total + (1 if i == 1 else α ** (2 * p - 1)) * square / (square.detach() + c) ** p
    torch.testing.assert_close(loss, total / len(s))
    torch.testing.assert_close(gradient(loss, denoiser), gradient(total / len(s), denoiser))


def x0_path(s: TensorDict, i: int, mid: Tensor, process: Schedule) -> Tensor:
    """The state at another time of the same datum and noise."""
    x, t, _, _ = entries(s)
    x0 = s["x0"][i, 0]
    noise = (x[i] - process.alpha(t[i]) * x0) / t[i]
    return process.alpha(mid) * x0 + mid * noise


@every_straight
@pytest.mark.parametrize("p", [0.0, 1.0])
def test_at_zero_it_is_mean_flow(process: Schedule, p: float) -> None:
    """The norms differ: a mean over dimensions, and a sum."""
    denoiser, s = two_times(process), states(process)
    loss = AlphaFlowLoss(denoiser, alpha=0, p=p, c=0.1)(s)["loss_value"]
    expected = MeanFlowLoss(denoiser, p=p, c=0.1 * DIM)(s)["loss_value"] * DIM ** (p - 1)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient(loss, denoiser), gradient(expected, denoiser))


@every_straight
def test_towards_zero_its_gradient_becomes_mean_flows(process: Schedule) -> None:
    denoiser, s = two_times(process), states(process)
    limit = gradient(AlphaFlowLoss(denoiser, alpha=0, p=0)(s)["loss_value"], denoiser)
    errors = [
        float((gradient(AlphaFlowLoss(denoiser, alpha=α, p=0)(s)["loss_value"], denoiser) - limit).norm())
        for α in (2e-4, 1e-4)
    ]
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.05)
    assert errors[1] < 1e-2 * float(limit.norm())


@every_straight
def test_at_one_it_is_flow_matching_for_every_r(process: Schedule) -> None:
    denoiser, s = two_times(process), states(process)
    loss = AlphaFlowLoss(denoiser, alpha=1, p=0)
    x, t, r, v = entries(s)
    expected = (average_velocity(denoiser, x, t, r) - v).square().mean()
    torch.testing.assert_close(loss(s)["loss_value"], expected)
    assert loss.network_evaluations == len(s)


def test_at_one_half_along_the_networks_own_step_it_is_a_shortcut() -> None:
    denoiser, s = two_times(Flow()), states(Flow())
    with torch.no_grad():
        x, t, r, _ = entries(s)
        s["v"] = average_velocity(denoiser, x, t, (t + r) / 2)[:, None]
    loss = AlphaFlowLoss(denoiser, alpha=0.5, p=0)(s)["loss_value"] / 2
    expected = ShortcutLoss(denoiser, bootstrap="own", finest=2**20)(s)["loss_value"]
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient(loss, denoiser), gradient(expected, denoiser))


@pytest.mark.parametrize("α", [0.5, 0.2])
def test_the_bias_at_the_exact_map_is_that_of_an_euler_step(α: float) -> None:
    """The mean gradient is not 0, but what u after an Euler step along the ODE makes of it."""
    exact, n = ExactMaps(Flow(), 0.5), 40_000
    t = torch.full((n,), 0.9, dtype=torch.float64)
    s = states(Flow(), n, 0.5, t=t, r=0.1 * t)
    slope = float(gradient(AlphaFlowLoss(exact, alpha=α, p=0)(s)["loss_value"], exact))
    exact.requires_grad_(False)
    x, t, r, v = entries(s)
    mid = α * r + (1 - α) * t
    euler = x - (t - mid)[:, None] * average_velocity(exact, x, t, t)
    bias = (flow_map(exact, x, t, r) - flow_map(exact, euler, mid, r)) / (t - r)[:, None]
    expected = (2 / α * -bias * -x / t[:, None]).mean(1)
    y = α * v + (1 - α) * average_velocity(exact, x - (t - mid)[:, None] * v, mid, r)
    rows = (2 / α * (average_velocity(exact, x, t, r) - y) * -x / t[:, None]).mean(1)
    noise = float((rows - expected).std()) / math.sqrt(n)
    assert abs(slope - float(expected.mean())) < 4 * noise
    assert abs(float(expected.mean())) > 8 * noise  # so the test would see it if there were none


def test_how_it_moves_along_the_training() -> None:
    loss = AlphaFlowLoss(two_times(Flow()))
    seen = []
    for step in range(1000):
        loss.set_progress(step, 1000)
        seen.append(loss.alpha)
    assert seen[0] == 1 and seen[-1] == 0 and seen == sorted(seen, reverse=True)
    assert (
        seen.count(1.0) == seen.count(0.0) == sum(25 * (0.5 - k / 999) > math.log(199) for k in range(1000))
    )
    assert loss.moving == {"alpha"} and AlphaFlowLoss(two_times(Flow()), alpha=0.5).moving == frozenset()
    assert alpha_at(0, 1) == 1
    annealed = AlphaFlowLoss(two_times(Flow()), anneal={"alpha": [1, 0]})
    annealed.set_progress(1, 3)
    assert annealed.alpha == 0.5
    with pytest.raises(InputError, match="annealed too"):
        AlphaFlowLoss(two_times(Flow()), alpha=0.5, anneal={"alpha": [1, 0]})
