"""What a run runs on, and the command that it was started by."""

import os
import platform
import shlex
import sys
from importlib.metadata import version

from diffrl.ranks import ranks_started
from diffrl.registry import IMPORT

__all__ = ["command_line", "versions"]


def versions() -> dict[str, str]:
    """What a run runs on."""
    packages = ("diffrl", "torch", "torchrl", "tensordict", "gymnasium", "numpy", "hydra-core")
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}


def command_line() -> str:
    """The command that runs now, as a user can repeat it."""
    program = sys.argv[0] if sys.argv[0].startswith("-m ") else shlex.quote(sys.argv[0])
    modules = filter(None, os.environ.get(IMPORT, "").split(","))
    words = [word for module in modules for word in ("--import", module)] + sys.argv[1:]
    return " ".join([_launcher(), program, *map(shlex.quote, words)])


def _launcher() -> str:
    """What started this process: python, or torchrun with its number of processes."""
    if ranks_started() == 1:
        return "python"
    here, nodes = (os.environ.get(f"{of}_WORLD_SIZE", "1") for of in ("LOCAL", "GROUP"))
    return f"torchrun --nproc-per-node={here}" + (f" --nnodes={nodes}" if nodes != "1" else "")
