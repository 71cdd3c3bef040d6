"""Checkpoints of which several processes write parts: whole when they are read, by name where a part is lost."""

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor

from diffrl.training.checkpoints import (
    CheckpointError,
    load_checkpoint,
    load_weights,
    save_checkpoint,
    weight_sets,
)
from diffrl.training.packed import MARK, entry, joined

W, MOMENT, BUFFER = torch.arange(15.0).view(5, 3), torch.arange(4.0), torch.tensor([7.0])


def part(*tensors: tuple[str, Tensor, list[int]]) -> bytes:
    """A file as torch.distributed.checkpoint writes it: tensors, and where they begin in the whole ones."""
    offsets = {name: {"saved_offsets": at} for name, _, at in tensors}
    return safetensors.torch.save(
        {name: x.contiguous() for name, x, _ in tensors}, {"DCP_SHARDING_INFO": json.dumps(offsets)}
    )


FIRST = part(("model.w", W[:3], [0, 0]), ("training.0", MOMENT[:1], [0]))
SHAPES = {"model.w": [5, 3], "training.0": [4]}
HALF = part(("training.0", MOMENT[2:], [2]))
SECOND = part(("model.w", W[3:], [3, 0]), ("training.0", MOMENT[1:], [1]))


def save(folder: Path, *parts: bytes) -> Path:
    def write(place: Path) -> dict[str, list[int]]:
        for number, data in enumerate(parts, 1):
            (place / f"part_{number:05d}.safetensors").write_bytes(data)
        return SHAPES

    weights = {"model": {"buffer": BUFFER}, "other": {"w": W}}
    training = {"moments": {0: f"{MARK}0"}, "steps": 3}
    return save_checkpoint(folder, 3, weights=weights, training=training, keep=2, parts=write)


def test_parts_are_whole_when_they_are_read(tmp_path: Path) -> None:
    path = save(tmp_path, SECOND, FIRST)  # in any order
    found = load_checkpoint(path)
    assert sorted(weight_sets(path)) == sorted(found.weights) == ["model", "other"]
    for weights in (found.weights["model"], load_weights(path, "model")):
        assert torch.equal(weights["w"], W) and torch.equal(weights["buffer"], BUFFER)
    assert torch.equal(load_weights(path, "other")["w"], W)
    assert torch.equal(found.training["moments"][0], MOMENT) and found.training["steps"] == 3


def test_a_part_that_is_lost_altered_or_not_told_of_is_named(tmp_path: Path) -> None:
    path = save(tmp_path, FIRST, SECOND)
    (path / "part_00002.safetensors").write_bytes(FIRST)
    with pytest.raises(CheckpointError, match=r"part_00002\.safetensors has .* instead of|has been altered"):
        load_checkpoint(path)
    (path / "part_00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"part_00002\.safetensors is missing"):
        load_weights(path, "model")
    assert load_weights(path, "other").keys() == {"w"}
    no_offsets = safetensors.torch.save({"model.w": W[3:], "training.0": MOMENT[1:]})
    for fault, parts, text in (
        ("one is lost", (SECOND,), "parts of .* are missing"),
        ("the last one is lost", (FIRST,), "parts of .* are missing"),
        ("one comes twice", (SECOND, SECOND, FIRST), "parts of .* are missing"),
        ("half comes twice", (HALF, HALF, part(("model.w", W, [0, 0]))), r"parts of training\.0 are missing"),
        ("a tensor is lost", (part(("model.w", W, [0, 0])),), r"parts of training\.0 are missing"),
        ("it tells nothing", (FIRST, no_offsets), "does not say of which tensors its parts are"),
    ):
        with pytest.raises(ValueError, match=text):
            joined(parts, SHAPES)
        place = save(tmp_path / fault.replace(" ", "_"), FIRST, SECOND)
        for old in place.glob("part_*"):
            old.unlink()
        for number, data in enumerate(parts, 1):
            (place / f"part_{number:05d}.safetensors").write_bytes(data)
        enter_parts(place)
        with pytest.raises(CheckpointError, match=f"its parts do not make whole tensors .*{text}"):
            load_checkpoint(place)


def enter_parts(place: Path) -> None:
    """Let the manifest name the files with parts that are there."""
    file = place / "manifest.json"
    manifest = json.loads(file.read_text(encoding="utf-8"))
    files = {name: told for name, told in manifest["files"].items() if not name.startswith("part_")}
    files |= {path.name: entry(path.read_bytes()) for path in place.glob("part_*")}
    file.write_text(json.dumps({**manifest, "files": files}), encoding="utf-8")


def test_a_checkpoint_whose_parts_are_not_all_there_is_not_written(tmp_path: Path) -> None:
    """As where another machine has a folder of its own under the same name."""
    with pytest.raises(
        CheckpointError,
        match=r"step_000003 could not be written \(a process has written its part of model.w elsewhere: all have to",
    ):
        save(tmp_path, FIRST)
    assert [*tmp_path.iterdir()] == []


def test_a_checkpoint_that_does_not_tell_shapes_is_read(tmp_path: Path) -> None:
    """As those of before."""
    path = save(tmp_path, FIRST, SECOND)
    file = path / "manifest.json"
    manifest = json.loads(file.read_text(encoding="utf-8"))
    assert manifest.pop("shapes") == SHAPES
    file.write_text(json.dumps(manifest), encoding="utf-8")
    assert torch.equal(load_checkpoint(path).weights["model"]["w"], W)
