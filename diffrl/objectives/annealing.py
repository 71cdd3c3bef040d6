"""Options of a loss that change along the training: linear between values at evenly spaced points of it."""

from collections.abc import Mapping, Sequence
from typing import Any

from diffrl.errors import InputError
from diffrl.ranges import require_number

__all__ = ["Ranges", "Schedules", "annealed", "annealing", "begun", "written"]

Ranges = Mapping[str, tuple[float, float]]
"""Least and greatest value of each option that can be annealed."""
Schedules = dict[str, tuple[float, ...]]
"""Values of each option that is."""


def annealing(anneal: Any, ranges: Ranges) -> Schedules:
    """The schedules that were asked for, checked.

    Args:
        anneal: values by the name of an option, e.g. ``{"lmbda": [1, 0.5, 0]}``; None is none.
        ranges: what can be annealed, and where its values must lie.

    Raises:
        InputError: another option, no value, or one outside its range.
    """
    if anneal is None:
        return {}
    example = f"{{{next(iter(ranges), 'option')}: [1, 0]}}"
    if not isinstance(anneal, Mapping):
        raise InputError(f"anneal is {anneal!r}: give lists of values by the name of an option, as {example}")
    found: Schedules = {}
    for name, values in anneal.items():
        if name not in ranges:
            raise InputError(f"anneal has {name!r}, but what can be annealed here is {', '.join(ranges)}")
        if not isinstance(values, list | tuple) or not values:
            raise InputError(f"anneal.{name} is {values!r}: give a list of at least one value, as {example}")
        found[name] = tuple(require_number(f"anneal.{name}", value, *ranges[name]) for value in values)
    return found


def annealed(values: Sequence[float], step: int, grad_steps: int) -> float:
    """The value at gradient step j, counted from 0, of J: the first at step 0, the last at step J-1 and beyond.

        u = (M-1) j/(J-1),    v = (1-w) v_⌊u⌋ + w v_⌊u⌋₊₁,    w = u - ⌊u⌋

    >>> [annealed([1.0, 0.5, 0.5], step, 5) for step in range(5)]
    [1.0, 0.75, 0.5, 0.5, 0.5]

    Args:
        values: v, M of them.
        step: j.
        grad_steps: J.
    """
    last = len(values) - 1
    u = min(max(last * step / max(grad_steps - 1, 1), 0.0), float(last))
    i = int(u)
    a, b = values[i], values[min(i + 1, last)]
    return min(
        max((1 - (u - i)) * a + (u - i) * b, min(a, b)), max(a, b)
    )  # no last bit leads out of the range


def begun(anneal: Schedules, name: str, given: Any) -> Any:
    """What an option without a default of its own begins with: what was given, or its first value.

    Raises:
        InputError: both are there.
    """
    if name not in anneal:
        return given
    if given is not None:
        raise InputError(f"{name} is {given} and annealed too: give one of them, and set the other to null")
    return anneal[name][0]


def written(value: float | Sequence[float]) -> str:
    """An option as a label has it: ``1→0`` where it is annealed."""
    return "→".join(f"{v:g}" for v in value) if isinstance(value, Sequence) else f"{value:g}"
