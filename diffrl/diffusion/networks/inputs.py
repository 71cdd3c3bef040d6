"""Checks of what a network is built for, and of the arguments of its `forward`."""

from collections.abc import Sequence

import torch
from torch import Tensor

from diffrl.errors import InputError, InputTypeError
from diffrl.ranges import require_int

__all__ = [
    "MAX_SIZE",
    "check_event_shape",
    "check_inputs",
    "check_second_time",
    "joined_labels",
    "split_labels",
]

MAX_SIZE = 65536
"""Most units, channels or features of a layer: a matrix of them has 16 GiB."""
MAX_CLASSES = 1_000_000
"""Most labels."""


def check_event_shape(event_shape: tuple[int, ...], num_classes: int) -> tuple[int, ...]:
    """Returns `event_shape` as a tuple of ints.

    Raises:
        ValueError: an empty shape, a size below 1, or `num_classes` outside 0 (no labels) to 1,000,000.
    """
    if not isinstance(event_shape, Sequence):
        raise InputTypeError(f"event_shape is {event_shape!r}: give a tuple, such as ({event_shape!r},)")
    shape = tuple(require_int("a size in event_shape", size) for size in event_shape)
    if not shape:
        raise InputError("event_shape must hold one or more sizes of at least 1, such as (2,), not ()")
    require_int("num_classes", num_classes, 0, MAX_CLASSES)
    return shape


def check_second_time(x: Tensor, c_noise_r: Tensor | None, *, second_time: bool) -> None:
    """Checks c_noise_r [N], the code of a second time, against x [N, *E].

    Raises:
        ValueError: another shape, or a code for a network that was built without a second time.
    """
    if c_noise_r is None:
        return
    if not second_time:
        raise InputError(
            "c_noise_r was given to a network without a second time: build it with second_time=True"
        )
    if c_noise_r.shape != x.shape[:1]:
        raise InputError(
            f"c_noise_r must have shape [{len(x)}], one per row of x, not {list(c_noise_r.shape)}"
        )


def check_inputs(
    x: Tensor, c_noise: Tensor, cond: Tensor | None, event_shape: tuple[int, ...], num_classes: int
) -> None:
    """Checks x [N, *E], c_noise [N] and cond [N] against what a network was built for.

    Raises:
        TypeError: cond holds no whole numbers.
        ValueError: naming the argument, the shape wanted and the shape given.
    """
    if x.shape[1:] != event_shape:
        raise InputError(
            f"x must have shape [N, {str(event_shape)[1:-1].rstrip(',')}], not {list(x.shape)}: the network was built "
            f"for event_shape={event_shape}"
        )
    if c_noise.shape != x.shape[:1]:
        raise InputError(f"c_noise must have shape [{len(x)}], one per row of x, not {list(c_noise.shape)}")
    if cond is None:
        return
    if num_classes == 0:
        raise InputError("cond was given to a network without labels: build it with num_classes=... above 0")
    if not isinstance(cond, Tensor) or cond.dtype not in (torch.int64, torch.int32):
        found = cond.dtype if isinstance(cond, Tensor) else type(cond).__name__
        raise InputTypeError(f"cond is of type {found}: give labels as a tensor of int64")
    if cond.shape != x.shape[:1]:
        raise InputError(f"cond must have shape [{len(x)}], one label per row of x, not {list(cond.shape)}")


def joined_labels(labels: Tensor | None, augment: Tensor) -> Tensor:
    """One condition of labels [N], if there are any, and of what was done to each image, [N, A]: floats [N, 1+A or A].

    It is exact for labels below 2²⁴, which all are (`check_event_shape`).
    """
    return augment if labels is None else torch.cat([labels[:, None].to(augment), augment], 1)


def split_labels(
    cond: Tensor | None, num_classes: int, augment_dim: int
) -> tuple[Tensor | None, Tensor | None]:
    """The labels [N] and the augmentation [N, A] that `joined_labels` has put together; other conditions stay whole.

    Args:
        cond: floats, as `joined_labels` makes them; or labels alone, or None, for images as they are.
        num_classes: of the network, C.
        augment_dim: of the network, A; 0: it takes no augmentation.

    Raises:
        ValueError: floats of another shape.
    """
    if cond is None or augment_dim == 0 or not cond.is_floating_point():
        return cond, None
    width = augment_dim + (num_classes > 0)
    if cond.ndim != 2 or cond.shape[1] != width:
        raise InputError(
            f"cond has shape {list(cond.shape)}: for {num_classes} classes and augment_dim={augment_dim} give "
            f"[N, {width}], or labels alone"
        )
    return (cond[:, 0].long() if num_classes else None), cond[:, width - augment_dim :]
