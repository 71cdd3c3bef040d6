"""Detectors and readers of images that a reward is built on: of the user or of the library, given or known by name."""

from collections.abc import Callable
from functools import cache
from typing import Any

from diffrl.errors import InputTypeError
from diffrl.registry import Registry, registries

__all__ = ["DETECTORS", "READERS", "check_tool", "tool"]

DETECTORS = Registry("detector", "diffrl.rewards")
"""Functions () → detector, which is (images uint8 [n, H, W, 3]) → n lists of `Detection`, or of mappings like it."""

READERS = Registry("reader", "diffrl.rewards")
"""Functions () → reader, which is (images uint8 [n, H, W, 3]) → n strings: the text that it finds, "" for none."""


def check_tool(registry: Registry, given: Any) -> None:
    """Refuse what is neither a callable nor a name in the registry; nothing is loaded yet."""
    if isinstance(given, str):
        registry.entry(given)
    elif not callable(given):
        raise InputTypeError(f"{registry.kind} is {given!r}: give a callable, or a name that is registered")


def tool(registry: Registry, given: Any) -> Callable[..., Any]:
    """The callable itself, or what its name makes: at its first use, and once in each process."""
    return _made(registry.kind, given) if isinstance(given, str) else given


@cache
def _made(
    kind: str, name: str
) -> Any:  # by name, so that a reward that is sent to a process takes no weights along
    return registries()[kind][name]()
