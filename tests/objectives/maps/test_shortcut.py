"""Shortcut models against a plain loop, flow matching at r = t, and the exact map of Gaussian data."""

import math

import pytest
import torch
from torch import Tensor

from diffrl.diffusion.schedules.base import Schedule
from diffrl.diffusion.schedules.flow import Flow
from diffrl.errors import InputError
from diffrl.objectives.maps.shortcut import ShortcutLoss, ShortcutPairs
from diffrl.objectives.soft_update import SoftUpdate
from tests.kit.maps import PROCESSES, ExactMaps, average_velocity, gradient, states, two_times

every_straight = pytest.mark.parametrize("process", PROCESSES, ids=["flow", "edm"])


def on_the_grid(process: Schedule, d: float, B: int = 6) -> dict[str, Tensor]:
    """Times of jumps of length d in flow's time, the last of them to clean data."""
    f = d * torch.arange(1, 1 + min(B, round(1 / d) - 1), dtype=torch.float64)
    time = lambda f: f if isinstance(process, Flow) else f / (1 - f)  # noqa: E731
    return {"t": time(f), "r": time(f - d)}


@every_straight
@pytest.mark.parametrize("d", [1 / 2, 1 / 4, 1 / 8])
def test_the_loss_by_a_plain_loop(process: Schedule, d: float) -> None:
    """The grid has 16 steps, so that the halves of 1/8 are the finest."""
    denoiser, times = two_times(process), on_the_grid(process, d)
    s = states(process, len(times["t"]), **times)
    loss = ShortcutLoss(denoiser, bootstrap="own", finest=16)(s)["loss_value"]
    total = torch.zeros((), dtype=torch.float64)
    for x, t, r in zip(s["x_t"][:, 0], s["t"].flatten(), s["r"].flatten(), strict=True):
        f = [float(time if isinstance(process, Flow) else time / (1 + time)) for time in (t, r)]
        middle = sum(f) / 2 if isinstance(process, Flow) else sum(f) / (2 - sum(f))
        m = torch.tensor(middle, dtype=torch.float64)
        with torch.no_grad():
            x_m = (
                x - (t - m) * average_velocity(denoiser, x[None], t[None], (t if d == 1 / 8 else m)[None])[0]
            )
            u_2 = average_velocity(denoiser, x_m[None], m[None], (m if d == 1 / 8 else r)[None])[0]
            y = (x - (x_m - (m - r) * u_2)) / (t - r)  # displacement over time
        total = total + (average_velocity(denoiser, x[None], t[None], r[None])[0] - y).square().mean()
    torch.testing.assert_close(loss, total / len(s))
    torch.testing.assert_close(gradient(loss, denoiser), gradient(total / len(s), denoiser))


@every_straight
def test_at_r_of_t_it_is_flow_matching(process: Schedule) -> None:
    denoiser = two_times(process)
    t = states(process)["t"].flatten()
    s = states(process, r=t, t=t)
    loss = ShortcutLoss(denoiser, bootstrap="own")(s)["loss_value"]
    x, v = s["x_t"][:, 0], s["v"][:, 0]
    expected = ((x - denoiser(x, t)) / t[:, None] - v).square().mean()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient(loss, denoiser), gradient(expected, denoiser))


@every_straight
def test_the_exact_map_has_no_error_in_any_row(process: Schedule) -> None:
    times = on_the_grid(process, 1 / 4)
    s = states(process, len(times["t"]), **times)
    assert float(ShortcutLoss(ExactMaps(process), bootstrap="own")(s)["td_error"]) < 1e-12


def test_the_finest_jumps_have_an_error_of_the_order_of_their_length() -> None:
    """Where two Euler steps stand for the map: half the length, half the error."""
    errors = []
    for M in (64, 128):
        t = torch.full((4,), 0.5, dtype=torch.float64)
        s = states(Flow(), 4, t=t, r=t - 2 / M)
        loss = ShortcutLoss(ExactMaps(Flow(), 0.5), bootstrap="own", finest=M)
        errors.append(float(loss(s)["td_error"]))
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.1)
    assert errors[1] < 0.02


def test_the_target_network_is_what_a_jump_learns_from() -> None:
    denoiser, times = two_times(Flow()), on_the_grid(Flow(), 1 / 4)
    s = states(Flow(), len(times["t"]), **times)
    target, own = (ShortcutLoss(denoiser, bootstrap=kind) for kind in ("target", "own"))
    updater = SoftUpdate(target, eps=target.target_decay)
    torch.testing.assert_close(target(s)["loss_value"], own(s)["loss_value"])
    with torch.no_grad():
        denoiser.network.last.weight.mul_(2)
        assert abs(float(target(s)["loss_value"] - own(s)["loss_value"])) > 1e-3
    updater.step()
    follows = target.bootstrap_network.module.denoiser.network.last.weight
    moved = (follows / denoiser.network.last.weight).detach()
    torch.testing.assert_close(moved, torch.full_like(moved, 0.999 * 0.5 + 0.001))


@every_straight
def test_the_grid_of_states(process: Schedule) -> None:
    draw = ShortcutPairs(process, finest=16, bootstrap_every=4)
    s = draw(torch.zeros(400, 2, dtype=torch.float64), generator=torch.Generator().manual_seed(0))
    f, f_r = (
        s[k].flatten() if isinstance(process, Flow) else s[k].flatten() / (1 + s[k].flatten()) for k in "tr"
    )
    f_max = 1.0 if isinstance(process, Flow) else 20 / 21
    jumps = f_r < f
    assert int(jumps.sum()) == 100
    d = (f - f_r)[jumps] / f_max
    torch.testing.assert_close(
        d.unique().log2().round().unique(), torch.arange(-3.0, 1.0, dtype=torch.float64)
    )
    k = f[jumps] / f_max / d  # a whole number of jumps leads to clean data
    torch.testing.assert_close(k, k.round())
    fine = 16 * f / f_max
    torch.testing.assert_close(fine, fine.round())
    assert float(fine.min()) == pytest.approx(1) and float(fine.max()) == pytest.approx(16)
    assert float(s["r"].min()) == 0
    shares = torch.stack([(d.log2().round() == -k).double().mean() for k in range(4)])
    assert float((shares - 0.25).abs().max()) < 4 * math.sqrt(0.25 * 0.75 / 100)


def test_what_is_refused() -> None:
    with pytest.raises(InputError, match="power of 2"):
        ShortcutPairs(Flow(), finest=100)
    with pytest.raises(InputError, match="'own' or 'target'"):
        ShortcutLoss(two_times(Flow()), bootstrap="residual")
