"""Checkpoints: their layout, every bit back, resuming, how many are kept, what is refused."""

import hashlib
import json
import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

import diffrl
from diffrl.diffusion.networks.mlp import MLP
from diffrl.training.checkpoints import (
    CheckpointError,
    latest_checkpoint,
    list_checkpoints,
    load_checkpoint,
    save_checkpoint,
)
from diffrl.training.ema import EMA
from tests.kit.checkpoints import FILES, names, save

# What is saved is what is loaded


def test_layout(tmp_path: Path) -> None:
    path = save(tmp_path / "new" / "checkpoints", 500)
    assert path == tmp_path / "new" / "checkpoints" / "step_000500"
    assert names(path) == sorted(FILES)
    manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["step"] == 500 and manifest["format"] == 1
    assert manifest["versions"]["torch"] == str(torch.__version__)
    assert manifest["versions"]["diffrl"] == diffrl.__version__
    assert sorted([*manifest["files"], "manifest.json"]) == sorted(FILES)
    for name, entry in manifest["files"].items():
        with (path / name).open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        assert entry == {"bytes": (path / name).stat().st_size, "sha256": digest}
    # the weights are for anybody, without this library
    assert torch.equal(safetensors.torch.load_file(path / "ema.safetensors")["w"], torch.full((100,), -500.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.bool])
def test_every_dtype_and_shape_is_bit_exact(tmp_path: Path, dtype: torch.dtype) -> None:
    bits = torch.randint(0, 256, (2, 3, 4, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    x = bits > 127 if dtype == torch.bool else bits.view(dtype)  # any bits, NaN among them
    tied = torch.arange(6.0)
    tensors = {
        "x": x,
        "scalar": x.flatten()[0],
        "empty": x[:0],
        "strided": x.transpose(0, 1),
        "channels_last": x.contiguous(memory_format=torch.channels_last),
        "tied": tied,
        "tied_too": tied,
        "view": tied[2:4],
        "parameter": nn.Parameter(tied * 2),
    }
    path = save_checkpoint(tmp_path, 0, weights={"model": tensors}, training={"tensors": tensors}, keep=1)
    loaded = load_checkpoint(path)
    assert loaded.step == 0
    for found in (loaded.weights["model"], loaded.training["tensors"]):
        assert found.keys() == tensors.keys()
        for name, y in found.items():
            assert y.dtype == tensors[name].dtype and y.shape == tensors[name].shape, name
            assert torch.equal(as_bits(y), as_bits(tensors[name])), name
    for y in loaded.weights["model"].values():
        y.zero_()  # nothing read-only


def as_bits(x: torch.Tensor) -> torch.Tensor:
    return x.detach().flatten().contiguous().view(torch.uint8)


def train(state: dict[str, Any], steps: int) -> list[float]:
    """A training whose every source of chance is used, for `steps` steps."""
    losses = []
    for _ in range(steps):
        x = torch.randn(16, 2) + random.random() + state["numpy"].random()
        noise = torch.randn(16, 2, generator=state["generator"])
        loss = (state["model"](x + noise, torch.zeros(16)) - x).square().mean()
        loss.backward()
        state["optimiser"].step(), state["optimiser"].zero_grad(), state["schedule"].step()
        state["ema"].update(16)
        losses.append(loss.item())
    return losses


def fresh(seed: int) -> dict[str, Any]:
    torch.manual_seed(seed), random.seed(seed)
    model = MLP((2,), hidden=16)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
    return {
        "model": model,
        "ema": EMA(model, 100),
        "optimiser": optimiser,
        "schedule": torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, 20),
        "generator": torch.Generator().manual_seed(seed),
        "numpy": np.random.default_rng(seed),
    }


def test_a_resumed_training_is_bit_exact(tmp_path: Path) -> None:
    through = fresh(0)
    expected = train(through, 5) + train(through, 5)

    first = fresh(0)
    losses = train(first, 5)
    save_checkpoint(
        tmp_path,
        5,
        weights={"model": first["model"].state_dict(), "ema": first["ema"].module.state_dict()},
        training={
            "optimiser": first["optimiser"].state_dict(),
            "schedule": first["schedule"].state_dict(),
            "ema_samples": first["ema"].samples,
            "torch": torch.get_rng_state(),
            "python": random.getstate(),
            "generator": first["generator"].get_state(),
            "numpy": first["numpy"].bit_generator.state,
        },
        keep=1,
    )
    second = fresh(99)
    loaded = load_checkpoint(latest_checkpoint(tmp_path))
    second["model"].load_state_dict(loaded.weights["model"])
    second["ema"].load_state_dict(
        {"samples": loaded.training["ema_samples"], "module": loaded.weights["ema"]}
    )
    second["optimiser"].load_state_dict(loaded.training["optimiser"])
    second["schedule"].load_state_dict(loaded.training["schedule"])
    second["generator"].set_state(loaded.training["generator"])
    second["numpy"].bit_generator.state = loaded.training["numpy"]
    random.setstate(loaded.training["python"])
    torch.set_rng_state(loaded.training["torch"])
    assert losses + train(second, 5) == expected
    for name in ("model", "ema"):
        ours, theirs = (
            getattr(state[name], "module", state[name]).state_dict() for state in (second, through)
        )
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


# Which are kept


def test_keep_last(tmp_path: Path) -> None:
    for step in (1, 2, 3, 10, 9_000_000, 20_000_000):
        save(tmp_path, step, keep=3)
        assert latest_checkpoint(tmp_path).name == f"step_{step:06d}"
    kept = ["step_000010", "step_9000000", "step_20000000"]
    assert [p.name for p in list_checkpoints(tmp_path)] == kept and names(tmp_path) == sorted(kept)


def test_a_save_never_removes_itself_or_a_later_one(tmp_path: Path) -> None:
    save(tmp_path, 1), save(tmp_path, 9)
    save(tmp_path, 5, keep=1)
    assert names(tmp_path) == ["step_000005", "step_000009"]


def test_the_same_step_again_replaces(tmp_path: Path) -> None:
    save(tmp_path, 3)
    weights = {"model": {"w": torch.tensor([7.0])}}
    save_checkpoint(tmp_path, 3, weights=weights, training={}, keep=1)
    assert names(tmp_path) == ["step_000003"]
    loaded = load_checkpoint(tmp_path / "step_000003")
    assert loaded.weights["model"]["w"].tolist() == [7.0] and loaded.weights.keys() == {"model"}


def test_what_killed_saves_leave_is_passed_over_and_swept(tmp_path: Path) -> None:
    moved_aside = save(tmp_path, 3).rename(tmp_path / "step_000003.old")
    assert latest_checkpoint(tmp_path) == moved_aside and load_checkpoint(moved_aside).step == 3
    save(tmp_path / "elsewhere", 3).rename(tmp_path / "step_000003")
    assert latest_checkpoint(tmp_path).name == "step_000003"
    (
        tmp_path / f"step_000003.tmp-{os.getpid()}"
    ).mkdir()  # a process of the same number, in another container
    (tmp_path / "step_000004.tmp-1").mkdir()
    assert latest_checkpoint(tmp_path).name == "step_000003"
    save(tmp_path, 3)
    assert names(tmp_path) == ["elsewhere", "step_000003"]


def test_nothing_there(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path) is None and latest_checkpoint(tmp_path / "nowhere") is None
    (tmp_path / "step_000001").write_text("a file", encoding="utf-8")
    (tmp_path / "notes").mkdir()
    (tmp_path / "step_1").mkdir()
    assert list_checkpoints(tmp_path) == []
    with pytest.raises(CheckpointError, match="there is no checkpoint .*step_000002$"):
        load_checkpoint(tmp_path / "step_000002")
    save(tmp_path, 7)
    with pytest.raises(CheckpointError, match="there is no checkpoint .*; the latest is step_000007"):
        load_checkpoint(tmp_path / "step_000002")


def test_other_files_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.tmp").write_text("mine", encoding="utf-8")
    (tmp_path / "step_notes.txt").write_text("mine", encoding="utf-8")
    for step in (1, 2, 3):
        save(tmp_path, step, keep=1)
    assert names(tmp_path) == ["notes.tmp", "step_000003", "step_notes.txt"]


# What is refused before anything is written


def test_arguments_out_of_range(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="keep"):
        save(tmp_path, 1, keep=0)
    with pytest.raises(ValueError, match="step"):
        save(tmp_path, -1)
    with pytest.raises(ValueError, match="'../model' cannot be"):
        save_checkpoint(tmp_path, 1, weights={"../model": {}}, training={}, keep=1)
    assert names(tmp_path) == []
