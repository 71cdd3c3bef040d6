"""Checkpoints of a training: complete or absent, verified on loading, free of pickled code.

A checkpoint is a folder, and a training keeps its last few:

    step_000400/
    step_000500/
        model.safetensors     one file for each set of weights: model, ema, target, ...
        training.pt           optimiser, schedules, random generators: read with weights_only=True
        part_00001.safetensors   where processes cut tensors among them, the parts of one of them
        manifest.json         step, format, versions, what it belongs to, size and SHA-256 of every other file

It is written under a temporary name, forced to the disk, then renamed: a crash at any moment leaves what was there.
"""

import io
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from diffrl.errors import DiffrlError, InputError
from diffrl.text_files import sync_folder
from diffrl.training.identity import Facts, surroundings
from diffrl.training.packed import Shapes, entries, joined, pack_training, pack_weights, sets_of, with_parts
from diffrl.training.packed import entry as _entry

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "latest_checkpoint",
    "list_checkpoints",
    "load_checkpoint",
    "load_weights",
    "read_identity",
    "save_checkpoint",
    "step_of",
    "tidy",
    "weight_sets",
]

_FORMAT = 2  # 1: without parts
_NAME = re.compile(r"step_(\d{6,})(\.old)?")  # .old: moved aside while the same step was written again
_TRAINING = "training.pt"
_MANIFEST = "manifest.json"
_WEIGHTS = ".safetensors"
_PART = re.compile(r"part_\d{5}\.safetensors")


class CheckpointError(DiffrlError, RuntimeError):
    """A checkpoint could not be written, or is not what was written."""


@dataclass(frozen=True)
class Checkpoint:
    """What `save_checkpoint` was given; every tensor is on the CPU.

    Attributes:
        step: gradient steps taken.
        weights: name of a set → name of a tensor → tensor.
        training: everything else.
        versions: of Python and the libraries that wrote it, with its number of threads and kind of device.
        identity: what it belongs to, see `diffrl.training.identity`; empty in those of diffrl 0.2 and before.
    """

    step: int
    weights: dict[str, dict[str, Tensor]]
    training: dict[str, Any]
    versions: dict[str, Any]
    identity: dict[str, Any]


def save_checkpoint(
    folder: Path,
    step: int,
    *,
    weights: Mapping[str, Mapping[str, Tensor]],
    training: Mapping[str, Any],
    keep: int,
    identity: Facts | None = None,
    device: torch.device | str = "cpu",
    ranks: int = 1,
    parts: Callable[[Path], Shapes] | None = None,
) -> Path:
    """Writes `folder/step_<step>/`, then removes all but the newest `keep` checkpoints up to this step.

    One process writes to a folder at a time; what an interrupted write left there is swept.

    Args:
        folder: made where missing.
        step: gradient steps taken, 0 or more. An existing checkpoint of this step is replaced.
        weights: state_dicts by name, such as `{"model": ..., "ema": ...}`; a name is an identifier.
        training: any nesting of dicts, lists and tuples over tensors, numbers, strings, booleans and None.
        keep: how many checkpoints to keep, at least 1.
        identity: what it belongs to, see `diffrl.training.identity`.
        device: where it was computed.
        ranks: by how many processes.
        parts: has all of them write their parts of further tensors as `part_00001.safetensors`, ... to the folder that
            it is given; tells the shapes of the whole tensors.

    Returns:
        The checkpoint's path.

    Raises:
        ValueError: step, keep or a name out of range.
        TypeError: `training` holds an object that could not be loaded again.
        CheckpointError: the disk refused; earlier checkpoints are as they were.
    """
    if step < 0 or keep < 1:
        raise InputError(f"step must be 0 or more and keep at least 1, not step={step} and keep={keep}")
    for name in weights:
        if not name.isidentifier():
            raise InputError(f"a set of weights is stored in a file of its name, which {name!r} cannot be")
    path = Path(folder) / f"step_{step:06d}"
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _sweep(path.parent)
        temporary.mkdir()
        files = {_TRAINING: _write(temporary / _TRAINING, pack_training(training))}
        for file, tensors in ((name + _WEIGHTS, tensors) for name, tensors in weights.items()):
            files[file] = _write(temporary / file, pack_weights(tensors))
        shapes = {} if parts is None else {name: [*shape] for name, shape in parts(temporary).items()}
        files |= entries(temporary, shapes)
        manifest = {
            **({"format": _FORMAT, "parts": sets_of(shapes), "shapes": shapes} if shapes else {"format": 1}),
            "step": step,
            "versions": surroundings(device, ranks),
            "identity": dict(identity or {}),
            "files": files,
        }
        _write(temporary / _MANIFEST, json.dumps(manifest, indent=2).encode())
        sync_folder(temporary)
        if path.exists():
            path.rename(path.with_name(path.name + ".old"))
        temporary.rename(path)
        sync_folder(path.parent)
        tidy(path.parent, keep, step)
    except OSError as error:
        raise CheckpointError(
            f"checkpoint {path} could not be written ({error}): make room or choose another folder; "
            "earlier checkpoints are as they were"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return path


def tidy(folder: Path, keep: int, step: int | None = None) -> None:
    """Removes what interrupted writes left, and all but the newest `keep` checkpoints up to `step`.

    Args:
        folder: need not exist.
        keep: how many to keep.
        step: later checkpoints stay; None: there are none.
    """
    _sweep(Path(folder))
    known = [path for path in list_checkpoints(folder) if step is None or step_of(path) <= step]
    for old in known[:-keep]:
        _discard(old)


def list_checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints of a folder, oldest step first; none where the folder does not exist."""
    if not Path(folder).is_dir():
        return []
    # of a step written twice, the second comes after the one moved aside
    found = [path for path in Path(folder).iterdir() if _NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=lambda path: (step_of(path), not path.name.endswith(".old")))


def latest_checkpoint(folder: Path) -> Path | None:
    """The checkpoint with the highest step, or None; its contents are verified by `load_checkpoint` only."""
    return next(reversed(list_checkpoints(folder)), None)


def load_checkpoint(path: Path) -> Checkpoint:
    """Reads a checkpoint after comparing every file with the manifest.

    A damaged checkpoint is never passed over in silence: the error says which older one is sound.

    Raises:
        CheckpointError: naming file and remedy: it is missing, truncated or altered, or of a newer diffrl.
    """
    path = Path(path)
    if not path.is_dir():
        latest = latest_checkpoint(path.parent)
        raise CheckpointError(
            f"there is no checkpoint {path}" + (f"; the latest is {latest.name}" if latest else "")
        )
    try:
        return _read(path)
    except _Damage as damage:
        raise CheckpointError(f"checkpoint {path}: {damage}; {_remedy(path)}") from damage


def load_weights(path: Path, name: str) -> dict[str, Tensor]:
    """One set of weights of a checkpoint, compared with the manifest; no other file is read.

    Raises:
        CheckpointError: as `load_checkpoint`, or it has no set of that name.
    """
    path = Path(path)
    try:
        manifest, file = _read_manifest(path), name + _WEIGHTS
        if name not in _sets(manifest):
            raise _Damage(f"{_MANIFEST} lists no {file}")
        files, cut = manifest["files"], name in manifest["parts"]
        named = [k for k in files if k == file or (cut and _PART.fullmatch(k))]
        contents = {k: _read_file(path / k, files[k]) for k in named}
        return _weights_of(contents, manifest["shapes"] if cut else {})[0][name]
    except _Damage as damage:
        raise CheckpointError(f"checkpoint {path}: {damage}; {_remedy(path)}") from damage


def weight_sets(path: Path) -> list[str]:
    """Names of the sets of weights of a checkpoint; a `CheckpointError` if its manifest is damaged."""
    return _sets(_sound_manifest(path))


def _sets(manifest: dict[str, Any]) -> list[str]:
    files = (name for name in manifest["files"] if name.endswith(_WEIGHTS) and not _PART.fullmatch(name))
    whole = [name.removesuffix(_WEIGHTS) for name in files]
    return [*whole, *(name for name in manifest["parts"] if name not in (*whole, "training"))]


def read_identity(path: Path) -> dict[str, Any]:
    """What a checkpoint belongs to; empty where it is not known.

    Raises:
        CheckpointError: its manifest is damaged.
    """
    identity: dict[str, Any] = _sound_manifest(path)["identity"]
    return identity


def _sound_manifest(path: Path) -> dict[str, Any]:
    try:
        return _read_manifest(Path(path))
    except _Damage as damage:
        raise CheckpointError(f"checkpoint {path}: {damage}; {_remedy(Path(path))}") from damage


class _Damage(Exception):
    """What is wrong with a checkpoint that cannot be used any more."""


def _read(path: Path) -> Checkpoint:
    manifest = _read_manifest(path)
    contents = {name: _read_file(path / name, entry) for name, entry in manifest["files"].items()}
    weights, cut = _weights_of(contents, manifest["shapes"])
    try:
        training = torch.load(io.BytesIO(contents[_TRAINING]), map_location="cpu", weights_only=True)
    except Exception as error:  # torch has a dozen types for a file that it cannot or will not read
        # what torch says would have the reader switch the protection off
        raise _Damage(
            f"{_TRAINING} cannot be read: it is cut short, or holds other things than numbers, texts and tensors"
        ) from error
    if not isinstance(training, dict):
        raise _Damage(f"{_TRAINING} holds a {type(training).__name__} and no dict")
    try:
        training = with_parts(training, cut)
    except KeyError as error:
        raise _Damage(f"{_TRAINING} lacks the parts of a tensor, {error}") from error
    return Checkpoint(manifest["step"], weights, training, manifest["versions"], manifest["identity"])


def _weights_of(
    contents: Mapping[str, bytes], shapes: Shapes
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """Sets of weights out of the bytes of files, and tensors of the training state that are in parts."""
    parts = [data for name, data in contents.items() if _PART.fullmatch(name)]
    weights = {
        name.removesuffix(_WEIGHTS): _unpack_weights(name, data)
        for name, data in contents.items()
        if name.endswith(_WEIGHTS) and not _PART.fullmatch(name)
    }
    try:
        found = joined(parts, shapes)
    except (ValueError, safetensors.SafetensorError) as error:
        raise _Damage(f"its parts do not make whole tensors ({error})") from error
    for name, tensors in found.items():
        weights[name] = {**weights.get(name, {}), **tensors}
    return weights, weights.pop("training", {})


def _unpack_weights(name: str, data: bytes) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load(data)
    except safetensors.SafetensorError as error:
        raise _Damage(f"{name} is not a safetensors file ({error})") from error


def _read_manifest(path: Path) -> dict[str, Any]:
    """The manifest, with every key that is read later and no file name that leads out of the folder."""
    try:
        manifest = json.loads(_read_file(path / _MANIFEST, None))
    except ValueError as error:
        raise _Damage(f"{_MANIFEST} is not JSON ({error})") from error
    written_as = manifest.get("format") if isinstance(manifest, dict) else None
    if isinstance(written_as, int) and written_as > _FORMAT:
        raise CheckpointError(
            f"checkpoint {path} has format {written_as} and diffrl {version('diffrl')} reads up to {_FORMAT}: "
            "upgrade diffrl"
        )
    try:
        sound = (
            written_as in (1, _FORMAT)
            and isinstance(manifest["step"], int)
            and isinstance(manifest["versions"], dict)
            and isinstance(manifest.setdefault("identity", {}), dict)
            and all(isinstance(name, str) for name in manifest.setdefault("parts", []))
            and all(isinstance(n, int) for shape in manifest.setdefault("shapes", {}).values() for n in shape)
            and _TRAINING in manifest["files"]
            and all({"bytes", "sha256"} == entry.keys() for entry in manifest["files"].values())
            and all(
                name == _TRAINING or (name.endswith(_WEIGHTS) and name.removesuffix(_WEIGHTS).isidentifier())
                for name in manifest["files"]
            )
        )
    except (TypeError, KeyError, AttributeError):
        sound = False
    if not sound:
        raise _Damage(f"{_MANIFEST} is not a checkpoint's manifest")
    if step_of(path) not in (-1, manifest["step"]):
        raise _Damage(f"{_MANIFEST} is of step {manifest['step']}")
    return manifest


def _read_file(path: Path, entry: dict[str, Any] | None) -> bytes:
    """The bytes of a file, equal to its manifest entry (None: the manifest itself, which has none)."""
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise _Damage(f"{path.name} is missing") from error
    except OSError as error:
        raise CheckpointError(
            f"checkpoint file {path} cannot be read ({error}): see to the disk, and retry"
        ) from error
    if entry is None or entry == _entry(data):
        return data
    if len(data) != entry["bytes"]:
        raise _Damage(f"{path.name} has {len(data)} bytes instead of {entry['bytes']}")
    raise _Damage(f"{path.name} has been altered: its SHA-256 is not the manifest's")


def _remedy(path: Path) -> str:
    """What to do about a damaged checkpoint; older ones are read to see which is sound."""
    older = [known for known in list_checkpoints(path.parent) if step_of(known) < step_of(path)]
    damaged = [path.name]
    for known in reversed(older):
        try:
            _read(known)
        except (_Damage, CheckpointError):
            damaged.append(known.name)
        else:
            return f"delete {' and '.join(damaged)} to resume from {known.name}"
    return "there is no older sound one: delete it to start again"


def step_of(path: Path) -> int:
    """The step in a checkpoint's name; -1 for a folder of another name."""
    match = _NAME.fullmatch(path.name)
    return int(match[1]) if match else -1


def _write(path: Path, data: bytes) -> dict[str, Any]:
    """Writes a file down to the disk; its manifest entry."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return _entry(data)


def _discard(path: Path) -> None:
    """Removes a checkpoint, leaving no half of one under its name; a later sweep takes what cannot go now."""
    doomed = path.with_name(f"{path.name}.tmp-discarded")
    path.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def _sweep(folder: Path) -> None:
    """Removes what interrupted writes left, and checkpoints moved aside for one now in their place."""
    for path in folder.glob("step_*.tmp-*"):
        shutil.rmtree(path, ignore_errors=True)
    for path in folder.glob("step_*.old"):
        if path.with_suffix("").exists():
            _discard(path)
