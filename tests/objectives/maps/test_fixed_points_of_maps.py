"""Fixed points on N(0, 1), of maps: at each number of the page the library's own loss stands still."""

import math

import pytest
import torch
from torch import Tensor

from diffrl.diffusion.schedules.edm import EDM
from diffrl.diffusion.schedules.flow import Flow
from diffrl.objectives.denoising import sample_log_normal_states
from diffrl.objectives.maps.inductive_moments import MomentGroups
from diffrl.objectives.maps.states import map_states
from diffrl.objectives.progressive import HalvingSteps
from docs.fixed_points import RATIOS, SOLUTIONS
from docs.normal_levels import default, denoiser, flow_map
from docs.normal_maps import progressive, shortcut
from tests.kit.maps import MAPS
from tests.kit.normal_solutions import Smooth, basis, linear, made, moved, of_draws, table
from tests.kit.oracles import Estimate, assert_within, generator

EXACT_MAPS = [name for name in MAPS if SOLUTIONS[name][0].of is flow_map]
CASES = [(name, r) for name in EXACT_MAPS for r in (0.0, 0.01, 0.2) if (name, r) != ("lagrangian_map", 0.0)]


@pytest.mark.parametrize("s", RATIOS)
@pytest.mark.parametrize(("name", "r"), CASES)
def test_of_exact_maps(name: str, r: float, s: float) -> None:
    """From t = s to r, which LSD refuses to be 0; and where r = t, at which both candidates are right."""
    options = {"mean_flow": {"p": 0}, "improved_mean_flow": {"p": 0}, "alpha_flow": {"p": 0, "alpha": 0.0}}
    z = basis(2)
    for end in (r, s):
        t, r_ = (torch.full((2,), time, dtype=torch.float64) for time in (s, end))
        states = map_states(EDM(), z[:, :1], t, r_, noise=z[:, 1:])
        states["next", "t"] = (states["t"] + states["r"]) / 2
        right, wrong = (
            float(moved(made(name, Smooth(is_map), **options.get(name, {})), states))
            for is_map in (True, False)
        )
        assert abs(right) < 1e-9
        assert (abs(wrong) > 1e-5) == (end < s)


@pytest.mark.parametrize("s", RATIOS)
def test_of_continuous_consistency(s: float) -> None:
    """Where r = 0."""
    states = sample_log_normal_states(
        EDM(), basis(2)[:, :1], noise=basis(2)[:, 1:], P_mean=math.log(s), P_std=0.0
    )
    right, wrong = (
        float(moved(made("continuous_ct", Smooth(m), normalise=False), states)) for m in (True, False)
    )
    assert abs(right) < 1e-9 < 1e-3 < abs(wrong)


@pytest.mark.parametrize("name", ["continuous_ct", "mean_flow"])
def test_weights_that_depend_on_the_error_move_nothing(name: str) -> None:
    """At their defaults, from σ = 1 to clean data, by normal draws."""

    def pull(is_map: bool) -> Estimate:
        loss = made(name, Smooth(is_map))

        def of(z: Tensor) -> Tensor:
            t = torch.ones(len(z), dtype=torch.float64)
            return moved(loss, map_states(EDM(), z[:, :1], t, 0 * t, noise=z[:, 1:]))

        return of_draws(of)

    right, wrong = pull(True), pull(False)
    assert_within(right, 0.0)
    assert abs(float(wrong.value)) > 10 * float(right.error)


@pytest.mark.parametrize("s", RATIOS)
def test_of_shortcuts(s: float) -> None:
    """The target of a whole jump, and of one of the two finest steps, row by row."""
    process, finest = EDM(sigma_max=s), s / (1 + s) / default("shortcut", "finest")

    def a(t: float, r: float) -> float:
        return denoiser(t) if r == t else shortcut(t, r=r, top=s)

    for level in (s, 2 * finest / (1 - 2 * finest)):
        t = torch.full((2,), level, dtype=torch.float64)
        states = map_states(process, basis(2)[:, :1], t, 0 * t, noise=basis(2)[:, 1:])
        loss = made("shortcut", linear(process, a, t[:1]))
        expected = a(level, 0.0) * states["x_t"][:, 0]
        torch.testing.assert_close(loss.target(states), expected, rtol=1e-9, atol=1e-9)
    assert SOLUTIONS["shortcut"][0].at(s, 18) == a(s, 0.0)


def test_of_progressive_distillation() -> None:
    """A student of 8 steps whose teacher is the student of 16, row by row."""
    process, start, n = Flow(shift=1.3), 64, 8
    tables = []
    for m in (n, 2 * n):
        t = process.time_grid(m)[:-1]
        tables.append(table(t, progressive(process, m, start=start)))
    D, teacher = (linear(process, of, process.time_grid(n)[1:-1]) for of in tables)
    loss = made("progressive", D)
    loss.bootstrap_network.module.denoiser = teacher
    x0 = torch.randn(64, 1, dtype=torch.float64, generator=generator())
    states = HalvingSteps(process, start=2 * n, end=n)(x0, generator=generator())
    states = states[states["t"].flatten() < 1]
    assert len(states) > 40 and float(loss(states)["td_error"]) < 1e-9


def test_of_inductive_moments() -> None:
    """At σ = 1: jumps of groups to r = 0, with the solution of the level s to learn from."""
    s, (row,), M, n = 1.0, SOLUTIONS["inductive_moments"], default("inductive_moments", "group_size"), 20_000
    process = EDM()
    draw = MomentGroups(process, linear(process, denoiser, torch.ones(1)), group_size=M)
    z = torch.randn(n * M, 2, generator=generator(), dtype=torch.float64)
    t = torch.full((n * M,), s, dtype=torch.float64)
    states = map_states(process, z[:, :1], t, 0 * t, noise=z[:, 1:])
    states["next", "t"] = torch.full_like(states["t"], s - draw.gap)
    states["group"] = torch.arange(n).repeat_interleave(M).view(-1, 1, 1)
    parts = []
    for shift in (0.0, 0.02):
        a = {s: row.of(s) + shift, s - draw.gap: row.of(s - draw.gap)}
        loss = made(
            "inductive_moments",
            linear(process, table(torch.tensor(list(a), dtype=torch.float64), a.values()), t[:1]),
        )
        parts.append(torch.cat([moved(loss, part) for part in states.split(len(states) // 20)]))
    at_it, beside = parts
    error = at_it.std() / len(at_it) ** 0.5
    assert_within(Estimate(at_it.mean(), error), 0.0)
    assert float(beside.mean()) > 10 * float(error)
    assert flow_map(s) - row.of(s) > 0.005
