"""Broadcasting, and the letters that docstrings use for shapes.

B batch, K chain steps, N a flat batch of states, *E event dims (a 2-D point: (2,); an image: (C, H, W)),
`*b` any batch dims ([N] or [B, K]).
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from diffrl.errors import InputTypeError

__all__ = ["column", "event_mean", "expand_like", "require_floating"]


def expand_like(a: Tensor, x: Tensor) -> Tensor:
    """`a` with dims of size 1 appended until it broadcasts against `x`.

    Args:
        a: one value per state, shape [*b] or [*b, 1].
        x: states, shape [*b, *E].
    """
    return a.reshape(a.shape + (1,) * (x.ndim - a.ndim)) if a.ndim < x.ndim else a


def column(c: Tensor, x: Tensor) -> Tensor:
    """A float64 number, or one for each state, in the dtype of the states x [N, *E] and ready to multiply them."""
    return expand_like(c.to(x), x)


def event_mean(x: Tensor, batch_dims: int) -> Tensor:
    """Mean over the event dims: [*b, *E] → [*b]."""
    return x.flatten(batch_dims).mean(-1) if x.ndim > batch_dims else x


def require_floating(tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Refuse tensors that hold integers, by name.

    Raises:
        TypeError: a tensor is not of a floating dtype.
    """
    for name, x in tensors:
        if not torch.is_floating_point(x):
            raise InputTypeError(
                f"{name} has dtype {x.dtype}: diffusion needs a floating dtype; "
                f"convert it, for 8-bit images by {name}.float() / 127.5 - 1"
            )
