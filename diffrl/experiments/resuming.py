"""Going on with a run: it goes on as it was started, and what may differ is said by a word of its own."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffrl.errors import InputError
from diffrl.training.checkpoints import latest_checkpoint, read_identity
from diffrl.training.identity import ACCEPT, KINDS, identity_of, refuse_changes, require_kind
from diffrl.training.runs import RunFolder

__all__ = ["continued", "resumed"]

WORDS = ("device", "extend", ACCEPT)
"""Settings that can be given with ``resume``."""


def resumed(chosen: Mapping[str, Any], given: Sequence[str]) -> dict[str, Any]:
    """The configuration that the run in ``chosen["resume"]`` was started with, and the words of now.

    Args:
        chosen: what a command composed.
        given: names of the settings that were given to it.

    Raises:
        InputError: something is given that a run cannot be resumed with.
        RunFolderError: there is no run, or one of another command.
    """
    if others := [key for key in given if key not in (*WORDS, "resume")]:
        raise InputError(
            f"{', '.join(others)}: a run is resumed as it was started; only {', '.join(WORDS)} can be given with resume"
        )
    folder = RunFolder.reopen(Path(chosen["resume"]))
    stored = folder.config()
    require_kind(folder.path, stored, next(kind for group, kind in KINDS.items() if group in chosen))
    return {**stored, **{key: chosen[key] for key in ("resume", *given)}}


def continued(config: Mapping[str, Any], group: str, key: str) -> dict[str, Any]:
    """The configuration of a run, compared with what the folder that it resumes holds; longer with ``extend``.

    Args:
        config: of the run.
        group: of the setting that says how long it is.
        key: its name in the group.

    Raises:
        InputError: ``extend`` without ``resume``, or fewer steps than there are.
        RunFolderError: there is no run to resume, or one of another command.
        RunChanged: the run was started with other settings, or its config.yaml was edited since.
    """
    total, steps = config.get("extend"), f"{group}.{key}"
    if config["resume"] is None:
        if total is not None:
            raise InputError(f"extend is for a run that is resumed: give resume=PATH too, or {steps}={total}")
        return dict(config)
    folder = RunFolder.reopen(Path(config["resume"]))
    stored = folder.config()
    require_kind(folder.path, stored, KINDS[group])
    require_kind(folder.path, config, KINDS[group])
    if total is not None:
        config = {**config, group: {**config[group], key: total}}
    if not config.get(ACCEPT, False):
        now = identity_of(config)
        refuse_changes(identity_of(stored), now, of=folder.path, steps=steps, extend=total is not None)
        for checkpoint in filter(None, map(latest_checkpoint, folder.all_checkpoints())):
            # of what else a checkpoint knows, the loop knows the present value
            kept = {k: v for k, v in read_identity(checkpoint).items() if k in now or _group(k) not in config}
            refuse_changes(kept, now, of=checkpoint, steps=steps, extend=total is not None)
    return dict(config)


def _group(key: str) -> str:
    return key.partition(".")[0]
