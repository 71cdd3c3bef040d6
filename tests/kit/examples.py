"""The scripts of `examples` as modules."""

import importlib.util
import sys
from types import ModuleType

from tests.kit.paths import EXAMPLES


def example(name: str) -> ModuleType:
    """Import a script anew, by its path without suffix."""
    module_name = f"examples_{name.replace('/', '_')}"
    spec = importlib.util.spec_from_file_location(module_name, EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look themselves up
    spec.loader.exec_module(module)
    return module
