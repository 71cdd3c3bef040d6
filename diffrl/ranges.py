"""Numbers from outside: whole ones, and ones that lie in a range."""

import math
import operator
from collections.abc import Mapping
from textwrap import shorten
from typing import Any

from diffrl.errors import InputError

__all__ = ["MAX_LAYERS", "MAX_REPEATS", "MAX_STEPS", "at_least_one", "require_int", "require_number"]

MAX_STEPS = 1_000_000
"""Most levels of a grid: a table of more takes gigabytes."""

MAX_LAYERS = 10_000
"""Most layers or blocks of a network: building more takes minutes, and signals do not pass them."""

MAX_REPEATS = 1_000_000
"""Most repetitions of a step or an attempt within one call."""


def require_int(name: str, value: Any, least: int = 1, most: int | None = None) -> int:
    """A whole number, Python's or numpy's; no 5.5, no 5.0, no True.

    Args:
        name: of the argument, as the user knows it.
        value: what was given.
        least: smallest number that will do.
        most: largest one; None: any.

    Raises:
        ValueError: it is no whole number, or outside its range.
    """
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None or number < least or (most is not None and number > most):
        wanted = f">= {least}" if most is None else f"in [{least}, {most}]"
        raise InputError(f"{name} is {_name(value)}, but must be a whole number {wanted}")
    return number


def require_number(
    name: str, value: Any, low: float = -math.inf, high: float = math.inf, ends: str = "[]"
) -> float:
    """A finite number; no NaN, no True.

    Args:
        name: of the argument, as the user knows it.
        value: what was given.
        low: lower end of its range.
        high: upper end.
        ends: which ends belong to the range: "[]" both, "()" none, "(]" or "[)" one. Infinity itself never does.

    Raises:
        ValueError: it is no number, or outside its range.
    """
    try:
        number = math.nan if isinstance(value, bool | str | bytes) else float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        number = math.nan
    above = number > low if ends[0] == "(" else number >= low
    below = number < high if ends[1] == ")" else number <= high
    if above and below and math.isfinite(number):
        return number
    must = f"lie in {ends[0]}{low:g}, {high:g}{ends[1]}"
    if high == math.inf:
        must = "be a finite number" + (
            "" if low == -math.inf else f" {'>=' if ends[0] == '[' else '>'} {low:g}"
        )
    raise InputError(f"{name} is {_name(value)}, but must {must}")


def at_least_one(group: str, values: Mapping[str, int]) -> None:
    """Refuse counts below 1.

    Raises:
        ValueError: it names the first one, as the key ``group.name``.
    """
    for name, value in values.items():
        if value < 1:
            raise InputError(f"{group}.{name} is {value}: it must be at least 1")


def _name(value: Any) -> str:
    return shorten(repr(value), 80)
