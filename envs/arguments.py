"""Arguments of environments, checked and brought into one form; each error names the argument and the remedy."""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor

from diffrl.data.dataset import Data, pieces
from diffrl.data.image_files import DataError, check_finite
from diffrl.diffusion.laws import NoiseFn
from diffrl.errors import InputError, InputTypeError
from diffrl.ranges import require_int
from diffrl.shapes import require_floating

__all__ = [
    "as_action",
    "as_conditions",
    "as_data",
    "as_dtype",
    "as_shape",
    "as_tensor",
    "fresh_noise",
    "largest_number",
    "named",
    "require_callable",
    "require_states",
]


def named(
    kind: str, registry: Mapping[str, Callable[..., Any]], choice: Any, kwargs: Mapping[str, Any] | None
) -> Any:
    """The object that a name of the registry stands for, built with kwargs; an object is returned as it is.

    Args:
        kind: what to call it in an error.
        registry: name → constructor.
        choice: a name, or an object.
        kwargs: keywords of the constructor.

    Raises:
        TypeError: a keyword that the constructor does not have, or one that it lacks.
        ValueError: an unknown name, or keywords beside an object.
    """
    if kwargs is not None and not isinstance(kwargs, Mapping):
        raise InputTypeError(f"{kind}_kwargs is {kwargs!r}: give a dict of keywords")
    if not isinstance(choice, str):
        if kwargs:
            raise InputError(f"{kind}_kwargs goes with a name, but {kind} is an object already")
        return choice
    if choice not in registry:
        raise InputError(f"{kind} is {choice!r}: choose from {', '.join(sorted(registry))}")
    signature = inspect.signature(registry[choice])
    for key in kwargs or {}:
        if key not in signature.parameters:
            known = ", ".join(signature.parameters)
            raise InputTypeError(f"{kind}_kwargs has no {key!r}: {choice!r} takes {known}")
    try:
        signature.bind(**(kwargs or {}))
    except TypeError as error:
        raise InputTypeError(f"{kind}_kwargs: {choice!r} has a {error}") from error
    return registry[choice](**(kwargs or {}))


def as_action(given: Any, space: spaces.Space[Any]) -> np.ndarray[Any, Any]:
    """An action as an array, of whatever shape and dtype.

    Raises:
        TypeError: it makes none, such as rows of unequal length or a tensor with a gradient.
    """
    try:
        return np.asarray(given)
    except (TypeError, ValueError, RuntimeError) as error:
        what = "a tensor with a gradient" if isinstance(given, Tensor) else f"a {type(given).__name__}"
        raise InputTypeError(
            f"action is {what} that makes no array: give numbers of shape {space.shape}, {space.dtype}"
        ) from error


def as_tensor(name: str, given: Any, needed: str = "an array or a tensor of numbers") -> Tensor:
    """Numbers as a tensor: a tensor is returned as it is, arrays and sequences are copied.

    Args:
        name: what to call it in an error.
        given: it.
        needed: what to give instead, in an error.

    Raises:
        TypeError: it holds something else.
    """
    if isinstance(given, Tensor):
        return given
    try:
        return torch.tensor(np.asarray(given))
    except (TypeError, ValueError, RuntimeError) as error:
        what = f"a {type(given).__name__}"
        if isinstance(given, np.ndarray):
            what = "text" if given.dtype.kind in "US" else f"an array of {given.dtype}"
        raise InputTypeError(f"{name} is {what}: give {needed}") from error


def as_data(given: Any) -> Data | Tensor:
    """A data set as it is, or points [M, *E] as a tensor.

    Raises:
        TypeError: it is something else, or holds integers.
        ValueError: the points have another shape.
        DataError: they hold NaN or infinity.
    """
    if isinstance(given, Data):
        return given
    if not isinstance(given, Tensor | np.ndarray):
        raise InputTypeError(
            f"data is a {type(given).__name__}: give a diffrl.data.Data, or a tensor or array [M, *E]"
        )
    points = as_tensor("data", given)
    require_floating([("data", points)])
    if points.ndim < 2 or points.numel() == 0:
        raise InputError(f"data has shape {tuple(points.shape)}: give [M, *E], one point per row")
    check_finite(points, "data")
    return points


def largest_number(data: Data | Tensor) -> float:
    """The smallest power of two that no number of the points exceeds; it multiplies without rounding."""
    points = [data] if isinstance(data, Tensor) else [x for x in (data.test, data.train) if x is not None]
    stored = () if isinstance(data, Tensor) or data.rows is None else pieces(data.rows)
    largest = max(float(x.abs().max()) for x in chain(points, stored))
    return 2.0 ** math.ceil(math.log2(largest)) if largest > 0 else 1.0


def as_conditions(given: Any) -> Tensor | None:
    """Conditions [M, ...], one a row, as int64, float32 or float64; labels and flags are int64.

    Raises:
        TypeError: they are no numbers.
        ValueError: there are none, or they hold NaN or infinity.
    """
    if given is None:
        return None
    c = as_tensor("conditions", given)
    if c.ndim == 0 or len(c) == 0:
        raise InputError(f"conditions have shape {tuple(c.shape)}: give [M, ...], one a row")
    if c.is_complex():
        raise InputTypeError(f"conditions are {c.dtype}: give whole or floating numbers")
    if not c.is_floating_point():
        return c.long()
    if not bool(c.isfinite().all()):
        raise InputError("conditions hold NaN or infinity: give finite numbers")
    return c if c.dtype in (torch.float32, torch.float64) else c.float()


def as_shape(name: str, given: Sequence[int], *, least_dims: int = 0) -> torch.Size:
    """A shape of sizes ≥ 1.

    Raises:
        TypeError: it is no sequence.
        ValueError: a size is no whole number ≥ 1, or there are too few.
    """
    try:
        sizes = [require_int(f"{name}[{i}]", size) for i, size in enumerate(given)]
    except TypeError as error:
        raise InputTypeError(f"{name} is {given!r}: give a list of sizes such as [64]") from error
    if len(sizes) < least_dims:
        raise InputError(f"{name} is {sizes}: give at least {least_dims} size")
    return torch.Size(sizes)


def as_dtype(given: torch.dtype | str) -> torch.dtype:
    """float32 or float64, by name or as torch's: what numpy has too.

    Raises:
        ValueError: it is another one.
    """
    known = {"float32": torch.float32, "float64": torch.float64}
    dtype = known.get(str(given).removeprefix("torch."))
    if dtype is None:
        raise InputError(f"dtype is {given!r}: give 'float32' or 'float64'")
    return dtype


def require_callable(name: str, given: Any, what: str) -> None:
    """Refuse what cannot be called; None is fine.

    Raises:
        TypeError: it cannot be called.
    """
    if given is not None and not callable(given):
        raise InputTypeError(f"{name} is {given!r}: give a callable {what}, or None")


def require_states(name: str, x: Tensor, batch: Sequence[int], event: Sequence[int]) -> None:
    """Refuse states or actions that are not finite floating numbers of shape [*batch, *event].

    Raises:
        TypeError: they are integers.
        ValueError: they have another shape, which could broadcast in silence.
        DataError: they hold NaN or infinity.
    """
    shape = (*batch, *event)
    if not x.is_floating_point():
        raise InputTypeError(f"{name} has dtype {x.dtype}: give numbers of a floating dtype, shape {shape}")
    if x.shape != shape:
        raise InputError(f"{name} has shape {tuple(x.shape)}, but {shape} is needed")
    if batch:
        check_finite(x.reshape(-1, *event), name)
    elif not bool(x.isfinite().all()):
        raise DataError(f"{name} holds NaN or infinity")


def fresh_noise(source: NoiseFn, x: Tensor) -> Tensor:
    """Numbers of a source that the caller gave, for x.

    Raises:
        ValueError: it gives another shape than x's.
    """
    drawn = source(x)
    if not isinstance(drawn, Tensor) or drawn.shape != x.shape:
        what = tuple(drawn.shape) if isinstance(drawn, Tensor) else type(drawn).__name__
        raise InputError(f"noise gives {what} for a tensor of shape {tuple(x.shape)}: give that shape")
    return drawn.to(x)
