"""Distances of many points: the same numbers as of all pairs at once, in memory that is bounded."""

import math
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist, pdist
from torch import Tensor

from diffrl.diffusion import exact
from diffrl.diffusion.exact import EmpiricalDenoiser
from diffrl.diffusion.schedules.edm import EDM
from diffrl.errors import InputError
from diffrl.metrics import discrepancy, point_clouds
from diffrl.metrics.discrepancy import mmd
from diffrl.metrics.distances import check_distance
from diffrl.metrics.point_clouds import sliced_w2
from tests.kit.oracles import randn


def mmd_of_all_pairs(x: Tensor, y: Tensor) -> float:
    """The same by scipy, all pairs at once."""
    n, m = len(x), len(y)
    h = float(np.median(pdist(torch.cat([x, y]).numpy())))

    def total(a: Tensor, b: Tensor) -> float:
        return float(np.exp(-cdist(a.numpy(), b.numpy(), "sqeuclidean") / (2 * h**2)).sum())

    within = (total(x, x) - n) / (n * (n - 1)) + (total(y, y) - m) / (m * (m - 1))
    return within - 2 * total(x, y) / (n * m)


def binary(n: int, share: float) -> Tensor:
    """Points with few distinct distances, so that very many pairs are at the median."""
    g = torch.Generator().manual_seed(n)
    return (torch.rand(n, 6, generator=g) < share).double()


@pytest.mark.parametrize("numbers", [2**8, 2**11, 2**14, 2**22])
@pytest.mark.parametrize(
    "clouds",
    [
        lambda: (randn(150, 5), 1.2 * randn(233, 5, seed=1)),
        lambda: (randn(2, 3), randn(300, 3, seed=1)),
        lambda: (binary(200, 0.5), binary(150, 0.4)),
        lambda: (randn(120, 2).cumsum(0), randn(121, 2, seed=3).cumsum(0)),
    ],
    ids=["normal", "two points", "ties", "walks"],
)
def test_mmd_in_blocks_is_that_of_all_pairs(
    clouds: Callable[[], tuple[Tensor, Tensor]], numbers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(discrepancy, "NUMBERS", numbers)
    x, y = clouds()
    assert mmd(x, y) == pytest.approx(mmd_of_all_pairs(x, y), rel=1e-9, abs=1e-13)


def test_the_median_is_found_where_the_sample_misses_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(discrepancy, "NUMBERS", 2**10)
    x, y = randn(100, 3), randn(140, 3, seed=1)
    tried = []
    ranked = discrepancy._ranked

    def missing_once(
        z: Tensor, first: int, second: int, low: float, high: float
    ) -> tuple[float, float] | None:
        tried.append((low, high))
        return (
            ranked(z, first, second, low / 3, high / 3)
            if len(tried) == 1
            else ranked(z, first, second, low, high)
        )

    monkeypatch.setattr(discrepancy, "_ranked", missing_once)
    assert mmd(x, y) == pytest.approx(mmd_of_all_pairs(x, y), rel=1e-9)
    assert len(tried) == 2 and tried[1][0] < tried[0][0] < tried[0][1] < tried[1][1]


def test_sliced_w2_in_parts_is_that_of_all_directions(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = randn(70, 4), randn(90, 4, seed=1)
    whole = sliced_w2(x, y)
    monkeypatch.setattr(point_clouds, "NUMBERS", 2**10)
    assert sliced_w2(x, y) == pytest.approx(whole, rel=1e-12)


MEASURE = """
import torch
from diffrl.experiments.estimates import peak_memory
from diffrl.metrics.distances import sample_distance
x, y = torch.randn(200, 2), torch.randn(6000, 2)
for name in ("sliced_w2", "mmd"):
    sample_distance(name, x[:20], y[:20])
    before = peak_memory()
    sample_distance(name, x, y)
    print((peak_memory() - before) / 2**20)
"""


def test_memory_does_not_grow_with_the_number_of_pairs() -> None:
    run = subprocess.run([sys.executable, "-c", MEASURE], capture_output=True, text=True, check=True)
    grown = [float(mib) for mib in run.stdout.split()]
    assert len(grown) == 2 and 1 < max(grown) < 250  # all distances at once took 1,100


def test_the_exact_denoiser_of_many_points_takes_few_states_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exact, "NUMBERS", 2**20)
    points = randn(30_000, 2)
    oracle = EmpiricalDenoiser(EDM(), points)
    seen = []
    posterior_mean = oracle._posterior_mean
    oracle._posterior_mean = lambda x, t: seen.append(len(x)) or posterior_mean(x, t)  # type: ignore
    D_x = oracle(points[:60] + 0.1, torch.full((60,), 0.1, dtype=torch.float64))
    assert sum(seen) == 60 and max(seen) * 30_000 <= 2**20
    distance = torch.cdist(points[:1] + 0.1, points)[0]
    by_hand = (-(distance**2) / (2 * 0.1**2)).softmax(0) @ points
    torch.testing.assert_close(D_x[0], by_hand)


# --- what is refused at the start


@pytest.mark.parametrize("name", ["sliced_w2", "mmd", "fd_digits_cnn"])
def test_distances_in_bounded_memory_take_large_sets(name: str) -> None:
    check_distance(name, 2000, 60_000, 64, max_gib=1.0)


def test_w2_of_sets_that_are_too_large_is_refused() -> None:
    check_distance("w2", 2000, 30_000, 64, max_gib=3.0)
    with pytest.raises(
        InputError, match=r"w2 of 2,000 samples and 30,000 points takes 2\.\d* GiB.*take sliced_w2"
    ):
        check_distance("w2", 2000, 30_000, 64, max_gib=2.0)
    with pytest.raises(InputError, match="GiB"):
        check_distance("w2", 20, 30, 64, max_gib=math.nan)
    with pytest.raises(InputError, match="no distance is called 'fid'"):
        check_distance("fid", 20, 30, 64, max_gib=1.0)
