"""Broadcasting, and the letters that docstrings use for shapes.

B batch, K chain steps, N a flat batch of states, *E event dims (a 2-D point: (2,); an image: (C, H, W)),
`*b` any batch dims ([N] or [B, K]).
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from diffrl.errors import FileError, InputError, InputTypeError

__all__ = [
    *("column", "event_mean", "expand_like", "require_data"),
    *("require_finite", "require_finite_weights", "require_floating"),
]


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
    """Refuse what is no tensor, and tensors that hold integers, by name.

    Raises:
        TypeError: one is no tensor, or not of a floating dtype.
    """
    for name, x in tensors:
        if not isinstance(x, Tensor):
            raise InputTypeError(
                f"{name} is a {type(x).__name__}: give a tensor, "
                f"torch.as_tensor({name if name.isidentifier() else '...'}, dtype=torch.float32)"
            )
        if not torch.is_floating_point(x):
            raise InputTypeError(
                f"{name} has dtype {x.dtype}: diffusion needs a floating dtype; "
                f"convert it, for 8-bit images by {name}.float() / 127.5 - 1"
            )


def require_data(x0: Tensor, cond: Tensor | None = None) -> None:
    """Check clean data x0 [B, *E] and their conditions [B, ...].

    Raises:
        TypeError: x0 is no tensor of a floating dtype, or cond no tensor.
        ValueError: x0 has no batch dim or is empty, or cond is not one for each datum.
    """
    require_floating([("x0", x0)])
    if x0.ndim < 2:
        raise InputError(
            f"x0 has shape {tuple(x0.shape)}: give [B, *E], a batch of data, e.g. x0.unsqueeze(0)"
        )
    if x0.numel() == 0:
        raise InputError(f"x0 has shape {tuple(x0.shape)}: the batch is empty")
    if cond is not None and not isinstance(cond, Tensor):
        raise InputTypeError(f"cond is a {type(cond).__name__}: give a tensor, torch.as_tensor(cond)")
    if cond is not None and len(cond) != len(x0):
        raise InputError(f"cond has {len(cond)} entries, but there are {len(x0)} data")


def require_finite(name: str, x: Tensor) -> None:
    """Refuse NaN and infinity.

    Raises:
        ValueError: x [B, *E] holds some; the first row that does is named.
    """
    if x.is_meta or math.isfinite(x.sum().item()):  # a sum is quick; of finite numbers it may overflow
        return
    finite = x.isfinite()
    if not bool(finite.all()):
        row = int((~finite.flatten(1).all(1)).nonzero()[0])
        raise InputError(f"{name} holds NaN or infinity, first in row {row} of {len(x)}: clean the data")


def require_finite_weights(module: nn.Module, where: str) -> None:
    """Refuse weights, as they were read, that hold NaN or infinity.

    Raises:
        FileError: some do; the first is named.
    """
    for name, x in module.named_parameters():
        if not bool(x.isfinite().all()):
            raise FileError(f"{where} holds NaN or infinity in its weights {name}: get the file again")
