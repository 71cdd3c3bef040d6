"""Grids in plans: by the label of each axis its setting and values, written as ``objective.lmbda=0,0.5,1``."""

from collections.abc import Mapping, Sequence
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from diffrl.errors import InputError
from diffrl.experiments.grids import Grid
from diffrl.experiments.rates import Tuning

__all__ = ["read_grid", "read_tuning", "refuse_tuned_twice"]


def read_grid(given: Mapping[str, str | None], where: str) -> Grid:
    """The grid that a plan describes; an axis that is None is left out.

    Args:
        given: by the label of each axis its setting and values. A value is whatever the command line takes, a list
            too: ``optim.betas=[0.5,0.999],[0.9,0.999]``.
        where: for the error.

    Raises:
        ValueError: an axis without values, or two that set the same.
    """
    keys: dict[str, str] = {}
    axes = {}
    for label, words in given.items():
        if words is None:
            continue
        key, _, listed = words.partition("=")
        values = _values(key, listed)
        if not values:
            raise InputError(f"{where}: axis {label} is {words!r}: write key=value,value,...")
        if same := [other for other, its in keys.items() if its == key]:
            raise InputError(f"{where}: axes {same[0]} and {label} both set {key}: give its values on one")
        keys[label], axes[label] = key, values
    return Grid(keys, axes)


def read_tuning(plan: Mapping[str, Any], study: str, given: Mapping[str, Any]) -> Tuning | None:
    """What the schemes of a study are tuned over: what the plan says, unless the study says something else.

    Args:
        plan: what `diffrl.configs.plans.PlanConfig` describes.
        study: name of the study.
        given: the study, as the plan has it.

    Raises:
        ValueError: a grid without values, or a seed that some study reports.
    """
    whole, own = plan.get("tuning", {"enabled": False}), given.get("tuning", {})
    if not (whole.get("enabled", True) and own.get("enabled", True)):
        return None
    seeds = own.get("seeds") or whole["seeds"]
    for name, other in plan["studies"].items():
        if both := {*seeds} & {*other["seeds"]}:
            raise InputError(
                f"study {name}: seed {min(both)} is reported, and study {study} is tuned on it: choose other "
                "tuning.seeds"
            )
    grid = read_grid({**whole["grid"], **own.get("grid", {})}, f"study {study}: tuning.grid")
    try:
        return Tuning(grid, tuple(seeds), own.get("by") or whole["by"])
    except InputError as error:
        raise InputError(f"study {study}: {error}") from error


def refuse_tuned_twice(study: str, schemes: Mapping[str, Sequence[str]], tuning: Tuning) -> None:
    """Refuse a scheme that sets what is tuned: all such schemes would become one.

    Raises:
        ValueError: there is one.
    """
    for scheme, words in schemes.items():
        for word in words:
            if key := next((key for key in tuning.grid.keys.values() if _sets(word, key)), None):
                raise InputError(
                    f"study {study}, scheme {scheme}: {word} is tuned by the plan: give the study "
                    f"tuning.enabled=false if {key} is what it compares, or leave the word out"
                )


def _sets(word: str, key: str) -> bool:
    """Whether an override sets that key: by its name, or with others of its group as ``optim={lr: 1e-3}``."""
    given, _, value = word.lstrip("+").partition("=")
    if given == key or not key.startswith(f"{given}."):
        return given == key
    names: list[str] = key.removeprefix(f"{given}.").split(".")
    found: Any = OverridesParser.create().parse_override(f"{given}={value}").value()
    while names and isinstance(found, dict) and names[0] in found:
        found = found[names.pop(0)]
    return not names


def _values(key: str, listed: str) -> tuple[str, ...]:
    """What commas part, each as it is written; commas within brackets and quotes part nothing."""
    values, begun = [], list[str]()
    for part in listed.split(","):
        begun.append(part)
        value = ",".join(begun).strip()
        if value and _is_value(key, value):
            values.append(value)
            begun = []
    return () if begun else tuple(values)


def _is_value(key: str, value: str) -> bool:
    """Whether Hydra reads it as one value."""
    try:
        return not OverridesParser.create().parse_override(f"{key}={value}").is_sweep_override()
    except HydraException:
        return False
