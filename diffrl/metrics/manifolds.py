"""Precision and recall of samples: how many are near the data, and how much of the data is near samples."""

from collections.abc import Iterator

import torch
from torch import Tensor

from diffrl.errors import InputError
from diffrl.metrics.discrepancy import NUMBERS, clouds
from diffrl.ranges import require_int

__all__ = ["precision", "recall"]


def precision(fx: Tensor, fy: Tensor, *, k: int = 3) -> float:
    """Share of the samples that lie in the manifold of the data: how many of them look like data.

        mean over x of [there is a y with ‖x - y‖ ≤ r_k(y)]

    r_k(y) is the distance of y to its k-th nearest neighbour among the other y. Both figures depend on the numbers of
    samples and data, so compare equal ones. Time grows with (n + m) m, memory does not.

    Source: Improved Precision and Recall Metric for Assessing Generative Models (Kynkäänniemi et al., 2019), eq. 1
    and 2, https://arxiv.org/abs/1904.06991.

    Args:
        fx: features of samples, shape [n, F].
        fy: features of data, shape [m, F], m > k.
        k: neighbours, ≥ 1; the paper's 3.

    Returns:
        In [0, 1].

    Raises:
        ValueError: shapes do not fit, at most k data, NaN or infinity.
    """
    x, y = clouds(fx, fy)
    if len(y) <= require_int("k", k):
        raise InputError(f"precision and recall by {k} neighbours need more points than that, not {len(y)}")
    # the nearest of all y is y itself
    radii = torch.cat([d.kthvalue(k + 1, dim=1).values for d in _blocks(y, y)])
    return float(torch.cat([(d <= radii).any(1) for d in _blocks(x, y)]).double().mean())


def recall(fx: Tensor, fy: Tensor, *, k: int = 3) -> float:
    """Share of the data that lie in the manifold of the samples: how much of the data's variety they have.

    Arguments, source and errors are those of `precision`, with the two sets exchanged.
    """
    return precision(fy, fx, k=k)


def _blocks(x: Tensor, y: Tensor) -> Iterator[Tensor]:
    """Distances of some rows of x to all of y, [rows, m] each; one block is held at a time."""
    for part in x.split(max(1, NUMBERS // len(y))):
        yield torch.cdist(part, y, compute_mode="donot_use_mm_for_euclid_dist")
