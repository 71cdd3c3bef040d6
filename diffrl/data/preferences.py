"""Recorded preferences: pairs of samples of which one was preferred, from a table of files or from arrays."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffrl.data.image_files import (
    MAX_GIB,
    DataError,
    check_labels,
    check_size,
    events_from,
    existing,
    images_from,
    read_arrays,
)
from diffrl.data.image_folders import read_image
from diffrl.text_files import read_text

__all__ = ["Pairs", "read_pairs"]

SIDES = ("preferred", "rejected")
KNOWN = (*SIDES, "labels", "prompts")
EXAMPLE = '{"preferred": "a.png", "rejected": "b.png"}'


@dataclass(frozen=True)
class Pairs:
    """N pairs of samples, of which the first was preferred.

    Args:
        where: the file, for errors.
        preferred: float32 [N, *E].
        rejected: of that shape.
        labels: class of each pair, int64 [N], or None.
        prompts: prompt of each pair, or None.
        rows: what a pair is called in errors, such as "line 3".
    """

    where: str
    preferred: Tensor
    rejected: Tensor
    labels: Tensor | None
    prompts: Sequence[str] | None
    rows: Sequence[str]

    def __len__(self) -> int:
        return len(self.preferred)

    @property
    def event_shape(self) -> tuple[int, ...]:
        """*E of a sample."""
        return tuple(self.preferred.shape[1:])


def read_pairs(path: str | Path, size: int | None = None, max_gib: float = MAX_GIB) -> Pairs:
    """Pairs of an npz file, or of a jsonl table next to its files.

    npz: arrays `preferred` and `rejected` [N, *E], uint8 images or floats as a model takes them, and optionally
    `labels`, whole numbers [N], or `prompts`, text [N]. jsonl: one object a line, with the paths of two files,
    "preferred" and "rejected", relative to the table, and optionally a "label" or a "prompt". Files are images, or npy
    arrays [*E] of one sample. 8-bit images become x/127.5 - 1; floats keep their values.

    Args:
        path: the file, whose name ends in .npz or .jsonl.
        size: crop image files at their centre and resize them to size × size; None: all must be of one size.
        max_gib: GiB of memory that the samples may take.

    Raises:
        DataError: any fault of a file, named in one sentence.
        FileError: the table cannot be read, or is no text.
        MissingExtra: pillow is not installed.
    """
    if size is not None and (type(size) is not int or size < 1):
        raise DataError(f"`size` is {size!r}; it must be at least 1, a whole number")
    path = existing(path)
    if path.suffix == ".npz":
        pairs = _from_arrays(path, max_gib)
    elif path.suffix == ".jsonl":
        pairs = _from_table(path, size, max_gib)
    else:
        raise DataError(f"{path}: pairs are read from .npz and .jsonl files; rename it, or convert it")
    for side in SIDES:
        bad = ~getattr(pairs, side).isfinite().flatten(1).all(1)
        if bool(bad.any()):
            row = pairs.rows[int(bad.nonzero()[0])]
            raise DataError(f"{path}, {row}: the {side} sample holds NaN or infinity; remove the pair")
    return pairs


def _from_arrays(path: Path, max_gib: float) -> Pairs:
    found = read_arrays(path, KNOWN, max_gib / 2)
    for side in SIDES:
        if side not in found:
            raise DataError(
                f"{path}: holds no array `{side}`; store `preferred` and `rejected`, [N, ...] each"
            )
    shapes = [found[side].shape for side in SIDES]
    if shapes[0] != shapes[1]:
        raise DataError(
            f"{path}: `preferred` has shape {shapes[0]} and `rejected` {shapes[1]}; row i of both must be one pair"
        )
    preferred, rejected = (_samples(found[side], f"{path}: {side}") for side in SIDES)
    N, labels, prompts = len(preferred), found.get("labels"), found.get("prompts")
    if labels is not None and prompts is not None:
        raise DataError(f"{path}: holds both `labels` and `prompts`; keep one of them")
    if prompts is not None and (prompts.dtype.kind != "U" or prompts.shape != (N,)):
        raise DataError(
            f"{path}: `prompts` are {prompts.dtype} of shape {prompts.shape}; store {N} strings, one a pair"
        )
    return Pairs(
        str(path),
        preferred,
        rejected,
        None if labels is None else _numbers(check_labels(labels, N, f"{path}: labels")),
        None if prompts is None else prompts.tolist(),
        [f"row {i}" for i in range(N)],
    )


def _samples(array: NDArray[Any], where: str) -> Tensor:
    """Samples as a model takes them: unlike those of a data set, float images may be latents, of any size."""
    if array.dtype == np.uint8:
        return events_from(array, where)
    if array.dtype.kind != "f" or array.ndim < 2 or array.size == 0:
        raise DataError(
            f"{where} is {array.dtype} of shape {array.shape}; store floats [N, ...], or images as uint8"
        )
    with np.errstate(over="ignore"):
        return torch.from_numpy(array.astype(np.float32, order="C"))


def _numbers(labels: NDArray[Any]) -> Tensor:
    return torch.from_numpy(labels.astype(np.int64))


def _from_table(path: Path, size: int | None, max_gib: float) -> Pairs:
    lines = [(i, line) for i, line in enumerate(read_text(path).splitlines(), 1) if line.strip()]
    if not lines:
        raise DataError(f"{path}: holds no pair; write one a line, such as {EXAMPLE}")
    table = [_entry(f"{path}, line {i}", line) for i, line in lines]
    rows = [f"line {i}" for i, _ in lines]
    for key in ("label", "prompt"):
        without = [key not in entry for entry in table]
        if any(without) and not all(without):
            row = rows[without.index(True)]
            raise DataError(
                f'{path}, {row}: has no "{key}", but others have; give one to all pairs, or to none'
            )
    labels = torch.tensor([entry["label"] for entry in table]) if "label" in table[0] else None
    prompts = [entry["prompt"] for entry in table] if "prompt" in table[0] else None
    if labels is not None and prompts is not None:
        raise DataError(f'{path}: has both "label" and "prompt"; keep one of them')
    preferred, rejected = _sides(path, table, rows, size, max_gib)
    return Pairs(str(path), preferred, rejected, labels, prompts, rows)


def _entry(where: str, line: str) -> dict[str, Any]:
    """One object of the table."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: is no JSON; write one object a line, such as {EXAMPLE}") from error
    if not isinstance(found, dict) or not all(isinstance(found.get(side), str) for side in SIDES):
        raise DataError(f'{where}: lacks the path "preferred" or "rejected"; write {EXAMPLE}')
    label, prompt = found.get("label", 0), found.get("prompt", "")
    if type(label) is not int or not 0 <= label < 2**63:
        raise DataError(f"{where}: label {label!r} is no whole number >= 0; number the classes from 0")
    if not isinstance(prompt, str):
        raise DataError(f"{where}: prompt {prompt!r} is no string; write it in quotes")
    return found


def _sides(
    path: Path, table: list[dict[str, Any]], rows: list[str], size: int | None, max_gib: float
) -> tuple[Tensor, Tensor]:
    """The samples of both sides, [N, *E] each."""
    read: list[NDArray[Any]] = []
    for entry, row in zip(table, rows, strict=True):
        for side in SIDES:
            where = f"{path}, {row}"
            try:
                read.append(_sample(path.parent / os.path.expanduser(entry[side]), size, max_gib))
            except DataError as error:
                raise DataError(f"{where}: {error}") from error
            new, old = read[-1], read[0]
            if (new.dtype == np.uint8) != (old.dtype == np.uint8) or not _fits(new, old):
                raise DataError(
                    f"{where}: {entry[side]} has shape {new.shape}, but {table[0][SIDES[0]]} has {old.shape}; all must "
                    "be images of one size, see `size`, or all arrays of one shape"
                )
            check_size(2 * len(table) * 4 * new.size, max_gib, str(path))
    if read[0].dtype == np.uint8:
        channels = max(len(x) for x in read)
        read = [np.broadcast_to(x, (channels, *x.shape[1:])) for x in read]
    return _stacked(read[0::2]), _stacked(read[1::2])


def _stacked(read: list[NDArray[Any]]) -> Tensor:
    array = np.stack(read)
    return images_from(array) if array.dtype == np.uint8 else torch.from_numpy(array)


def _fits(new: NDArray[Any], old: NDArray[Any]) -> bool:
    """Whether two samples have one shape; gray images go with coloured ones."""
    return new.shape[1:] == old.shape[1:] if new.dtype == np.uint8 else new.shape == old.shape


def _sample(path: Path, size: int | None, max_gib: float) -> NDArray[Any]:
    """One sample: uint8 [C, H, W] of an image, float32 [*E] of an npy file."""
    if path.suffix != ".npy":
        return read_image(path, size, max_gib)
    array = read_arrays(path, None, max_gib)[""]
    if array.dtype.kind != "f" or array.ndim == 0 or array.size == 0:
        raise DataError(f"{path}: is {array.dtype} of shape {array.shape}; store the floats of one sample")
    with np.errstate(over="ignore"):
        return array.astype(np.float32)
