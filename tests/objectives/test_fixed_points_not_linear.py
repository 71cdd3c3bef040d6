"""Fixed points on N(0, 1) that are not linear: the best linear function, by draws or by moments."""

import math

import torch
from torch import Tensor

from diffrl.diffusion.schedules.edm import EDM
from diffrl.diffusion.trajectories import sample_chain
from diffrl.objectives.scheduled_sampling import roll_back
from diffrl.objectives.shortdf import sample_shortdf_pairs
from docs.fixed_points import SOLUTIONS
from docs.normal_levels import default, denoiser
from tests.kit.normal_solutions import (
    Coefficient,
    assert_stands_still,
    given,
    linear,
    made,
    moved,
    others,
    table,
)
from tests.kit.oracles import Estimate, assert_within, generator

N = 7  # levels of the grids that losses are looked at on


def test_of_scheduled_sampling() -> None:
    """Slopes of x0 on states that are rolled back by m levels, by the shares of m."""
    process, (row,), n = EDM(), SOLUTIONS["scheduled_sampling"], 20_000
    levels = process.time_grid(N)[:-1]
    a, probs = row.of(process, N), default("scheduled_sampling", "probs_end")
    D = linear(process, table(levels, a), levels)
    for k in (1, 2, 3):
        moments = torch.zeros(20, 2, dtype=torch.float64)
        for m, p in enumerate((1 - sum(probs), *probs)):
            z = torch.randn(n, 2, generator=generator(m), dtype=torch.float64)
            first, steps = torch.full((n,), float(max(k - m, 0))).double(), torch.full((n,), min(m, k))
            x = z[:, :1] + levels[max(k - m, 0)] * z[:, 1:]
            x = roll_back(D, process, x, first, steps, N, generator=generator(9 + m))
            products = torch.cat([z[:, :1] * x, x * x], 1) / (1 + levels[k] ** 2)
            moments += p * products.view(20, -1, 2).mean(1)
        errors = moments[:, 0] - a[k] * moments[:, 1]
        assert_within(Estimate(errors.mean(), errors.std() / 20**0.5), 0.0)
        assert abs(a[k] / denoiser(float(levels[k])) - 1) > 0.01


def test_of_physics_residual() -> None:
    """Data and noise at -√3, 0 and √3, as often as makes their moments up to the fifth those of normal ones."""
    process, (row,) = EDM(), SOLUTIONS["physics_residual"]
    levels = process.time_grid(N)[:-1]
    points = math.sqrt(3) * torch.tensor([-1.0, 0, 0, 0, 0, 1], dtype=torch.float64)
    z = torch.cartesian_prod(points, points)
    noise = torch.zeros(36, N, 1, dtype=torch.float64)
    noise[:, 0, 0] = z[:, 1]
    chain = sample_chain(process, z[:, :1], num_steps=N, coupling="shared", noise=noise)

    def pulls(coefficient: Coefficient) -> Tensor:
        return moved(made("physics_residual", linear(process, coefficient, levels)), chain)

    assert_stands_still(pulls, table(levels, row.of(process, N)), *others(row))


def test_of_shortdf() -> None:
    """On average over all less noisy levels, by draws."""
    process, (row,), n = EDM(), SOLUTIONS["shortdf"], 12_000
    levels = process.time_grid(N)[:-1]
    a = row.of(process, N)
    for k in (2, 4):
        z = torch.randn(n, 2, generator=generator(k), dtype=torch.float64)
        t, parts = levels[k].expand(n), []
        for b in (a[k], denoiser(float(levels[k]))):
            D = linear(process, table(levels, [*a[:k], b, *a[k + 1 :]]), levels[k : k + 1])
            loss, found = made("shortdf", D, **given(row.words, "objective")), torch.zeros(20).double()
            for s in process.time_grid(N)[k + 1 :]:
                pairs = sample_shortdf_pairs(process, z[:, :1], num_steps=N, generator=generator())
                pairs["t"] = t.view(-1, 1, 1).clone()
                pairs["x_t"] = (z[:, :1] + levels[k] * z[:, 1:]).unsqueeze(1)
                pairs["next", "t"] = torch.full_like(pairs["t"], float(s))
                found += torch.cat([moved(loss, part) for part in pairs.split(n // 20)])
            parts.append(found)
        error = parts[0].std() / 20**0.5
        assert_within(Estimate(parts[0].mean(), error), 0.0)
        assert abs(float(parts[1].mean())) > 5 * float(error)
