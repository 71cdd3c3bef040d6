"""Prompts of a pipeline: from a list, a file, or a function of the user that is known by name; metadata for rewards."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from diffrl.errors import FileError, InputError
from diffrl.registry import Registry
from diffrl.text_files import read_text

__all__ = ["PROMPTS", "Prompts", "prompts_of"]

PROMPTS = Registry("prompts", "diffrl.finetuning.prompts")
"""Functions that give prompts: () → strings, or pairs of a string and a mapping of metadata."""


@dataclass(frozen=True)
class Prompts:
    """What conditions number.

    Args:
        texts: the strings.
        metadata: what a reward may want to know of each, such as what to count; None: nothing.
    """

    texts: list[str]
    metadata: list[Mapping[str, Any]] | None = None


def prompts_of(
    listed: Iterable[str | tuple[str, Mapping[str, Any]]], file: str | None, function: str | None
) -> Prompts:
    """Prompts from the one place that is given.

    Args:
        listed: strings, or pairs of a string and its metadata.
        file: a text file, one prompt a line; or .jsonl, one object a line with its "prompt", all of which is metadata.
        function: name in `PROMPTS`; it is asked once.

    Raises:
        ValueError: none or several are given, or there is no prompt.
    """
    listed = [listed] if isinstance(listed, str) else list(listed)
    if bool(listed) + (file is not None) + (function is not None) != 1:
        raise InputError("give model.prompts, model.prompts_file or model.prompts_from, one of them")
    if file is not None:
        return _of_file(file)
    if function is not None:
        return _of_entries(list(PROMPTS[function]()), f"model.prompts_from {function}")
    return _of_entries(listed, "model.prompts")


def _of_entries(entries: list[Any], source: str) -> Prompts:
    pairs = [(entry, {}) if isinstance(entry, str) else entry for entry in entries]
    sound = all(isinstance(p, tuple | list) and len(p) == 2 and isinstance(p[0], str) for p in pairs)
    if not pairs or not sound or not all(isinstance(about, Mapping) for _, about in pairs):
        raise InputError(f"{source} gives {entries!r:.80}: give strings, or pairs of a string and a mapping")
    metadata = [about for _, about in pairs]
    return Prompts([text for text, _ in pairs], metadata if any(metadata) else None)


def _of_file(file: str) -> Prompts:
    try:
        lines = [line.strip() for line in read_text(file).splitlines()]
    except FileError as error:
        raise InputError(f"model.prompts_file {error}") from error
    if not any(lines):
        raise InputError(f"model.prompts_file {file} holds no prompt: write one a line")
    if not file.endswith(".jsonl"):
        return Prompts([line for line in lines if line])
    return _of_entries([_of_line(file, i, line) for i, line in enumerate(lines, 1) if line], file)


def _of_line(file: str, number: int, line: str) -> tuple[str, Mapping[str, Any]]:
    try:
        found = json.loads(line)
        return found["prompt"], found
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(
            f'model.prompts_file {file}, line {number}, is no JSON object with a "prompt"'
        ) from error
