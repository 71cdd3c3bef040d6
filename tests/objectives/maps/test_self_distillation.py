"""Self-distillation of flow maps against finite differences, other schemes, and the exact map of Gaussian data."""

import math

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor

from diffrl import keys
from diffrl.diffusion.denoisers import Denoiser
from diffrl.diffusion.schedules.base import Schedule
from diffrl.diffusion.schedules.flow import Flow
from diffrl.errors import InputError, InputKeyError
from diffrl.objectives.maps.improved_mean_flow import ImprovedMeanFlowLoss
from diffrl.objectives.maps.self_distillation import (
    EulerianMapLoss,
    LagrangianMapLoss,
    ProgressiveMapLoss,
    ProgressivePairs,
    SelfDistillationLoss,
    SelfDistillationPairs,
)
from diffrl.objectives.maps.shortcut import ShortcutLoss
from tests.kit.maps import PROCESSES, ExactMaps, average_velocity, gradient, states, two_times

every_straight = pytest.mark.parametrize("process", PROCESSES, ids=["flow", "edm"])
every_loss = pytest.mark.parametrize("kind", [LagrangianMapLoss, ProgressiveMapLoss, EulerianMapLoss])


def with_cut(s: TensorDict, γ: float) -> TensorDict:
    s[keys.NEXT, keys.T] = s["t"] - γ * (s["t"] - s["r"])
    return s


def entries(s: TensorDict) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return s["x_t"][:, 0], s["t"].flatten(), s["r"].flatten(), s["v"][:, 0]


def end(denoiser: Denoiser, x: Tensor, t: Tensor, r: Tensor) -> Tensor:
    return x - (t - r)[:, None] * average_velocity(denoiser, x, t, r)


@every_straight
@every_loss
def test_the_loss_by_finite_differences_of_maps(process: Schedule, kind: type[SelfDistillationLoss]) -> None:
    denoiser, s, h = two_times(process), with_cut(states(process), 0.3), 1e-5
    x, t, r, _ = entries(s)
    if kind is LagrangianMapLoss:
        with torch.no_grad():
            X = end(denoiser, x, t, r)
            target = average_velocity(denoiser, X, r, r)
        δ = (end(denoiser, x, t, r + h) - end(denoiser, x, t, r - h)) / (2 * h) - target
    elif kind is ProgressiveMapLoss:
        m = s[keys.NEXT, keys.T].flatten()
        with torch.no_grad():
            X = end(denoiser, end(denoiser, x, t, m), m, r)
        δ = (end(denoiser, x, t, r) - X) / (t - r)[:, None]
    else:
        with torch.no_grad():
            w = average_velocity(denoiser, x, t, t)
            moved = (end(denoiser, x + h * w, t, r) - end(denoiser, x - h * w, t, r)) / (2 * h)
        δ = (end(denoiser, x, t + h, r) - end(denoiser, x, t - h, r)) / (2 * h) + moved
    expected = δ.square().mean()
    loss = kind(denoiser)(s)["loss_value"]
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(gradient(loss, denoiser), gradient(expected, denoiser), rtol=1e-5, atol=1e-7)


@every_straight
@every_loss
def test_at_r_of_t_it_is_flow_matching(process: Schedule, kind: type[SelfDistillationLoss]) -> None:
    denoiser = two_times(process)
    t = states(process)["t"].flatten()
    s = with_cut(states(process, r=t, t=t), 0.5)
    loss = kind(denoiser)(s)["loss_value"]
    x, v = s["x_t"][:, 0], s["v"][:, 0]
    expected = ((x - denoiser(x, t)) / t[:, None] - v).square().mean()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient(loss, denoiser), gradient(expected, denoiser))


def test_both_kinds_of_rows_in_one_batch() -> None:
    denoiser, s = two_times(Flow()), states(Flow())
    s["r"] = torch.where(torch.arange(5).view(-1, 1, 1) < 2, s["t"], s["r"])
    loss = EulerianMapLoss(denoiser)
    parts = [float(loss(s[rows])["loss_value"].detach()) for rows in (slice(0, 2), slice(2, 5))]
    assert float(loss(s)["loss_value"].detach()) == pytest.approx((2 * parts[0] + 3 * parts[1]) / 5)


@every_straight
@every_loss
def test_the_exact_map_has_no_error_in_any_jump(process: Schedule, kind: type[SelfDistillationLoss]) -> None:
    s = with_cut(states(process), 0.7)
    if kind is not LagrangianMapLoss:
        s["r"] = torch.where(torch.arange(5).view(-1, 1, 1) == 0, 0.0, s["r"])
    assert float(kind(ExactMaps(process))(s)["td_error"]) < 1e-10


def test_the_progressive_one_with_its_cut_at_the_midpoint_is_a_shortcut() -> None:
    denoiser, s = two_times(Flow()), with_cut(states(Flow()), 0.5)
    loss = ProgressiveMapLoss(denoiser)(s)["loss_value"]
    expected = ShortcutLoss(denoiser, bootstrap="own", finest=2**20)(s)["loss_value"]
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient(loss, denoiser), gradient(expected, denoiser))


@every_straight
def test_the_eulerian_one_is_improved_mean_flow_with_the_predicted_velocity_as_data(
    process: Schedule,
) -> None:
    """In the loss; the gradient goes other ways."""
    denoiser, s = two_times(process), states(process)
    x, t, _, _ = entries(s)
    with torch.no_grad():
        s["v"] = average_velocity(denoiser, x, t, t)[:, None]
    eulerian, improved = EulerianMapLoss(denoiser)(s), ImprovedMeanFlowLoss(denoiser, p=0)(s)
    torch.testing.assert_close(eulerian["loss_value"], improved["loss_value"] / x.shape[1])
    torch.testing.assert_close(eulerian["td_error"], improved["td_error"])


@every_straight
def test_the_states(process: Schedule) -> None:
    x0, generator = torch.zeros(2000, 1, dtype=torch.float64), torch.Generator().manual_seed(0)
    s = SelfDistillationPairs(process)(x0, generator=generator)
    assert abs(float((s["r"] < s["t"]).double().mean()) - 0.25) < 4 * math.sqrt(0.25 * 0.75 / 2000)
    for cut in ("uniform", "midpoint"):
        s = ProgressivePairs(process, cut=cut)(x0, generator=generator)
        t, m, r = (
            f if isinstance(process, Flow) else f / (1 + f) for f in (s["t"], s[keys.NEXT, keys.T], s["r"])
        )
        jumps = r < t
        assert abs(float(jumps.double().mean()) - 0.25) < 4 * math.sqrt(0.25 * 0.75 / 2000)
        γ = ((t - m) / (t - r))[jumps]
        assert bool(((r <= m) & (m <= t)).all())
        assert float(γ.mean()) == pytest.approx(0.5, abs=4 / math.sqrt(12 * len(γ)))
        assert float(γ.std()) == pytest.approx(1 / math.sqrt(12) if cut == "uniform" else 0, abs=0.02)


def test_what_is_refused() -> None:
    s = states(Flow(), r=torch.zeros(5, dtype=torch.float64))
    with pytest.raises(InputError, match="r is 0"):
        LagrangianMapLoss(two_times(Flow()))(s)
    with pytest.raises(InputKeyError, match="next.t missing"):
        ProgressiveMapLoss(two_times(Flow()))(s)
    with pytest.raises(InputError, match="'own' or 'target'"):
        EulerianMapLoss(two_times(Flow()), bootstrap="residual")
    with pytest.raises(InputError, match="'uniform' or 'midpoint'"):
        ProgressivePairs(Flow(), cut="end")
