"""The error of a denoiser against the exact one, and distances between samples and data."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from diffrl.diffusion.denoisers import DenoiserFn
from diffrl.diffusion.posterior import marginal
from diffrl.diffusion.predictions import scalings
from diffrl.diffusion.schedules.base import Schedule
from diffrl.errors import InputError, InputTypeError
from diffrl.metrics.measures import Reference, features_of

__all__ = [
    "check_distance",
    "denoising_error",
    "evaluation_noise",
    "sample_distance",
    "time_at",
    "value_error",
]


def evaluation_noise(x0: Tensor, seed: int, first: int = 0) -> Tensor:
    """Standard normal noise for x0 [N, *E], one random stream for each sample.

    Sample i's noise depends on (seed, first + i) alone: not on the batch it is in, the device or, up to
    rounding, the dtype.

    Args:
        x0: samples whose shape, dtype and device the noise gets.
        seed: ≥ 0.
        first: number of the first sample in the whole set.
    """
    shape = x0.shape[1:]
    streams = (np.random.Philox(key=[seed, first + i]) for i in range(x0.shape[0]))
    noise = np.stack([np.random.Generator(stream).standard_normal(shape) for stream in streams])
    return torch.from_numpy(noise).to(x0)


def time_at(process: Schedule, sigma: float) -> Tensor:
    """The time whose noise-to-signal ratio is sigma: float64 scalar."""
    if not sigma > 0:
        raise InputError(f"sigma is {sigma}: the value error needs noise, so give sigma > 0")
    t = process.t_from_log_snr(torch.tensor(-2 * math.log(sigma), dtype=torch.float64))
    reached = float(process.sigma(t) / process.alpha(t))
    if abs(reached / sigma - 1) > 0.1:  # in discrete time, the nearest timestep is used
        raise InputError(f"sigma is {sigma:g}, but the nearest noise level of {process} is {reached:g}")
    return t


def value_error(
    denoiser: DenoiserFn,
    oracle: DenoiserFn,
    x0: Tensor,
    process: Schedule,
    sigmas: Sequence[float],
    *,
    sigma_data: float,
    seed: int = 0,
    cond: Tensor | None = None,
    batch_size: int = 1024,
) -> dict[str, float]:
    """Mean squared error of a denoiser against the exact one, on the scale of a network's output.

        mean over points of Σ_dims ‖D - D*‖² / c_out(t)²,    c_out = σ σd/√(σ² + α² σd²)

    The same noise of each point serves every level, and does not depend on `batch_size`. A module is
    evaluated in the mode it is in: call `.eval()` first.

    `EmpiricalDenoiser`, the exact one of a finite set, knows its points by heart: on other points the error is large
    for every network that generalises. There, look at `denoising_error` on points that were never trained on.

    Source: c_out: Elucidating the Design Space of Diffusion-Based Generative Models (Karras et al., 2022),
    Table 1, https://arxiv.org/abs/2206.00364.

    Args:
        denoiser: D, (x_t [N, *E], t [N], cond) → [N, *E].
        oracle: D*, the same for the exact posterior mean.
        x0: clean points to noise, shape [M, *E].
        process: noise schedule.
        sigmas: noise-to-signal ratios σ/α > 0 (EDM's σ); a discrete process takes its nearest time.
        sigma_data: σd, standard deviation of the data.
        seed: seed of the evaluation noise.
        cond: condition of each point for both denoisers, shape [M, ...], or None.
        batch_size: number of points handled at once.

    Returns:
        The error at each level, by the key ``f"{sigma:g}"`` as in results.json; ``float(key)`` is σ.

    Raises:
        ValueError: a sigma ≤ 0, or out of reach of a discrete process.
    """
    return _errors(
        denoiser, lambda x, *state: oracle(*state), x0, process, sigmas, sigma_data, seed, cond, batch_size
    )


def denoising_error(
    denoiser: DenoiserFn,
    x0: Tensor,
    process: Schedule,
    sigmas: Sequence[float],
    *,
    sigma_data: float,
    seed: int = 0,
    cond: Tensor | None = None,
    batch_size: int = 1024,
) -> dict[str, float]:
    """Mean squared error of a denoiser against the clean points themselves, on the scale of a network's output.

        mean over points of Σ_dims ‖D - x0‖² / c_out(t)²,    c_out = σ σd/√(σ² + α² σd²)

    On points that were never trained on, this is how well it denoises what it has not seen. It needs no exact denoiser,
    and its least value is not 0: it is the value error plus the error of the exact denoiser. The noise is that of
    `value_error`.

    Args:
        denoiser: as for `value_error`.
        x0: clean points, shape [M, *E].
        process: noise schedule.
        sigmas: noise-to-signal ratios σ/α > 0 (EDM's σ); a discrete process takes its nearest time.
        sigma_data: σd, standard deviation of the data.
        seed: seed of the evaluation noise.
        cond: condition of each point, shape [M, ...], or None.
        batch_size: number of points handled at once.

    Returns:
        The error at each level, by the key ``f"{sigma:g}"`` as in results.json; ``float(key)`` is σ.

    Raises:
        ValueError: a sigma ≤ 0, or out of reach of a discrete process.
    """
    return _errors(denoiser, lambda x, *state: x, x0, process, sigmas, sigma_data, seed, cond, batch_size)


@torch.no_grad()
def _errors(
    denoiser: DenoiserFn,
    truth: Callable[..., Tensor],
    x0: Tensor,
    process: Schedule,
    sigmas: Sequence[float],
    sigma_data: float,
    seed: int,
    cond: Tensor | None,
    batch_size: int,
) -> dict[str, float]:
    """Mean of ‖D - truth(x0, x_t, t, cond)‖²/c_out² by σ."""
    if isinstance(sigmas, int | float):
        raise InputTypeError(f"sigmas is {sigmas!r}: give a list, [{sigmas!r}]")
    times = {f"{sigma:g}": time_at(process, sigma).to(x0.device) for sigma in sigmas}
    totals = dict.fromkeys(times, 0.0)
    for first in range(0, len(x0), batch_size):
        x = x0[first : first + batch_size]
        c = None if cond is None else cond[first : first + batch_size]
        noise = evaluation_noise(x, seed, first)
        prior = getattr(denoiser, "prior", None)
        noise = noise if prior is None else prior.of(c, x)[1] * noise
        for key, time in times.items():
            t = time.to(x.dtype).expand(len(x))
            x_t = marginal(process, x, t, noise)
            error = denoiser(x_t, t, c).double() - truth(x, x_t, t, c).double()
            c_out = scalings(process, time, "edm", sigma_data).c_out
            totals[key] += float((error**2).sum() / c_out**2)
    return {key: total / len(x0) for key, total in totals.items()}


def sample_distance(
    name: str,
    x: Tensor,
    y: Tensor,
    *,
    statistics: str | Path | None = None,
    weights: str | Path | None = None,
) -> float:
    """Distance between samples and data by name; report it with the number of samples, as `FigureName` does.

    Even for perfect samples the distance falls as their number grows, so compare equal numbers of samples only.

    Args:
        name: "w2", "sliced_w2", "mmd", or a measure of features, such as "fd_digits_cnn": see
            `diffrl.metrics.measures.Reference`.
        x: samples, shape [n, *E].
        y: data, never trained on, shape [m, *E].
        statistics: folder where the mean and covariance of y's features are kept, so that they are computed once; for
            "fd_...", see `diffrl.metrics.reference_statistics.kept_statistics`.
        weights: file of the weights of features that take one.

    Raises:
        ValueError: an unknown name, samples that the distance refuses, a folder for a distance that keeps none, or a
            damaged file in it.
        FileError: a file in it cannot be read or written.
        MissingExtra: the distance needs a package that is not installed.
    """
    if statistics is not None and not name.startswith("fd_"):
        raise InputError(
            f"statistics is given, but {name} is no distance of features that keeps them: take fd_digits_cnn"
        )
    return Reference(y, statistics=statistics, weights=weights).measured((name,), x)[name]


def check_distance(name: str, n: int, m: int, dims: int, max_gib: float) -> None:
    """Refuse a distance between sets of these sizes that would take too much memory.

    Args:
        name: see `sample_distance`.
        n: number of samples.
        m: number of points.
        dims: numbers in each.
        max_gib: GiB that may be taken.

    Raises:
        ValueError: an unknown name, or too many points.
    """
    features_of(name)
    gib = (PAIR_BYTES.get(name, 0) * n * m + 16 * (n + m) * dims) / 2**30
    if not gib <= max_gib:
        raise InputError(
            f"{name} of {n:,} samples and {m:,} points takes {gib:.3g} GiB of memory, more than {max_gib:g}: give "
            "fewer samples, take sliced_w2, or raise `max_gib`"
        )


PAIR_BYTES = {"w2": 42}  # measured; the others hold a bounded number of pairs
