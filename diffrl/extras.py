"""Optional dependencies: imported when needed, and named with their remedy when missing."""

import importlib
import importlib.util
from types import ModuleType

from diffrl.errors import DiffrlError

__all__ = ["MissingExtra", "require", "require_installed"]


class MissingExtra(DiffrlError, ImportError):
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


def require_installed(*modules: str, extra: str) -> None:
    """Say which extra is missing before any work is done; nothing is imported yet.

    Args:
        modules: top-level names.
        extra: the extra that installs them all.

    Raises:
        MissingExtra: one of them is not installed.
    """
    if missing := [name for name in modules if importlib.util.find_spec(name) is None]:
        raise MissingExtra(f"{', '.join(missing)} missing: pip install 'diffrl[{extra}]'")
