"""sCT against finite differences, what it is at both ends of its warm-up, and its solution on normal data."""

import math
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor, nn

from diffrl.diffusion.schedules.edm import EDM
from diffrl.diffusion.schedules.flow import Flow
from diffrl.errors import InputError
from diffrl.objectives.continuous_ct import ContinuousConsistencyLoss, sample_trigflow_states
from diffrl.objectives.denoising import sample_log_normal_states
from tests.kit.oracles import Estimate, assert_within, generator
from tests.kit.value_loss import (
    PROCESS,
    SD,
    data,
    denoised_by_hand,
    denoiser,
    distance,
    gradient,
    number,
    perturb,
)

PLAIN: dict[str, Any] = {"normalise": False, "prior_weight": False}


def states_of(x0: Tensor, **options: Any) -> TensorDict:  # noqa: ANN401
    return sample_trigflow_states(PROCESS, x0, generator=generator(3), **options)


@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("ramp", [0.0, 0.3, 1.0])
def test_the_loss_by_finite_differences(normalise: bool, ramp: float) -> None:
    D, x0 = denoiser(), data(8)
    perturb(D)
    states = states_of(x0)
    total, h = torch.zeros((), dtype=torch.float64), 1e-5
    for i in range(8):
        sigma = states["t"][i, 0, 0]
        t, z = (sigma / SD).atan(), SD * (states["x_t"][i, 0] - x0[i]) / sigma
        net = [
            output_by_hand(D.network, (t + k).cos() * x0[i] + (t + k).sin() * z, t + k) for k in (-h, 0.0, h)
        ]
        F, dF = net[1], (net[2] - net[0]).detach() / (2 * h)
        x, dx = t.cos() * x0[i] + t.sin() * z, t.cos() * z - t.sin() * x0[i]
        g = -(t.cos() ** 2) * (SD * F.detach() - dx) - ramp * t.cos() * t.sin() * (x + SD * dF)
        g = g / (g.norm() + 0.1) if normalise else g
        total = total + (F - (F.detach() + g)).square().mean() / sigma / 8
    loss = ContinuousConsistencyLoss(D, normalise=normalise)
    loss.ramp = ramp
    found = loss(states)["loss_value"]
    torch.testing.assert_close(found, total, rtol=1e-6, atol=1e-10)
    assert distance(gradient(found, D), gradient(total, D)) < 1e-6
    assert loss.network_evaluations == 16


def output_by_hand(network: nn.Module, x: Tensor, t: Tensor) -> Tensor:
    """TrigFlow's F of EDM's preconditioning: minus the network's output."""
    sigma = SD * t.tan()
    clean = denoised_by_hand(network, (x / t.cos())[None], sigma)[0]
    F = -network((x / SD)[None], sigma.log()[None] / 4, None)[0]
    torch.testing.assert_close(t.cos() * x - t.sin() * SD * F, clean)
    return F


def test_without_the_ramp_it_is_denoising() -> None:
    """ρ = 0, not normalised: -2⟨F, g⟩ has the gradient of cos² t/σd ‖σd F - dx/dt‖², a weighted denoising loss."""
    D, x0 = denoiser(), data(8)
    perturb(D)
    states, loss = states_of(x0), ContinuousConsistencyLoss(D, **PLAIN)
    loss.ramp = 0.0
    x, sigma = states["x_t"][:, 0], states["t"][:, 0, 0]
    t = (sigma / SD).atan()[:, None]
    error = D(x, sigma) - x0  # σd F - dx/dt = (x0 - D)/sin t
    denoising = (t.cos() ** 2 / SD * (error / t.sin()).square()).mean()
    found = gradient(loss(states)["loss_value"], D)
    assert distance(found, gradient(denoising, D)) < 1e-9


def test_rho_warms_up_over_its_share() -> None:
    loss, found = ContinuousConsistencyLoss(denoiser(), warmup=0.5), []
    assert loss.ramp == 1.0
    for step in range(8):
        loss.set_progress(step, 8)
        found.append(loss.ramp)
    assert found == [0.0, 0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0]
    loss = ContinuousConsistencyLoss(denoiser(), warmup=0.0)
    loss.set_progress(0, 8)
    assert loss.ramp == 1.0


class Exact(nn.Module):
    """The consistency function σd/√(σd² + σ²) x_σ of N(0, σd²), with a parameter of no effect at 0."""

    prediction_type, sigma_data, process = "edm", SD, PROCESS

    def __init__(self) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, x: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
        return (SD / (SD**2 + t**2).sqrt()[:, None] + self.theta) * x


def test_the_gradient_is_zero_on_average_at_the_exact_function() -> None:
    """Not normalised, at every level; of a wrong function it is not."""
    n = 4000
    x0 = SD * torch.randn(n, 2, generator=generator(1), dtype=torch.float64)
    for center in (-2.0, -0.5, 1.0):
        states = states_of(x0, P_mean=center, P_std=0.0)
        slopes = []
        for offset in (0.0, 0.5):
            D = Exact()
            with torch.no_grad():
                D.theta.fill_(offset)
            found = []
            for part in states.split(n // 20):
                value = ContinuousConsistencyLoss(D, **PLAIN)(part)["loss_value"]
                found.append(torch.autograd.grad(value, D.theta)[0])
            slopes.append(torch.stack(found))
        assert_within(Estimate(slopes[0].mean(), slopes[0].std() / math.sqrt(20)), 0.0)
        assert abs(float(slopes[1].mean())) > 5 * float(slopes[1].std()) / math.sqrt(20)


def test_both_ends_are_finite_and_one_row_will_do() -> None:
    D = denoiser()
    perturb(D)
    for center in (-7.0, 4.5):
        value = ContinuousConsistencyLoss(D)(states_of(data(1), P_mean=center, P_std=0.0))["loss_value"]
        assert bool(value.isfinite()) and bool(gradient(value, D).isfinite().all())


def test_states_are_those_of_a_log_normal_law() -> None:
    x0 = data(6)
    plain = sample_log_normal_states(PROCESS, x0, P_mean=-1.0, P_std=1.4, generator=generator(3))
    assert torch.equal(states_of(x0)["x_t"], plain["x_t"])


def test_dropout_is_that_of_the_pass_that_trains() -> None:
    D = denoiser(dropout=0.5)
    perturb(D)
    states, values = states_of(data(8)), []
    for _ in range(2):
        torch.manual_seed(5)
        values.append(number(ContinuousConsistencyLoss(D)(states)["loss_value"]))
    assert values[0] == values[1]
    with torch.random.fork_rng():
        torch.manual_seed(5)
        loss = ContinuousConsistencyLoss(D)
        x, t = torch.ones(4, 2, dtype=torch.float64), torch.ones(4, dtype=torch.float64)
        with torch.random.fork_rng():
            primal = torch.func.jvp(lambda x: loss._output(x, t, None), (x,), (x,))[0]
        assert torch.equal(primal, loss._output(x, t, None))


def test_what_does_not_fit_is_named() -> None:
    with pytest.raises(InputError, match="the process is Flow: sCT"):
        ContinuousConsistencyLoss(denoiser(Flow(), "velocity"))
    with pytest.raises(InputError, match="warmup is 2"):
        ContinuousConsistencyLoss(denoiser(), warmup=2.0)
    assert isinstance(PROCESS, EDM)
