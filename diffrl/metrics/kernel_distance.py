"""The kernel distance between features (KID's formula), by torchmetrics."""

import warnings

import torch
from torch import Tensor, nn

from diffrl.errors import InputError
from diffrl.extras import require
from diffrl.metrics.discrepancy import clouds
from diffrl.ranges import require_int

__all__ = ["kid"]


def kid(fx: Tensor, fy: Tensor, *, subset_size: int = 1000, subsets: int = 100, seed: int = 0) -> float:
    """Mean over random subsets of the unbiased squared maximum mean discrepancy with a cubic kernel.

        mean_{i≠j} k(x_i, x_j) + mean_{i≠j} k(y_i, y_j) - 2 mean_{i,j} k(x_i, y_j),    k(x, y) = (x·y/F + 1)³

    Its expectation does not depend on the number of samples; it may be slightly below 0. torchmetrics computes it, here
    in float64.

    Source: Demystifying MMD GANs (Binkowski et al., 2018), section 4, https://arxiv.org/abs/1801.01401.

    Args:
        fx: features of samples, shape [n, F], n ≥ 2.
        fy: features of data, shape [m, F], m ≥ 2.
        subset_size: points of each set in a subset; fewer where a set has fewer.
        subsets: how many; one is enough where it holds all points.
        seed: of the subsets.

    Raises:
        ValueError: shapes do not fit, fewer than two samples, NaN or infinity.
        MissingExtra: torchmetrics is not installed.
    """
    x, y = clouds(fx, fy)
    size = min(require_int("subset_size", subset_size, 2), len(x), len(y))
    if size < 2:
        raise InputError(f"kid needs at least 2 samples of each, not {len(x)} and {len(y)}")
    image = require("torchmetrics.image.kid", "eval")
    many = 1 if size == len(x) == len(y) else require_int("subsets", subsets)
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", "Metric `Kernel Inception Distance` will save"
        )  # features are here already
        metric = image.KernelInceptionDistance(nn.Identity(), subsets=many, subset_size=size)
    metric.update(y.cpu(), real=True)
    metric.update(x.cpu(), real=False)
    with torch.random.fork_rng(devices=[]):  # it draws by torch's global generator of the CPU
        torch.default_generator.manual_seed(seed)
        return float(metric.compute()[0])
