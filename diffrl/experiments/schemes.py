"""The schemes that one run trains: its own, those beside it that differ in a few settings, and Monte Carlo."""

import re
from collections.abc import Mapping
from typing import Any

from diffrl.errors import InputError
from diffrl.objectives.monte_carlo import is_monte_carlo
from diffrl.objectives.registry import OBJECTIVES

__all__ = ["MONTE_CARLO", "planned_objectives", "registered_name", "settings_of"]

MONTE_CARLO = "monte_carlo"

MAY_DIFFER = ("objective", "chain", "starts", "target")
"""Groups in which schemes of one run may differ: data, network, optimiser, steps and evaluation are shared."""


def planned_objectives(config: Mapping[str, Any]) -> list[str]:
    """What a run trains, in order, by the names that its results have.

    Its objective, and with ``compare`` Monte Carlo: last, or first where there are schemes ``beside`` the objective.

    Args:
        config: of the run; one of before diffrl 0.4 has no ``beside``.

    Raises:
        InputError: the name of a scheme cannot be one.
    """
    main, beside = config["objective"]["name"], config.get("beside") or {}
    for name in beside:
        if name == "data" or name in OBJECTIVES or not re.fullmatch(r"\w+", name, re.ASCII):
            raise InputError(f"beside.{name}: choose a name of letters and digits that no objective has")
    if not config["compare"]:
        return [main]
    if is_monte_carlo(main):
        return [main, *beside]
    return [MONTE_CARLO, main, *beside] if beside else [main, MONTE_CARLO]


def registered_name(config: Mapping[str, Any], name: str) -> str:
    """The registered objective of a scheme of a run, one of `planned_objectives`."""
    if name != config["objective"]["name"] and name not in (config.get("beside") or {}):
        return MONTE_CARLO
    return str(settings_of(config, name)["objective"]["name"])


def settings_of(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The settings that a scheme of a run is trained by.

    Args:
        config: of the run.
        name: of the scheme, among `planned_objectives`.

    Raises:
        InputError: the scheme changes what is common to all, or a setting that there is not.
    """
    settings = dict(config)
    for group, given in (config.get("beside") or {}).get(name, {}).items():
        where = f"beside.{name}.{group}"
        if group not in MAY_DIFFER or not isinstance(given, Mapping):
            raise InputError(f"{where}: schemes of one run may differ in settings of {', '.join(MAY_DIFFER)}")
        if unknown := [key for key in given if key not in config[group]]:
            raise InputError(f"{where}.{unknown[0]}: there is {', '.join(config[group])}")
        settings[group] = {**config[group], **given}
    return settings
