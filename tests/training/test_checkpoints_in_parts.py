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
from diffrl.training.packed import MARK, joined

W, MOMENT, BUFFER = torch.arange(15.0).view(5, 3), torch.arange(4.0), torch.tensor([7.0])


def part(*tensors: tuple[str, Tensor, list[int]]) -> bytes:
    """A file as torch.distributed.checkpoint writes it: tensors, and where they begin in the whole ones."""
    offsets = {name: {"saved_offsets": at} for name, _, at in tensors}
    return safetensors.torch.save(
        {name: x.contiguous() for name, x, _ in tensors}, {"DCP_SHARDING_INFO": json.dumps(offsets)}
    )


FIRST = part(("model.w", W[:3], [0, 0]), ("training.0", MOMENT[:1], [0]))
SECOND = part(("model.w", W[3:], [3, 0]), ("training.0", MOMENT[1:], [1]))


def save(folder: Path, *parts: bytes) -> Path:
    def write(place: Path) -> set[str]:
        for number, data in enumerate(parts, 1):
            (place / f"part_{number:05d}.safetensors").write_bytes(data)
        return {"model", "training"}

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
    for parts, text in (
        ((SECOND,), "parts of .* are missing"),
        ((FIRST, safetensors.torch.save({"model.v": W})), "does not say of which tensors its parts are"),
    ):
        with pytest.raises(ValueError, match=text):
            joined(parts)
        with pytest.raises(CheckpointError, match=f"its parts do not make whole tensors .*{text}"):
            load_checkpoint(save(tmp_path / str(len(parts)), *parts))
