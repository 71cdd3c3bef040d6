"""Checkpoints that are damaged, mixed up or not ours are named, with what to do."""

import io
import json
import os
import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from diffrl.training import checkpoints
from diffrl.training.checkpoints import CheckpointError, latest_checkpoint, load_checkpoint, save_checkpoint
from tests.kit.checkpoints import FILES, names, save

# Damage


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def garble(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(bytes(data))


def overwrite(path: Path) -> None:
    path.write_bytes(random.Random(0).randbytes(path.stat().st_size))


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [truncate, garble, overwrite, empty, Path.unlink])
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_named_with_the_remedy(
    tmp_path: Path, name: str, damage: Callable[[Path], Any]
) -> None:
    save(tmp_path, 400), save(tmp_path, 500)
    damage(tmp_path / "step_000500" / name)
    with pytest.raises(
        CheckpointError, match=rf"step_000500: {name} .*; delete step_000500 to resume from step_000400$"
    ) as caught:
        load_checkpoint(latest_checkpoint(tmp_path))
    assert "\n" not in str(caught.value)
    assert load_checkpoint(tmp_path / "step_000400").training["lr"] == 40.0


def test_the_remedy_names_a_sound_checkpoint_only(tmp_path: Path) -> None:
    for step in (300, 400, 500):
        save(tmp_path, step)
    truncate(tmp_path / "step_000500" / "training.pt")
    truncate(tmp_path / "step_000400" / "model.safetensors")
    with pytest.raises(
        CheckpointError, match="delete step_000500 and step_000400 to resume from step_000300$"
    ):
        load_checkpoint(tmp_path / "step_000500")
    truncate(tmp_path / "step_000300" / "manifest.json")
    with pytest.raises(CheckpointError, match="no older sound one: delete it to start again$"):
        load_checkpoint(tmp_path / "step_000500")


def rewrite(path: Path, **changes: Any) -> None:
    """The manifest with other values, and sums that fit the files."""
    manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8")) | changes
    for name in manifest["files"]:
        if (path / name).is_file():
            manifest["files"][name] = checkpoints._entry((path / name).read_bytes())
    (path / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")


def test_files_of_another_checkpoint(tmp_path: Path) -> None:
    one, two = save(tmp_path, 1), save(tmp_path, 2)
    (two / "model.safetensors").write_bytes((one / "model.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match="model.safetensors has been altered"):
        load_checkpoint(two)
    rewrite(two, step=1)
    with pytest.raises(CheckpointError, match="manifest.json is of step 1"):
        load_checkpoint(two)
    renamed = two.rename(tmp_path / "best")  # under a name of the user's own any step is right
    assert load_checkpoint(renamed).step == 1


def test_a_newer_format_is_not_for_deletion(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    rewrite(path, format=3)
    with pytest.raises(CheckpointError, match="format 3 and diffrl .* reads up to 2: upgrade diffrl$"):
        load_checkpoint(path)


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "null",
        "{}",
        '{"format": 1, "step": 1, "versions": {}, "files": {}}',
        '{"format": 1, "step": 1, "versions": {}, "files": {"training.pt": 3}}',
        '{"format": 1, "step": "1", "versions": {}, "files": {"training.pt": {"bytes": 1, "sha256": ""}}}',
    ],
)
def test_a_manifest_of_something_else(tmp_path: Path, text: str) -> None:
    path = save(tmp_path, 1)
    (path / "manifest.json").write_text(text, encoding="utf-8")
    with pytest.raises(CheckpointError, match="manifest.json is not a checkpoint's manifest"):
        load_checkpoint(path)


class Stranger:
    def __reduce__(self) -> tuple[Callable[[str], Any], tuple[str]]:
        return os.mkdir, (os.environ["STRANGER"],)


def test_pickled_code_of_strangers_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trap = tmp_path / "trap"
    monkeypatch.setenv("STRANGER", str(trap))
    path = save(tmp_path, 1)
    buffer = io.BytesIO()
    torch.save({"evil": Stranger()}, buffer)
    (path / "training.pt").write_bytes(buffer.getvalue())
    rewrite(path)
    with pytest.raises(CheckpointError, match="training.pt cannot be read") as first:
        load_checkpoint(path)
    (path / "training.pt").write_bytes(pickle.dumps(Stranger()))
    rewrite(path)
    with pytest.raises(CheckpointError, match="training.pt cannot be read") as second:
        load_checkpoint(path)
    for refused in (first, second):  # torch's own words would have the protection switched off
        assert "weights_only" not in str(refused.value) and "torch.load" not in str(refused.value)
    assert not trap.exists()


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/hostname", "..", "a.pt"])
def test_a_manifest_leads_nowhere_else(tmp_path: Path, name: str) -> None:
    path = save(tmp_path, 1)
    manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
    rewrite(path, files=manifest["files"] | {name: manifest["files"]["training.pt"]})
    with pytest.raises(CheckpointError, match="manifest.json is not"):
        load_checkpoint(path)


# What is refused before anything is written


@pytest.mark.parametrize("value", [np.arange(3), np.float64(1.0), nn.Linear(1, 1), lambda: 0, iter("ab")])
def test_what_loading_would_refuse_is_not_saved(tmp_path: Path, value: object) -> None:
    save(tmp_path, 1)
    with pytest.raises(TypeError, match=r"the training state .*torch\.from_numpy"):
        save_checkpoint(tmp_path, 2, weights={}, training={"inner": [value]}, keep=1)
    assert names(tmp_path) == ["step_000001"]


def test_unreadable_file_is_not_for_deletion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path, 1)

    def refuse(self: Path) -> bytes:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(CheckpointError, match=r"manifest\.json cannot be read .*Permission denied") as caught:
        load_checkpoint(path)
    assert "delete" not in str(caught.value)
