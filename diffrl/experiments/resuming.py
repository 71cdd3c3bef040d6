"""Going on with a run: it goes on as it was started, and what may differ is said by a word of its own."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffrl.errors import InputError
from diffrl.training.checkpoints import latest_checkpoint, read_identity
from diffrl.training.identity import ACCEPT, KINDS, identity_of, refuse_changes, require_kind
from diffrl.training.runs import RunFolder

__all__ = ["continued", "resumed"]

WORDS = ("device", "extend", ACCEPT, "rank_timeout", "first_timeout")
"""Settings that can be given with ``resume``."""

NO_GROUPS = ("twins",)
"""Beginnings of facts, such as ``twins.fake``, that the model brings along and no group of a configuration has."""


def resumed(chosen: Mapping[str, Any], words: Sequence[str]) -> dict[str, Any]:
    """The configuration that the run in ``chosen["resume"]`` was started with, and the words of now.

    Args:
        chosen: what a command composed.
        words: what was given to it, each as ``key=value``.

    Raises:
        InputError: something is given that a run cannot be resumed with.
        RunFolderError: there is no run, or one of another command.
    """
    given = {word.partition("=")[0]: word for word in words}
    if others := [word for key, word in given.items() if key not in (*WORDS, "resume")]:
        raise InputError(
            f"{', '.join(others)}: a run is resumed as it was started; only {', '.join(WORDS)} can be given with resume"
        )
    folder = RunFolder.reopen(Path(chosen["resume"]))
    stored = folder.config()
    require_kind(folder.path, stored, next(kind for group, kind in KINDS.items() if group in chosen))
    # what the file lacks, as an option that came later, has its default: a checkpoint knows whether that was so
    return {**chosen, **stored, **{key: chosen[key] for key in ("resume", *given)}}


def continued(config: Mapping[str, Any], group: str, key: str) -> dict[str, Any]:
    """The configuration of a run, compared with what the folder that it resumes holds; longer with ``extend``.

    Args:
        config: of the run.
        group: of the setting that says how long it is.
        key: its name in the group.

    Raises:
        InputError: ``extend`` or ``accept_changes`` without ``resume``.
        RunFolderError: there is no run to resume, or one of another command.
        RunChanged: the run was started with other settings, or its config.yaml was edited since.
    """
    total, steps = config.get("extend"), f"{group}.{key}"
    if config["resume"] is None:
        if total is not None or config.get(ACCEPT, False):
            raise InputError(f"extend and {ACCEPT} are for a run that goes on: give resume=PATH too")
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
            kept = {k: v for k, v in read_identity(checkpoint).items() if k in now or _lost(k, config)}
            refuse_changes(kept, now, of=checkpoint, steps=steps, extend=total is not None)
    return dict(config)


def _lost(key: str, config: Mapping[str, Any]) -> bool:
    """Whether the group of a setting is not in the configuration any more."""
    group, dot, _ = key.partition(".")
    return bool(dot) and group not in (*config, *NO_GROUPS)
