"""What a checkpoint belongs to: named facts that it keeps, compared when a run goes on."""

import hashlib
import json
import platform
import warnings
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffrl.training.lock import RunFolderError

__all__ = [
    "ACCEPT",
    "Facts",
    "RunChanged",
    "fingerprint",
    "flat",
    "identity_of",
    "refuse_changes",
    "require_kind",
    "surroundings",
    "warn_of_surroundings",
]

Facts = Mapping[str, Any]
"""Name, as the key that a user types → string, number, boolean, None or a list of these."""

ACCEPT = "accept_changes"
"""The word to go on all the same: on the command line and in Python."""

KINDS = {"trainer": "train", "loop": "finetune"}
"""The group that says how long a run is, and the command whose runs have it."""

MOVABLE = ("data.workers", "device", "rank_timeout", "first_timeout", "resume", "run_dir", "extend", ACCEPT)
"""Settings that say where and how far a run goes, and not what it is."""

_ABSENT = "nothing"


class RunChanged(RunFolderError):
    """A checkpoint belongs to a run with other settings, data or methods than the one that goes on."""


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A configuration without nesting: value by dotted key.

    >>> flat({"seed": 0, "optim": {"lr": 0.1, "betas": [0.9, 0.99]}})
    {'seed': 0, 'optim.lr': 0.1, 'optim.betas': [0.9, 0.99]}
    """
    found: dict[str, Any] = {}
    for key, value in config.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return found


def identity_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a configuration says of a run, for its checkpoints: see `diffrl.training.identity`."""
    return {key: value for key, value in flat(config).items() if key not in MOVABLE}


def require_kind(path: Path, config: Mapping[str, Any], wanted: str) -> None:
    """Refuse the folder of another kind of run.

    Args:
        path: the folder.
        config: what its config.yaml holds.
        wanted: the command whose run it must be.

    Raises:
        RunFolderError: it holds a run of another command.
    """
    found = next((command for group, command in KINDS.items() if isinstance(config.get(group), dict)), None)
    if found == wanted:
        return
    if found is None:
        raise RunFolderError(f"{path} holds no run: its config.yaml has none of {', '.join(KINDS)}")
    use = {"train": "diffrl.load", "finetune": "diffrl.load_tuned"}[found]
    raise RunFolderError(
        f"{path} holds a run of the command {found}, and not of {wanted}: resume it there, or load it with {use}"
    )


def fingerprint(tensors: Iterable[Tensor]) -> str:
    """Dtypes, shapes and bits of tensors, in 16 hexadecimal digits of SHA-256; the same on every machine."""
    digest = hashlib.sha256()
    for x in tensors:
        digest.update(f"{x.dtype}{tuple(x.shape)}".encode())
        digest.update(x.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def surroundings(device: torch.device | str = "cpu", ranks: int = 1) -> dict[str, Any]:
    """What a result depends on in its last bits only: versions, number of threads and processes, kind of device."""
    return {
        "python": platform.python_version(),
        "diffrl": version("diffrl"),
        "torch": str(torch.__version__),
        "safetensors": version("safetensors"),
        "threads": torch.get_num_threads(),
        "device": torch.device(device).type,
        "ranks": ranks,
    }


def refuse_changes(
    kept: Facts,
    now: Facts,
    *,
    of: object,
    steps: str,
    extend: bool = False,
) -> None:
    """Refuse to go on with a run that has become another one, unless by `ACCEPT`.

    Facts that only `now` has are options that the code gained since, and not compared.

    Args:
        kept: of the checkpoint; empty for one from before checkpoints kept any.
        now: of what is to go on.
        of: path of the checkpoint, for errors.
        steps: the fact that says how long the run is.
        extend: whether `now` may be longer.

    Raises:
        RunChanged: it names every fact that differs, its old value and its new one.
    """
    now = json.loads(json.dumps(dict(now)))  # as it comes out of a file: tuples are lists
    changed = [key for key, value in kept.items() if key not in now or now[key] != value]
    longer = steps in changed and steps in now and now[steps] > kept[steps]
    if longer and extend:
        changed.remove(steps)
    if not changed:
        return
    told = ", ".join(f"{key} {kept[key]!r} → {now.get(key, _ABSENT)!r}" for key in changed)
    if changed == [steps] and longer:
        remedy = "to train on for more steps, say `extend`"
    else:
        remedy = f"take that back, choose another folder, or say `{ACCEPT}` to go on all the same"
    raise RunChanged(f"{of} belongs to a run that is not this one: {told}; {remedy}")


def warn_of_surroundings(kept: Facts, now: Facts, *, of: object) -> None:
    """One warning where a run goes on under other versions, threads or on another kind of device."""
    if told := ", ".join(f"{k} {v} → {now[k]}" for k, v in kept.items() if k in now and now[k] != v):
        warnings.warn(
            f"{of} was written elsewhere ({told}): what follows is the same but for the last bits",
            RuntimeWarning,
            stacklevel=4,
        )
