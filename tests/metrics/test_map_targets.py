"""Bias and variance of targets of maps, consistency functions and chains: closed forms, plain loops, exact networks."""

import pytest
import torch
from torch import Generator, Tensor

from diffrl.diffusion.chains import Chain
from diffrl.diffusion.denoisers import Denoiser
from diffrl.diffusion.exact import MixtureDenoiser
from diffrl.diffusion.networks.mlp import MLP
from diffrl.diffusion.predictions import scalings
from diffrl.diffusion.schedules.base import Schedule
from diffrl.diffusion.schedules.edm import EDM
from diffrl.diffusion.schedules.flow import Flow
from diffrl.diffusion.trajectories import ChainSampler
from diffrl.errors import InputError
from diffrl.metrics.map_targets import map_target_errors
from diffrl.metrics.scheme_targets import scheme_target_errors
from diffrl.objectives.ect import ECTLoss
from diffrl.objectives.ect_pairs import sample_ect_pairs
from diffrl.objectives.maps.alpha_flow import AlphaFlowLoss
from diffrl.objectives.maps.inductive_moments import InductiveMomentLoss, MomentGroups
from diffrl.objectives.maps.mean_flow import MeanFlowLoss
from diffrl.objectives.maps.self_distillation import LagrangianMapLoss
from diffrl.objectives.monte_carlo import monte_carlo_loss
from diffrl.objectives.scheme import Objective
from diffrl.objectives.shortdf import ShortDFLoss
from diffrl.objectives.value import ValueLoss
from tests.kit.maps import DIM, PROCESSES, ExactMaps, average_velocity, states, two_times

every_straight = pytest.mark.parametrize("process", PROCESSES, ids=["flow", "edm"])


def normal(process: Schedule) -> MixtureDenoiser:
    """The law N(0, I) of `ExactMaps`, as a mixture."""
    one = torch.ones(1, dtype=torch.float64)
    return MixtureDenoiser(process, torch.zeros(1, DIM, dtype=torch.float64), one, one)


def unit(process: Schedule, t: Tensor, sigma_data: float = 1.0) -> Tensor:
    return scalings(process, t, "edm", sigma_data).c_out ** 2


def spread(process: Schedule, t: Tensor) -> Tensor:
    """Var(x0 | x_t) of N(0, I), summed over dims."""
    alpha, sigma = process.alpha(t), process.sigma(t)
    return DIM * sigma**2 / (alpha**2 + sigma**2)


@every_straight
def test_flow_matching_has_the_scatter_of_the_datum_and_no_bias(process: Schedule) -> None:
    t = torch.tensor([0.9, 0.5, 0.1], dtype=torch.float64).repeat(500)
    s = states(process, 1500, t=t, r=t)
    loss = MeanFlowLoss(ExactMaps(process))
    found = map_target_errors(loss, s, normal(process), draws=4, generator=Generator().manual_seed(0))
    assert found["variance"] == pytest.approx(float((spread(process, t) / unit(process, t)).mean()), rel=0.05)
    assert abs(found["bias_sq"]) < 0.01 * found["variance"] and found["own"] == pytest.approx(0, abs=1e-12)
    assert found["total"] == pytest.approx(found["bias_sq"] + found["variance"])


@every_straight
def test_a_scheme_that_bootstraps_a_jump_at_the_exact_map_is_right_without_scatter(process: Schedule) -> None:
    t = torch.tensor([0.9, 0.6], dtype=torch.float64)
    s = states(process, 2, t=t, r=t / 2)
    found = map_target_errors(LagrangianMapLoss(ExactMaps(process)), s, normal(process), draws=2)
    assert max(abs(value) for value in found.values()) < 1e-8


@every_straight
def test_the_bias_of_alpha_flow_is_its_closed_form(process: Schedule) -> None:
    times, α = [0.9, 0.7] if isinstance(process, Flow) else [6.0, 3.0], 0.6
    t = torch.tensor(times, dtype=torch.float64).repeat(2000)
    r = t / 3
    s = states(process, 4000, t=t, r=r)
    exact = ExactMaps(process)
    found = map_target_errors(
        AlphaFlowLoss(exact, alpha=α), s, normal(process), draws=200, generator=Generator().manual_seed(0)
    )
    x, mid = s["x_t"][:, 0], α * r + (1 - α) * t
    there = x - (t - mid)[:, None] * average_velocity(exact, x, t, t)  # an Euler step along E[v | x]
    X, Y = (
        at - (time - r)[:, None] * average_velocity(exact, at, time, r) for at, time in ((x, t), (there, mid))
    )
    bias = (X - Y) / (t - r)[:, None] * t[:, None]
    wanted = float((bias.detach().square().sum(1) / unit(process, t)).mean())
    assert found["bias_sq"] == pytest.approx(wanted, rel=0.15) and wanted > 1e-4


@torch.no_grad()
def test_consistency_by_a_plain_loop() -> None:
    process, oracle = EDM(), normal(EDM())
    torch.manual_seed(0)
    network = MLP((DIM,), hidden=8, depth=1, x_features=4, noise_features=4)
    torch.nn.init.normal_(network.last.weight)
    denoiser = Denoiser(network, process, 1.0).double()
    t = torch.tensor([5.0, 0.4], dtype=torch.float64)
    x0 = torch.randn(2, DIM, dtype=torch.float64)
    pairs = sample_ect_pairs(process, x0, stage=3, sigma=t)
    loss = ECTLoss(denoiser)
    found = map_target_errors(loss, pairs, oracle, draws=5, generator=Generator().manual_seed(1))
    assert loss.network_evaluations == 0

    x_t, r = pairs["x_t"][:, 0], pairs["next", "t"].flatten()
    data = oracle.sample_posterior(x_t, t, 5, Generator().manual_seed(1))
    assert bool((r > 0).all())
    bias, variance = [], []
    for i in range(2):
        y = []
        for m in range(5):
            noise = (x_t[i] - data[i, m]) / t[i]
            y.append(denoiser((data[i, m] + r[i] * noise)[None], r[i : i + 1])[0])
        ys = torch.stack(y)
        end = x_t[i] / (1 + t[i] ** 2).sqrt()  # where the ODE of N(0, I) leads
        variance.append(ys.var(0).sum() / unit(process, t[i]))
        bias.append((ys.mean(0) - end).square().sum() / unit(process, t[i]) - variance[-1] / 5)
    assert found["variance"] == pytest.approx(float(sum(variance) / 2), rel=1e-9)
    assert found["bias_sq"] == pytest.approx(float(sum(bias) / 2), rel=1e-4)


def test_moments_have_the_state_at_r_as_their_row_target() -> None:
    process = Flow()
    denoiser = two_times(process)
    s = MomentGroups(process, denoiser)(torch.randn(8, DIM).double(), generator=Generator().manual_seed(0))
    s["next", "t"] = s["r"]  # Y is x_r of the same datum and noise
    D = InductiveMomentLoss(denoiser).target(s)
    x, t, r = s["x_t"][:, 0], s["t"].flatten(), s["r"].flatten()
    x_r = x - (t - r)[:, None] * s["v"][:, 0]
    torch.testing.assert_close(x - ((t - r) / t)[:, None] * (x - D), x_r)


def test_what_cannot_be_measured_is_said() -> None:
    process = EDM()
    s = states(process, 2)
    with pytest.raises(InputError, match="draws is 1: a variance needs at least two"):
        map_target_errors(MeanFlowLoss(two_times(process)), s, normal(process), draws=1)
    loss = ShortDFLoss(two_times(process))
    with pytest.raises(InputError, match="ShortDFLoss does not say what it pulls"):
        map_target_errors(loss, s, normal(process))


# --- of objectives


def objective(loss: ValueLoss, process: Schedule) -> Objective:
    return Objective("x", loss, ChainSampler(Chain(process, num_steps=4, coupling="markov"), jitter=False))


def test_the_datum_of_monte_carlo_scatters_as_its_law_does() -> None:
    process = EDM(0.1, 10.0)
    x0 = torch.randn(500, DIM, dtype=torch.float64)
    denoiser = Denoiser(MLP((DIM,), hidden=4, depth=1), process, 1.0).double()
    chains = objective(monte_carlo_loss(denoiser), process)
    found = scheme_target_errors(chains, normal(process), x0, draws=32)
    t = process.time_grid(4)[:-1]
    assert found["variance"] == pytest.approx(float((spread(process, t) / unit(process, t)).mean()), rel=0.05)
    assert found["bias_sq"] == 0 and found["total"] == found["variance"]
