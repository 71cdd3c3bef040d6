"""The error of a denoiser against the exact one, and distances between samples and data."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from diffrl.diffusion.denoisers import DenoiserFn
from diffrl.diffusion.networks.digits_cnn import digits_cnn
from diffrl.diffusion.posterior import marginal
from diffrl.diffusion.predictions import scalings
from diffrl.diffusion.schedules.base import Schedule
from diffrl.errors import InputError
from diffrl.extras import require
from diffrl.metrics.discrepancy import NUMBERS, clouds, mmd
from diffrl.metrics.reference_statistics import Features, Statistics, frechet, kept_statistics

__all__ = [
    "SAMPLE_DISTANCES",
    "check_distance",
    "denoising_error",
    "digits_features",
    "evaluation_noise",
    "frechet_distance",
    "mmd",
    "sample_distance",
    "sliced_w2",
    "time_at",
    "value_error",
    "w2",
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
        The error at each level, by the key ``f"{sigma:g}"``.

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
        The error at each level, by the key ``f"{sigma:g}"``.

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


def w2(x: Tensor, y: Tensor) -> float:
    """Exact 2-Wasserstein distance of two point clouds: √(min over couplings of E|x - y|²).

    2,000 points take seconds; the time grows faster than n m, and memory is 42 bytes for each of the n m pairs. For few
    points in many dims the distance says little.

    Args:
        x: [n, *E].
        y: [m, *E].

    Raises:
        ValueError: shapes do not fit, NaN or infinity.
        MissingExtra: POT is not installed.
    """
    x, y = clouds(x, y)
    ot = require("ot", "eval")
    cost = torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist").square_().cpu().numpy()
    squared, log = ot.emd2([], [], cost, numItermax=10_000_000, log=True)
    if log["warning"] is not None:
        raise InputError(
            f"w2: optimal transport did not converge ({str(log['warning']).splitlines()[0]}): give fewer samples, or "
            "take sliced_w2"
        )
    return math.sqrt(max(float(squared), 0.0))


def sliced_w2(x: Tensor, y: Tensor, *, projections: int = 500, seed: int = 0) -> float:
    """Sliced 2-Wasserstein distance: √(mean over directions θ of W2²(θ·x, θ·y)), θ uniform on the sphere.

    In 1-D, W2² is the integral over q of the squared difference of the quantile functions.

    Source: Sliced and Radon Wasserstein Barycenters of Measures (Bonneel et al., 2015),
    https://doi.org/10.1007/s10851-014-0506-3 (with the mean over directions).

    Args:
        x: [n, *E].
        y: [m, *E].
        projections: number of directions.
        seed: seed of the directions; distances with different seeds cannot be compared.

    Raises:
        ValueError: shapes do not fit, NaN or infinity.
    """
    x, y = clouds(x, y)
    n, m = len(x), len(y)
    g = torch.Generator().manual_seed(seed)
    theta = torch.randn(x.shape[1], projections, dtype=torch.float64, generator=g)
    theta = (theta / theta.norm(dim=0)).to(x.device)
    # both quantile functions are constant between neighbouring multiples of 1/n and 1/m; unit: 1/(n m)
    steps = torch.cat([torch.arange(n + 1) * m, torch.arange(m + 1) * n]).unique()
    left, width = steps[:-1].to(x.device), (steps.diff().double() / (n * m)).to(x.device)
    squares = []
    for part in theta.split(max(1, NUMBERS // len(left)), dim=1):
        u, v = (x @ part).sort(0).values[left // m], (y @ part).sort(0).values[left // n]
        squares.append((width[:, None] * (u - v) ** 2).sum(0))
    return math.sqrt(float(torch.cat(squares).mean()))


def frechet_distance(fx: Tensor, fy: Tensor) -> float:
    """Squared Fréchet distance of Gaussians fitted to two sets of features (FID's formula).

        |m_x - m_y|² + tr(C_x + C_y - 2 (C_x C_y)^{1/2})

    With C_x = UᵀU and C_y = VᵀV the last trace is the sum of the singular values of U Vᵀ. This needs no root of a
    matrix that may be singular, so that there may be fewer samples than dims.

    Source: GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash Equilibrium (Heusel et al.,
    2017), eq. 6, https://arxiv.org/abs/1706.08500.

    Args:
        fx: features [n, F], n ≥ 2.
        fy: features [m, F], m ≥ 2.

    Raises:
        ValueError: shapes do not fit, fewer than two samples, NaN or infinity.
    """
    fx, fy = clouds(fx, fy)
    if len(fx) < 2 or len(fy) < 2:
        raise InputError(f"a covariance needs at least 2 samples, not {len(fx)} and {len(fy)}")
    return frechet(Statistics.of(fx), Statistics.of(fy))


@torch.no_grad()
def digits_features(x: Tensor) -> Tensor:
    """Features of `digits_cnn`, the classifier of scikit-learn's digits that comes with the library.

    Args:
        x: images in [-1, 1], shape [N, 1, 8, 8].

    Returns:
        float32 [N, 64].

    Raises:
        ValueError: another shape.
    """
    network = digits_cnn(x.device)
    return torch.cat([network.features(part) for part in x.float().split(2048)])


def _fd_digits_cnn(x: Tensor, y: Tensor) -> float:
    return frechet_distance(digits_features(x), digits_features(y))


def sample_distance(name: str, x: Tensor, y: Tensor, *, statistics: str | Path | None = None) -> float:
    """Distance between samples and data by name; report it as ``f"{name}@{len(x)}"``.

    Even for perfect samples the distance falls as their number grows, so compare equal numbers of samples only.

    Args:
        name: "w2", "sliced_w2", "mmd" or "fd_digits_cnn" (Fréchet distance of `digits_features`).
        x: samples, shape [n, *E].
        y: data, never trained on, shape [m, *E].
        statistics: folder where the mean and covariance of y's features are kept, so that they are computed once; for
            "fd_digits_cnn", see `diffrl.metrics.reference_statistics.kept_statistics`.

    Raises:
        ValueError: an unknown name, samples that the distance refuses, a folder for a distance without features, or a
            damaged file in it.
        FileError: a file in it cannot be read or written.
        MissingExtra: the distance needs a package that is not installed.
    """
    if name not in SAMPLE_DISTANCES:
        raise InputError(f"no distance is called {name!r}; there are {', '.join(SAMPLE_DISTANCES)}")
    if statistics is None:
        return SAMPLE_DISTANCES[name](x, y)
    if name not in FEATURES:
        raise InputError(
            f"statistics is given, but {name} is no distance of features: take {', '.join(FEATURES)}"
        )
    features = FEATURES[name]
    fx = features.compute(x).cpu()
    return frechet(Statistics.of(clouds(fx, fx)[0]), kept_statistics(features, y, statistics))


def check_distance(name: str, n: int, m: int, dims: int, max_gib: float) -> None:
    """Refuse a distance between sets of these sizes that would take too much memory.

    Args:
        name: in `SAMPLE_DISTANCES`.
        n: number of samples.
        m: number of points.
        dims: numbers in each.
        max_gib: GiB that may be taken.

    Raises:
        ValueError: an unknown name, or too many points.
    """
    if name not in SAMPLE_DISTANCES:
        raise InputError(f"no distance is called {name!r}; there are {', '.join(SAMPLE_DISTANCES)}")
    gib = (PAIR_BYTES.get(name, 0) * n * m + 16 * (n + m) * dims) / 2**30
    if not gib <= max_gib:
        raise InputError(
            f"{name} of {n:,} samples and {m:,} points takes {gib:.3g} GiB of memory, more than {max_gib:g}: give "
            "fewer samples, take sliced_w2, or raise `max_gib`"
        )


PAIR_BYTES = {"w2": 42}  # measured; the others hold a bounded number of pairs
SAMPLE_DISTANCES: dict[str, Callable[[Tensor, Tensor], float]] = {
    "w2": w2,
    "sliced_w2": sliced_w2,
    "mmd": mmd,
    "fd_digits_cnn": _fd_digits_cnn,
}
FEATURES = {
    "fd_digits_cnn": Features(
        "digits_cnn", digits_features, lambda: digits_cnn(torch.device("cpu")).state_dict()
    )
}
"""Of distances between features."""
