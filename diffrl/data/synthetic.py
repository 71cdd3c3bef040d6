"""Data sets drawn by a rule: mixtures, whose law is known exactly, and 2-D shapes."""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Generator, Tensor

from diffrl.data.dataset import Data
from diffrl.data.image_files import MAX_GIB, DataError
from diffrl.data.mixtures import Mixture
from diffrl.data.registry import DATASETS
from diffrl.errors import InputError
from diffrl.ranges import require_int, require_number

__all__ = ["checkerboard", "gmm", "moons", "rings", "spirals"]

# test points come from a random stream of their own, which no small user seed shares
TEST_SEED = 1_597_334_677
MAX_SCALE = 1e15  # squares of larger numbers leave float32


@DATASETS.register("gmm")
def gmm(
    dim: int = 16,
    components: int = 12,
    std: float = 0.05,
    spread: float = 0.5,
    mixture_seed: int = 0,
    test_size: int = 4000,
) -> Data:
    """Gaussian mixture with random means and weights, whose law is known.

        μ_c ~ spread·N(0, I),    s_c = std,    w = softmax(N(0, I))

    Args:
        dim: D ≥ 1, the number of dims.
        components: C ≥ 1.
        std: width of each component, in units of the data.
        spread: scale of the means.
        mixture_seed: chooses the mixture; it is independent of the seed of a run.
        test_size: points to evaluate on; batches are fresh draws.
    """
    _check_sizes("gmm", dim=dim, components=components)
    _check_scales(std=std, spread=spread)
    require_int("mixture_seed", mixture_seed, -(2**63), 2**63 - 1)
    _check_memory("gmm", components * dim, "dim or components")
    g = Generator().manual_seed(mixture_seed)
    means = spread * torch.randn(components, dim, dtype=torch.float64, generator=g)
    weights = torch.randn(components, dtype=torch.float64, generator=g).softmax(0)
    stds = torch.full((components,), std, dtype=torch.float64)
    return _synthetic("gmm", Mixture(means, stds, weights), test_size, dim)


@DATASETS.register("rings")
def rings(modes: int = 8, radius: float = 0.8, std: float = 0.05, test_size: int = 4000) -> Data:
    """Equal Gaussians evenly spaced on a ring in 2-D; the law is known.

    Args:
        modes: number of Gaussians.
        radius: of the ring.
        std: width of each Gaussian.
        test_size: points to evaluate on; batches are fresh draws.
    """
    _check_sizes("rings", modes=modes)
    _check_scales(radius=radius, std=std)
    _check_memory("rings", modes * 2, "modes")
    theta = torch.arange(modes, dtype=torch.float64) * (2 * math.pi / modes)
    means = radius * torch.stack([theta.cos(), theta.sin()], 1)
    ones = torch.ones(modes, dtype=torch.float64)
    return _synthetic("rings", Mixture(means, std * ones, ones / modes), test_size)


@DATASETS.register("checkerboard")
def checkerboard(cells: int = 4, test_size: int = 4000) -> Data:
    """Uniform on the dark cells of a cells × cells board that fills [-1, 1]².

    Args:
        cells: cells along one side, at least 1.
        test_size: points to evaluate on; batches are fresh draws.
    """
    _check_sizes("checkerboard", cells=cells)
    _check_memory("checkerboard", cells**2, "cells")
    return _synthetic("checkerboard", partial(_draw_checkerboard, cells=cells), test_size)


@DATASETS.register("moons")
def moons(noise: float = 0.05, test_size: int = 4000) -> Data:
    """Two interleaved half circles, centred, scaled so that the curves span [-1, 1] across.

    Args:
        noise: standard deviation around the curves, after scaling.
        test_size: points to evaluate on; batches are fresh draws.
    """
    _check_scales(noise=noise)
    return _synthetic("moons", partial(_draw_moons, noise=noise), test_size)


@DATASETS.register("spirals")
def spirals(arms: int = 2, turns: float = 1.5, noise: float = 0.02, test_size: int = 4000) -> Data:
    """Archimedean spirals θ = 2π (turns·r + arm/arms), r = √U(0, 1), in the unit disc.

    Args:
        arms: number of spirals.
        turns: of each spiral from the centre to radius 1.
        noise: standard deviation around the curves.
        test_size: points to evaluate on; batches are fresh draws.
    """
    _check_sizes("spirals", arms=arms)
    _check_memory("spirals", arms, "arms")
    _check_scales(turns=turns, noise=noise)
    return _synthetic("spirals", partial(_draw_spirals, arms=arms, turns=turns, noise=noise), test_size)


def _check_sizes(name: str, **sizes: int) -> None:
    for option, size in sizes.items():
        try:
            require_int(option, size)
        except InputError as error:
            raise DataError(
                f"{name}: `{option}` is {size!r}; it must be a whole number of at least 1"
            ) from error


def _check_scales(**scales: float) -> None:
    for option, scale in scales.items():
        require_number(option, scale, 0, MAX_SCALE)


def _check_memory(name: str, numbers: int, options: str) -> None:
    """Refuse more numbers in float64 than the memory of a data set."""
    gib = 8 * numbers / 2**30
    if gib > MAX_GIB:
        raise DataError(f"{name}: takes {gib:.3g} GiB of memory, more than {MAX_GIB:g}; lower {options}")


def _synthetic(
    name: str, law: Mixture | Callable[[int, Generator | None], Tensor], test_size: int, dim: int = 2
) -> Data:
    _check_sizes(name, test_size=test_size)
    _check_memory(name, test_size * dim, "dim or test_size")
    g = Generator().manual_seed(TEST_SEED)
    if isinstance(law, Mixture):
        return Data(name, law.sample(test_size, g).float(), mixture=law)
    return Data(name, law(test_size, g), draw=law)


def _draw_checkerboard(n: int, generator: Generator | None, *, cells: int) -> Tensor:
    """Uniform on the dark cells of a cells × cells board that fills [-1, 1]²: float32 [n, 2]."""
    square = torch.arange(cells)
    i, j = torch.meshgrid(square, square, indexing="ij")
    dark = torch.stack([i, j], -1)[(i + j) % 2 == 0]
    corner = dark[torch.randint(len(dark), (n,), generator=generator)]
    return (corner + torch.rand(n, 2, generator=generator)) * (2 / cells) - 1


def _draw_moons(n: int, generator: Generator | None, *, noise: float) -> Tensor:
    """Two interleaved half circles, centred, spanning [-1, 1] across, plus Gaussian noise: float32 [n, 2]."""
    theta = math.pi * torch.rand(n, generator=generator)
    lower = torch.rand(n, generator=generator) < 0.5
    # upper: (cos θ, sin θ); lower: the same turned about (½, ¼), the centre of both
    moon = torch.stack([theta.cos() - 0.5, theta.sin() - 0.25], 1) / 1.5
    moon = torch.where(lower[:, None], -moon, moon)
    return moon + noise * torch.randn(n, 2, generator=generator)


def _draw_spirals(n: int, generator: Generator | None, *, arms: int, turns: float, noise: float) -> Tensor:
    """Archimedean spirals θ = 2π (turns·r + arm/arms), r = √U(0, 1), plus Gaussian noise: float32 [n, 2]."""
    r = torch.rand(n, generator=generator).sqrt()
    arm = torch.randint(arms, (n,), generator=generator)
    theta = 2 * math.pi * (turns * r + arm / arms)
    curve = r[:, None] * torch.stack([theta.cos(), theta.sin()], 1)
    return curve + noise * torch.randn(n, 2, generator=generator)
