"""Pairs of consistency training: how many scales, the target's decay, what is drawn."""

import math
from typing import Literal

import pytest
import torch

from diffrl.diffusion.schedules.edm import EDM
from diffrl.errors import InputError
from diffrl.objectives.consistency_pairs import (
    ConsistencyPairs,
    num_scales,
    sample_consistency_pairs,
    target_decay,
)
from diffrl.objectives.td_edm import sample_td_edm_pairs
from tests.kit.oracles import generator, randn

# Scales and decay


def test_scales_grow_from_2_to_151_without_leaving_out_any() -> None:
    K = 100_000
    N = [num_scales(j, K) for j in range(K + 1)]
    assert N[0] == 2 and N[K - 1] == N[K] == 151
    assert sorted(set(N)) == list(range(2, 152)) and sorted(N) == N


@pytest.mark.parametrize(
    ("step", "scales"),
    # s(j) = ⌈√(4 + j/1000·22797) - 1⌉ by hand: at j = 1, √26.797 - 1 = 4.18; at 100, √2283.7 - 1 = 46.8; …
    [(0, 2), (1, 6), (10, 16), (100, 48), (250, 76), (500, 107), (750, 131), (999, 151), (1000, 151)],
)
def test_scales_by_hand(step: int, scales: int) -> None:
    assert num_scales(step, 1000) == scales


def test_scales_of_other_ends() -> None:
    assert [num_scales(j, 4, s_0=10, s_1=10) for j in range(5)] == [10, 11, 11, 11, 11]
    assert num_scales(0, 10, s_0=1, s_1=1) == 2  # s never below 1


def test_decay_of_the_target() -> None:
    K = 100_000
    mu = [target_decay(j, K) for j in range(0, K + 1, 100)]
    assert mu[0] == pytest.approx(0.81, abs=1e-15)  # s = 1: μ_0²
    two_levels_on = next(j for j in range(K) if num_scales(j, K) == 3)
    assert target_decay(two_levels_on, K) == pytest.approx(0.9, abs=1e-15)  # s = s_0: μ_0
    assert mu[-1] == pytest.approx(0.9 ** (2 / 150), abs=1e-15) and mu == sorted(mu)


# Pairs


def test_drawn_pairs() -> None:
    N, B = 6, 20_000
    pairs = sample_consistency_pairs(EDM(), torch.zeros(B, 2), num_scales=N, generator=generator())
    grid = EDM().time_grid(N)
    i = pairs["index"].flatten()
    assert i.unique().tolist() == [0, 1, 2, 3, 4]
    share = torch.bincount(i).double() / B
    assert float((share - 0.2).abs().max()) < 5 * math.sqrt(0.16 / B)
    torch.testing.assert_close(pairs["t"].flatten().double(), grid[i], rtol=1e-6, atol=0)
    torch.testing.assert_close(pairs["next", "t"].flatten().double(), grid[i + 1], rtol=1e-6, atol=0)
    assert torch.equal(pairs["valid"].flatten(), i < N - 2)
    noise = pairs["x_t"] / pairs["t"]
    torch.testing.assert_close(pairs["next", "x_t"] / pairs["next", "t"], noise)  # one noise for both
    assert float(noise.std()) == pytest.approx(1, abs=0.02)
    again = sample_consistency_pairs(EDM(), torch.zeros(B, 2), num_scales=N, generator=generator())
    assert bool((again == pairs).all())


def test_pairs_are_transitions_like_any() -> None:
    """Standard denoising on them is standard denoising; so they serve Monte Carlo as a baseline."""
    pairs = sample_consistency_pairs(EDM(), randn(30, 2), num_scales=9, generator=generator())
    keys = set(sample_td_edm_pairs(EDM(), randn(30, 2), generator=generator()).keys(True, True))
    assert set(pairs.keys(True, True)) - {"index", ("next", "index")} == keys
    torch.testing.assert_close(
        pairs["next", "reward"],
        pairs["A"] * pairs["x0"]
        + pairs["kappa"] * pairs["x_t"]
        - pairs["next", "A"] * pairs["x0"]
        - pairs["next", "kappa"] * pairs["next", "x_t"],
    )


def test_draw_follows_the_progress() -> None:
    draw = ConsistencyPairs(EDM(), s_0=3, s_1=9, mu_0=0.8, stride=0.5, kappa="shared")
    assert (draw.num_scales, draw.target_decay) == (3, pytest.approx(0.8**1.5))
    draw.set_progress(70, 100)
    assert draw.num_scales == num_scales(70, 100, 3, 9) == 9
    assert draw.target_decay == target_decay(70, 100, 3, 9, 0.8) == pytest.approx(0.8 ** (3 / 8))
    pairs = draw(randn(8, 2), cond=None, generator=generator(3))
    same = sample_consistency_pairs(
        EDM(), randn(8, 2), num_scales=9, stride=0.5, kappa="shared", generator=generator(3)
    )
    assert bool((pairs == same).all())


@pytest.mark.parametrize(("kappa", "power"), [("markov", 2), ("shared", 1)])
def test_the_grid_ends_at_the_lowest_level(kappa: Literal["markov", "shared"], power: int) -> None:
    """A_t = 1 - (σ_s/σ_t)^p, σ_s of an index clipped to N-1: the last valid pair keeps a value when Δ > 1."""
    N, grid = 151, EDM().time_grid(151)
    pairs = sample_consistency_pairs(
        EDM(),
        torch.zeros(1, 1).double(),
        num_scales=N,
        stride=1.25,
        kappa=kappa,
        index=torch.tensor([N - 3]),
        noise=torch.zeros(1, 1).double(),
    )
    wanted = 1 - float(grid[N - 1] / grid[N - 2]) ** power
    assert bool(pairs["valid"]) and float(pairs["next", "A"]) == pytest.approx(wanted, rel=1e-9)
    if kappa == "markov":
        assert wanted == pytest.approx(0.278862, abs=1e-6)


@pytest.mark.parametrize("index", [[4], [-1], [1, 2], [1.0]])
def test_an_index_that_no_pair_has_is_refused(index: list[float]) -> None:
    with pytest.raises(InputError, match=r"index must hold 1 whole numbers in 0\.\.3"):
        sample_consistency_pairs(EDM(), torch.zeros(1, 1), num_scales=5, index=torch.tensor(index))
