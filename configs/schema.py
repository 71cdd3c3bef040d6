"""Structured configs, derived from constructors' signatures: the only home of a default stays the code."""

import inspect
from collections.abc import Callable
from dataclasses import field, make_dataclass
from enum import Enum
from functools import partial
from types import GenericAlias, NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from omegaconf import MISSING

from diffrl.errors import InputTypeError

__all__ = ["schema"]


def schema(
    name: str,
    *functions: Callable[..., Any],
    omit: tuple[str, ...] = (),
    tag: bool = True,
    bases: tuple[type, ...] = (),
) -> type:
    """A dataclass with the parameters of `functions`, in plain types, for OmegaConf to validate against.

    Args:
        name: of the class, shown in error messages; with `tag` also the value of its field ``name``.
        functions: constructors; a parameter of several is taken from the first.
        omit: parameters that the library supplies itself.
        tag: whether a field ``name`` says which of a group this is.
        bases: dataclasses with further fields.
    """
    fields: dict[str, tuple[str, Any, Any]] = {}
    if tag:
        fields["name"] = ("name", str, field(default=name))
    for function in functions:
        target = function.__init__ if inspect.isclass(function) else function
        hints = get_type_hints(target)
        for parameter in inspect.signature(function).parameters.values():
            if parameter.name in omit or parameter.name in fields:
                continue
            if parameter.name not in hints:
                given = "" if parameter.default is parameter.empty else f" = {parameter.default!r}"
                raise InputTypeError(
                    f"{name}: its option {parameter.name!r} has no type, so that no configuration can check it: write "
                    f"{parameter.name}: float{given}, or whichever type it has"
                )
            default = MISSING if parameter.default is parameter.empty else parameter.default
            value = (
                field(default_factory=partial(list, default))
                if isinstance(default, list | tuple)
                else field(default=default)
            )
            fields[parameter.name] = (parameter.name, _plain(hints[parameter.name]), value)
    return make_dataclass(name, list(fields.values()), bases=bases)


def _plain(hint: Any) -> Any:
    """The type as OmegaConf knows it.

    A Literal is its values' type, a tuple a list, a path a string; of a union, what can be written in a file.
    """
    origin, args = get_origin(hint), get_args(hint)
    if origin is Literal:
        return type(args[0])
    if origin in (Union, UnionType):
        inner = [plain for a in args if a is not NoneType and (plain := _plain(a)) is not Any]
        if float in inner and len(set(inner)) > 1:
            inner.append(int)  # 1 for 1.0, as where float stands alone
        union = Union[tuple(dict.fromkeys(inner))] if inner else Any  # noqa: UP007
        return Union[union, None] if NoneType in args else union  # noqa: UP007
    if origin in (tuple, list):
        inside = _plain(args[0])  # in a list of lists, 1 would be refused for 1.0
        return GenericAlias(list, (Any if get_origin(inside) is list else inside,))
    if inspect.isclass(hint) and issubclass(hint, (bool, int, float, str, Enum)):
        return hint
    return str if getattr(hint, "__name__", "") in ("Path", "PathLike") else Any
