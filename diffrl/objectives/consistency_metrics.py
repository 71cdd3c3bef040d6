"""Distances of two predictions, for consistency training."""

from collections.abc import Callable

from torch import Tensor

from diffrl.errors import InputError
from diffrl.objectives.perceptual import LPIPS
from diffrl.shapes import event_mean

__all__ = ["METRICS", "Distance", "distance", "l1", "l2", "pseudo_huber"]

PSEUDO_HUBER = 0.00054  # h/√dim(E) of the improved consistency training, where h is called c

Distance = Callable[[Tensor, Tensor], Tensor]
"""d of two predictions [B, K, *E], the second without gradient: [B, K]."""


def l2(u: Tensor) -> Tensor:
    """Mean of u²."""
    return event_mean(u.square(), 2)


def l1(u: Tensor) -> Tensor:
    """Mean of |u|."""
    return event_mean(u.abs(), 2)


def pseudo_huber(u: Tensor) -> Tensor:
    """(√(‖u‖² + h²) - h)/√dim(E) with h = 0.00054 √dim(E): as published, over the root of the event's size.

    Source: Improved Techniques for Training Consistency Models (Song & Dhariwal, 2024), section 3.3,
    https://arxiv.org/abs/2310.14189.
    """
    return (event_mean(u.square(), 2) + PSEUDO_HUBER**2).sqrt() - PSEUDO_HUBER


METRICS: dict[str, Callable[[Tensor], Tensor]] = {"l2": l2, "l1": l1, "pseudo_huber": pseudo_huber}
"""d by the difference u of two predictions: [B, K, *E] → [B, K]. LPIPS, the paper's, is no function of it."""


def distance(metric: str | Distance, weights: str | None = None) -> Distance:
    """The distance by its name, or a function of one's own as it is.

    Args:
        metric: a name in `METRICS`, "lpips", or a function.
        weights: folder of the weights of "lpips".

    Raises:
        ValueError: no such name; "lpips" without weights, or weights without it.
        FileError: the weights cannot be read, see `LPIPS.load`.
    """
    if metric == "lpips" and weights is None:
        raise InputError(
            "`metric` lpips needs `metric_weights`, a folder with the weights of VGG-16 and LPIPS's own: nothing is "
            "downloaded"
        )
    if metric != "lpips" and weights is not None:
        raise InputError(f"`metric_weights` is given, but `metric` is {metric!r}: set it to lpips")
    if weights is not None:
        return LPIPS.load(weights)
    if callable(metric):
        return metric
    if metric not in METRICS:
        raise InputError(f"metric is {metric!r}: give one of {', '.join(METRICS)}, lpips")
    by_difference = METRICS[metric]
    return lambda x, y: by_difference(x - y)
