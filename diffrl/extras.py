"""Optional dependencies: imported when needed, and named with their remedy when missing."""

import importlib
from types import ModuleType

__all__ = ["MissingExtra", "require"]


class MissingExtra(ImportError):
    """An optional dependency is not installed."""


def require(module: str, extra: str) -> ModuleType:
    """Import `module`, or say which extra of diffrl brings it.

    Args:
        module: dotted name, e.g. ``"ot"``.
        extra: the extra that installs it, e.g. ``"eval"``.

    Raises:
        MissingExtra: the module cannot be imported.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtra(f"{module} is missing: pip install 'diffrl[{extra}]'") from error
