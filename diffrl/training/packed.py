"""Weights and training state as the bytes of files: whole, or as parts of tensors that several processes wrote."""

import hashlib
import io
import json
import math
import pickle
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from diffrl.errors import InputTypeError

__all__ = [
    *("MARK", "Shapes", "entries", "entry", "joined", "pack_training", "pack_weights", "sets_of"),
    "with_parts",
]

Shapes = Mapping[str, Sequence[int]]
"""Of whole tensors that are in parts, by name, which begins with that of a set and a dot."""

MARK = "a tensor in parts: "
"""Before the name of a tensor that stands among the parts, in its place in the training state."""
OFFSETS = "DCP_SHARDING_INFO"
"""Where torch.distributed.checkpoint tells, in a safetensors file, which parts of tensors it holds."""
_STORABLE = (
    "give dicts, lists and tuples of tensors, numbers and strings (of a NumPy array, torch.from_numpy)"
)


def pack_weights(tensors: Mapping[str, Tensor]) -> bytes:
    """A safetensors file, with a copy of each tensor: such as share memory, as tied weights do, are refused."""
    options: dict[str, Any] = {"copy": True, "memory_format": torch.contiguous_format}
    return safetensors.torch.save({name: x.detach().to("cpu", **options) for name, x in tensors.items()})


def pack_training(training: Mapping[str, Any]) -> bytes:
    """A file that is read with ``weights_only=True``.

    Raises:
        TypeError: something in it would not be read.
    """
    buffer = io.BytesIO()
    try:
        torch.save(dict(training), buffer)
        refused = torch.serialization.get_unsafe_globals_in_checkpoint(io.BytesIO(buffer.getbuffer()))
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise InputTypeError(f"the training state cannot be stored ({error}): {_STORABLE}") from error
    if refused:
        raise InputTypeError(
            f"the training state holds {', '.join(refused)}, which loading refuses: {_STORABLE}"
        )
    return buffer.getvalue()


def entry(data: bytes) -> dict[str, Any]:
    """What a manifest says of a file."""
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def sets_of(shapes: Shapes) -> list[str]:
    """The sets that the tensors belong to."""
    return sorted({name.partition(".")[0] for name in shapes})


def entries(folder: Path, shapes: Shapes) -> dict[str, dict[str, Any]]:
    """What a manifest says of the files with parts in a folder.

    Raises:
        OSError: they do not hold all of the tensors of these shapes.
    """
    told, found = {}, dict.fromkeys(shapes, 0)
    for path in sorted(folder.glob("part_[0-9]*.safetensors")):
        data = path.read_bytes()
        told[path.name], header = entry(data), _header(data)
        for name in found.keys() & header.keys():
            found[name] += math.prod(header[name]["shape"])
    if lost := [name for name, shape in shapes.items() if found[name] != math.prod(shape)]:
        raise OSError(f"a process has written its part of {lost[0]} elsewhere: all have to see the folder")
    return told


def joined(files: Iterable[bytes], shapes: Shapes) -> dict[str, dict[str, Tensor]]:
    """Whole tensors out of safetensors files with their parts, as torch.distributed.checkpoint writes them.

    Args:
        files: their bytes.
        shapes: of the tensors, as far as they are known.

    Returns:
        Set → name → tensor.

    Raises:
        ValueError: parts are missing, or a file does not say of which tensors its parts are.
    """
    parts: dict[str, list[tuple[list[int], Tensor]]] = {}
    for data in files:
        header = _header(data)
        try:
            offsets = json.loads(header["__metadata__"][OFFSETS])
            for name, part in safetensors.torch.load(data).items():
                parts.setdefault(name, []).append((offsets[name]["saved_offsets"], part))
        except (KeyError, TypeError) as error:
            raise ValueError("it does not say of which tensors its parts are") from error
    if lost := shapes.keys() - parts.keys():
        raise ValueError(f"parts of {min(lost)} are missing")
    sets: dict[str, dict[str, Tensor]] = {}
    for name, found in parts.items():
        of, _, own = name.partition(".")
        sets.setdefault(of, {})[own] = _put_together(name, found, shapes.get(name))
    return sets


def _header(data: bytes) -> dict[str, Any]:
    """What a safetensors file says of its tensors."""
    found: dict[str, Any] = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return found


def _put_together(
    name: str, parts: list[tuple[list[int], Tensor]], whole_shape: Sequence[int] | None
) -> Tensor:
    shape = [
        max(sizes) for sizes in zip(*(map(sum, zip(o, x.shape, strict=True)) for o, x in parts), strict=True)
    ]
    distinct = {tuple(o) for o, x in parts if x.numel() > 0}
    once = len(distinct) == sum(x.numel() > 0 for _, x in parts)
    complete = once and sum(x.numel() for _, x in parts) == math.prod(shape)
    if not complete or shape != [*(whole_shape or shape)]:
        raise ValueError(f"parts of {name} are missing")
    whole = parts[0][1].new_empty(shape)
    for offsets, x in parts:
        whole[tuple(slice(a, a + n) for a, n in zip(offsets, x.shape, strict=True))] = x
    return whole


def with_parts(training: dict[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The training state with these tensors in the places that are marked."""
    found: dict[str, Any] = tree_map(
        lambda x: tensors[x.removeprefix(MARK)] if isinstance(x, str) and x.startswith(MARK) else x, training
    )
    return found
