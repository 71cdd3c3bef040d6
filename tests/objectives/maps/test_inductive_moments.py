"""Inductive moment matching against plain loops, at its ends, and with its bias at the exact map of Gaussian data."""

import math

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor

from diffrl import keys
from diffrl.diffusion.schedules.base import Schedule
from diffrl.diffusion.schedules.edm import EDM
from diffrl.diffusion.schedules.flow import Flow
from diffrl.errors import InputError, InputKeyError
from diffrl.objectives.maps.inductive_moments import InductiveMomentLoss, MomentGroups, mmd_square
from tests.kit.maps import DIM, PROCESSES, ExactMaps, average_velocity, gradient, two_times

every_straight = pytest.mark.parametrize("process", PROCESSES, ids=["flow", "edm"])


def groups(process: Schedule, B: int = 8, M: int = 4, **options: float) -> TensorDict:
    generator = torch.Generator().manual_seed(0)
    x0 = 0.5 * torch.randn(B, DIM, generator=generator, dtype=torch.float64)
    draw = MomentGroups(process, two_times(process), group_size=M, **options)
    return draw(x0, generator=generator)


def ends(denoiser: torch.nn.Module, s: TensorDict) -> tuple[Tensor, Tensor]:
    """X, and Y without gradient, by the steps of each datum and noise."""
    process = denoiser.process
    x, t, r, x0 = s["x_t"][:, 0], s["t"].flatten(), s["r"].flatten(), s["x0"][:, 0]
    mid = s[keys.NEXT, keys.T].flatten()
    noise = (x - process.alpha(t)[:, None] * x0) / t[:, None]
    x_s = process.alpha(mid)[:, None] * x0 + mid[:, None] * noise
    X = x - (t - r)[:, None] * average_velocity(denoiser, x, t, r)
    with torch.no_grad():
        return X, x_s - (mid - r)[:, None] * average_velocity(denoiser, x_s, mid, r)


@every_straight
def test_the_loss_by_plain_loops(process: Schedule) -> None:
    """In the paper's coordinates: states are scaled to those of a path whose noise has the data's deviation."""
    denoiser, s, M, a, b = two_times(process), groups(process), 4, 1.5, 3.0
    loss = InductiveMomentLoss(denoiser, a=a, b=b)(s)["loss_value"]
    X, Y = ends(denoiser, s)
    total = torch.zeros((), dtype=torch.float64)
    for g in range(2):
        t, r = (float(s[k].flatten()[g * M]) for k in "tr")
        t, r = (
            ratio / (1 + ratio)
            for ratio in (z / (1 if isinstance(process, EDM) else 1 - z) / 0.5 for z in (t, r))
        )
        scale = (1 - r) / float(process.alpha(s["r"].flatten()[g * M]))
        square = torch.zeros((), dtype=torch.float64)
        for i in range(g * M, g * M + M):
            for j in range(g * M, g * M + M):
                for sign, p, q in ((1, X[i], X[j]), (1, Y[i], Y[j]), (-2, X[i], Y[j])):
                    d = scale * (p - q).square().sum().clamp(min=1e-8).sqrt() / DIM
                    square = square + sign * torch.exp(-d / ((t - r) * 0.5 + 1e-6)) / M**2
        λ = 2 * math.log((1 - t) / t)
        ω = (1 - t) ** a / ((1 - t) ** 2 + t**2) * 0.5 * 2 / (t * (1 - t)) / (1 + math.exp(λ - b))
        total = total + ω * square / 2
    torch.testing.assert_close(loss, total)
    torch.testing.assert_close(gradient(loss, denoiser), gradient(total, denoiser))


def test_the_order_of_rows_does_not_matter() -> None:
    denoiser, s = two_times(Flow()), groups(Flow())
    order = torch.randperm(8, generator=torch.Generator().manual_seed(1))
    loss, given = InductiveMomentLoss(denoiser), s[order]
    torch.testing.assert_close(loss(s)["loss_value"], loss(given)["loss_value"])
    torch.testing.assert_close(s["loss"][order], given["loss"])


def test_one_row_a_group_is_a_distance() -> None:
    """2 (1 - k): a consistency loss; nothing but the pair of one datum and noise is compared."""
    denoiser, s = two_times(EDM()), groups(EDM(), 3, 1)
    X, Y = (z.detach() for z in ends(denoiser, s))
    InductiveMomentLoss(denoiser, a=0, b=50)(s)
    t, r = (s[k].flatten() / (0.5 + s[k].flatten()) for k in "tr")
    k = torch.exp(-(1 - r) * (X - Y).norm(dim=1) / DIM / ((t - r) * 0.5 + 1e-6))
    expected = 2 * (1 - k - (1 - torch.exp(-(1 - r) * 1e-4 / DIM / ((t - r) * 0.5)))) / ((1 - t) ** 2 + t**2)
    torch.testing.assert_close(s["loss"].flatten() * t * (1 - t), expected, rtol=1e-4, atol=1e-6)


@every_straight
def test_at_r_of_t_and_of_clean_data(process: Schedule) -> None:
    """No jump, no loss; a jump to clean data, and one whose gap is wider than what is left."""
    denoiser = two_times(process)
    loss, s = InductiveMomentLoss(denoiser), groups(process)
    s["r"] = s[keys.NEXT, keys.T] = s["t"]
    value = loss(s)["loss_value"]
    assert float(value.detach()) == pytest.approx(0, abs=1e-12)
    assert float(gradient(value, denoiser).abs().max()) == 0
    s["r"] = torch.zeros_like(s["r"])
    assert bool(gradient(loss(s)["loss_value"], denoiser).isfinite().all())
    evaluations = loss.network_evaluations
    s[keys.NEXT, keys.T] = s["r"]  # Y is the datum
    assert bool(gradient(loss(s)["loss_value"], denoiser).isfinite().all())
    assert loss.network_evaluations == evaluations + 8


@every_straight
def test_the_times(process: Schedule) -> None:
    s = groups(process, 2000, 4, halvings=2, least=0.1, most=0.9)
    t, m, r = (
        z / (1 - z) if isinstance(process, Flow) else z for z in (s["t"], s[keys.NEXT, keys.T], s["r"])
    )
    t, m, r = (z.flatten() / 0.5 for z in (t, m, r))  # η
    torch.testing.assert_close(m, torch.maximum(t - (9 - 1 / 9) / 4, r))
    time = t / (1 + t)
    assert float(time.min()) >= 0.1 and float(time.max()) <= 0.9
    assert float(time.mean()) == pytest.approx(0.5, abs=4 * 0.8 / math.sqrt(12 * 500))
    share = (r / (1 + r) - 0.1) / (time - 0.1)
    assert float(share.mean()) == pytest.approx(0.5, abs=4 / math.sqrt(12 * 500))
    for z in (t, m, r):
        torch.testing.assert_close(z, z.view(-1, 4)[:, :1].expand(-1, 4).flatten())


def test_the_bias_at_the_exact_map_is_that_of_the_pairs_of_one_datum() -> None:
    exact, M, n = ExactMaps(Flow(), 0.5), 4, 8000
    s = groups(Flow(), n * M, M)
    t, r, mid = (torch.full((n * M, 1, 1), z, dtype=torch.float64) for z in (0.6, 0.1, 0.4))
    x0 = s["x0"][:, 0]
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    s["x_t"], s["v"], s["t"], s["r"] = (0.4 * x0 + 0.6 * noise)[:, None], (noise - x0)[:, None], t, r
    s[keys.NEXT, keys.T] = mid
    loss = InductiveMomentLoss(exact)
    slope = float(gradient(loss(s)["loss_value"], exact))
    X, Y = (z.detach().view(n, M, DIM).requires_grad_() for z in ends(exact, s))
    η = 0.6 / 0.4 / 0.5
    own, own_r = η / (1 + η), (0.1 / 0.9 / 0.5) / (1 + 0.1 / 0.9 / 0.5)
    width = torch.full((n,), (1 - own_r) / 0.9 / ((own - own_r) * 0.5 + 1e-6), dtype=torch.float64)
    dX = 0.5 * s["x_t"].view(n, M, DIM) / 0.6  # ∂X/∂θ = (t - r) x/t
    (of_all,) = torch.autograd.grad(mmd_square(X, Y, width).sum(), X)
    same = torch.exp(-width[:, None] * (X - Y).norm(dim=-1) / DIM)
    (of_same,) = torch.autograd.grad(-2 / M**2 * same.sum(), X)
    rows, bias = (torch.einsum("gmd,gmd->g", z, dX) for z in (of_all, of_same))
    λ = 2 * math.log((1 - own) / own)
    ω = (1 - own) ** 2 / ((1 - own) ** 2 + own**2) / (own * (1 - own)) / (1 + math.exp(λ - 4))
    assert slope == pytest.approx(ω * float(rows.mean()), rel=1e-6)
    noise_of_mean = float((rows - bias).std()) / math.sqrt(n)
    assert abs(float((rows - bias).mean())) < 4 * noise_of_mean
    assert abs(float(bias.mean())) > 8 * noise_of_mean


def test_what_is_refused() -> None:
    denoiser, s = two_times(Flow()), groups(Flow())
    with pytest.raises(InputError, match="multiple of group_size=4"):
        groups(Flow(), 6)
    with pytest.raises(InputError, match="different sizes"):
        InductiveMomentLoss(denoiser)(s[:6])
    with pytest.raises(InputKeyError, match="group missing"):
        InductiveMomentLoss(denoiser)(s.exclude("group"))
