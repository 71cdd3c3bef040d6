"""Options of diffusers' models: which it has, and further ones that a configuration gives by their names."""

import inspect
from collections.abc import Collection, Mapping
from typing import Any

from diffrl.errors import InputError
from diffrl.extras import require

__all__ = ["built", "further_options", "options_of", "told_options"]


def options_of(model: str) -> dict[str, Any]:
    """The options of a model of diffusers, such as "UNet2DModel", and their defaults.

    Raises:
        MissingExtra: diffusers is not installed.
    """
    parameters = inspect.signature(getattr(require("diffusers", "diffusers"), model).__init__).parameters
    return {name: p.default for name, p in parameters.items() if name != "self"}


def further_options(more: Mapping[str, Any] | None, model: str, taken: Collection[str]) -> dict[str, Any]:
    """The further options, if each is one of that model's that has no other place.

    Args:
        more: options by diffusers' names; None: none.
        model: of diffusers.
        taken: options that have their place elsewhere.

    Raises:
        ValueError: another name, with those that are known.
    """
    if more is None:
        return {}
    known = [name for name in options_of(model) if name not in taken]
    if not isinstance(more, Mapping) or not {*more} <= {*known}:
        raise InputError(
            f"more is {more!r}: give options of diffusers' {model} by name, of {', '.join(known)}"
        )
    return dict(more)


def told_options(told: Mapping[str, Any], model: str, taken: Collection[str]) -> dict[str, Any] | None:
    """The `more` of a model that was made elsewhere: what its config tells but the defaults; None if that is nothing.

    Args:
        told: its config.
        model: of diffusers.
        taken: options that have their place elsewhere.

    Raises:
        ValueError: it tells an option that the diffusers here does not know, and would leave out.
    """
    defaults = options_of(model)
    if unknown := [k for k in told if k not in defaults and not k.startswith("_")]:
        raise InputError(
            f"its option {unknown[0]} is none of {model} in the diffusers that is installed: upgrade that"
        )
    return {k: told[k] for k in defaults if k not in taken and told[k] != defaults[k]} or None


def built(model: str, advice: str, **options: Any) -> Any:
    """A model of diffusers; what it refuses, with its reason in one line.

    Args:
        model: of diffusers.
        advice: what to do where it refuses.
        options: of the model.

    Raises:
        MissingExtra: diffusers is not installed.
        ValueError: diffusers refuses the options.
    """
    made = getattr(require("diffusers", "diffusers"), model)
    try:
        return made(**options)
    except (
        ValueError,
        ZeroDivisionError,
        RuntimeError,
        AttributeError,
        TypeError,
        KeyError,
        NameError,
    ) as error:
        if "alloc" in str(error) or "out of memory" in str(error):
            raise
        raise InputError(
            f"diffusers refuses this {model} ({' '.join(str(error).split())}): {advice}"
        ) from error
