"""What a user can mend is printed in one line that names it and its remedy; programming errors keep their traceback."""

import os
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException
from safetensors import SafetensorError
from yaml import YAMLError

from diffrl.configs.groups import commands_with
from diffrl.configs.output import leave_quietly
from diffrl.errors import DiffrlError
from diffrl.experiments.run import Interrupted
from diffrl.ranks import own_rank
from diffrl.shell_words import requoted
from diffrl.text_files import remedy

__all__ = ["EXPECTED", "explain", "reported"]

EXPECTED = (
    *(HydraException, OmegaConfBaseException, DiffrlError),
    *(OSError, YAMLError, SafetensorError, UnicodeDecodeError),
)
"""What a user can mend, beside a lack of memory."""

NO_MEMORY = re.compile(
    r"can't allocate memory|not enough memory|std::bad_alloc|Storage size calculation overflowed",
    re.IGNORECASE,
)
"""What torch's RuntimeErrors say of a tensor that does not fit."""

SIZES = (
    *("trainer.batch_size", "chain.num_steps", "network.hidden", "network.channels", "network.depth"),
    *("data.size", "data.dim", "data.components", "data.test_size", "eval.points", "eval.samples"),
    *(
        "rollouts.trajectories",
        "rollouts.at_once",
        "policy.num_steps",
        "evaluation.samples",
        "loop.iterations",
    ),
)
"""Settings that memory grows with."""


def explain(error: BaseException) -> str:
    """The error as one line; an unknown key comes with its nearest neighbours."""
    cause: BaseException = error
    while cause.__cause__ is not None and isinstance(cause, HydraException):
        cause = cause.__cause__
    if isinstance(cause, OmegaConfBaseException) and cause.full_key:
        return _about_a_key(cause)
    if isinstance(cause, OverrideParseException):
        return f"{cause.override!r} cannot be read: {requoted(cause.override)}"
    if missing := re.search(r"Could not find '(\w+)/([^']*)'(.*)Config search path:", str(cause), re.DOTALL):
        listed = _line(str(cause).partition("Config search path:")[0])
        if missing[1] == "experiment":  # there are many, and some are the other command's
            listed = f"Could not find 'experiment/{missing[2]}': --help lists them"
        return listed + _other_option(*missing.groups())
    if "Ambiguous value" in str(cause) and (word := re.search(r"argument '(\S+?)=(\S+)'", str(cause))):
        listed = f"write '{word[1]}=[{word[2]}]' for a list"
        return f"{word[1]}={word[2]} holds several values: {listed}, or add --multirun for one run after the other"
    if unknown := re.match(r"(.*)Could not override '(\S+?)'\. No match", str(cause), re.DOTALL):
        others = [name for name in commands_with(unknown[2]) if f"'{name}'" not in unknown[1]]
        where = f"; the command {' and '.join(others)} has it" if others else ""
        return _line(f"{unknown[1]}unknown config key {unknown[2]!r}{where}")
    if isinstance(cause, OSError) and not isinstance(cause, DiffrlError | HydraException):
        return _line(
            f"{cause.filename or 'a file or connection'}: {cause.strerror or cause}: {remedy(cause)}"
        )
    if isinstance(cause, SafetensorError):
        return _line(f"a safetensors file is damaged ({cause}): restore it from a copy")
    if isinstance(cause, UnicodeDecodeError):
        return f"a configuration file is no text in UTF-8 (byte {cause.start}): convert it"
    return _line(str(cause).partition("Config search path:")[0])


def _other_option(group: str, given: str, options: str) -> str:
    """What may have been meant by an option that a group does not have."""
    near = get_close_matches(given, re.findall(r"\S+", options.partition(":")[2]), n=3)
    if near:
        return f"; did you mean {', '.join(f'{group}={name}' for name in near)}?"
    if group == "data" and Path(given).exists():
        return f"; files of yours are data=folder data.path={given}, or npz, idx or hf in place of folder"
    if group == "experiment":
        return "; one of your own is found by --config-dir FOLDER"
    return "; one of your own is known after --import MODULE" if options.strip() else ""


def _about_a_key(error: OmegaConfBaseException) -> str:
    """What is wrong with the value or the name of a key."""
    where, parent, key = str(error.full_key), error.parent_node, str(error.key)
    if isinstance(error, MissingMandatoryValue):
        return f"{where} has no default: give {where}=..."
    known = [str(k) for k in parent if k != "hydra"] if isinstance(parent, DictConfig) else []
    if not known and isinstance(parent, DictConfig):
        return f"unknown config key {where!r}; to add it, write a + before the word"
    if not known or key in known:
        if where == "heldout_reward.target" and "'reward.target'" in str(error):
            return "this reward has no target for the held-out judge to share: set heldout_reward=none, or choose one"
        return f"{where}: {str(error).splitlines()[0]}"
    group = where.removesuffix(key)
    close = [group + k for k in get_close_matches(key, known, n=3)]
    if near := _paths(parent, key)[:3] or close or _paths(parent, key, near=True)[:3]:
        return f"unknown config key {where!r}; did you mean {', '.join(near)}?"
    if group:
        return f"unknown config key {where!r}; {group[:-1]} has {', '.join(sorted(known))}"
    return f"unknown config key {where!r}; --help lists all that can be set"


def _paths(config: DictConfig, key: str, *, near: bool = False) -> list[str]:
    """Full names of a key that stands within a group and was given without it; or of what begins so, or is close."""
    return [
        f"{group!s}.{name}"
        for group, options in config.items_ex(resolve=False)
        if group != "hydra" and isinstance(options, DictConfig)
        for name in map(str, options)
        if name == key
        or (near and len(key) > 2 and (name.startswith(key) or get_close_matches(key, [name], 1, 0.85)))
    ]


def _line(text: str) -> str:
    return " ".join(text.split())


def _lacks_memory(error: BaseException) -> bool:
    """Whether something was too large for the memory."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and NO_MEMORY.search(str(error)) is not None


def _sizes(config: Mapping[Any, Any]) -> str:
    """The settings that memory grows with, the largest first."""
    found = {}
    for name in SIZES:
        group, _, key = name.partition(".")
        if group in config and isinstance(config[group].get(key), int):
            found[name] = config[group][key]
    largest = sorted(found, key=lambda name: -found[name])[:3]
    return ", ".join(f"{name} (now {found[name]})" for name in largest) or "the sizes"


@contextmanager
def reported(*, config: Mapping[Any, Any] | None = None, full: bool | None = None) -> Iterator[None]:
    """Print what a user can mend in one line, unless asked for it in full, and exit with status 1.

    Args:
        config: what is followed, for advice on sizes.
        full: whether to raise it with its traceback; None: what HYDRA_FULL_ERROR says.
    """
    if full is None:
        full = os.environ.get("HYDRA_FULL_ERROR") == "1"
    try:
        yield
    except Interrupted as stop:
        if own_rank() == 0:  # of several processes one tells
            print(stop, flush=True)
        sys.exit(1)  # what comes after it in a script would find half a run
    except KeyboardInterrupt as stop:
        sys.exit(f"error: {stop}" if str(stop) else "error: interrupted")
    except BrokenPipeError:
        leave_quietly()
    except EXPECTED as error:
        if full:
            raise
        sys.exit(f"error: {explain(error)}")
    except (MemoryError, RuntimeError) as error:
        if full or not _lacks_memory(error):
            raise
        sys.exit(f"error: not enough memory: lower {_sizes(config or {})} ({_line(str(error))[:200]})")
