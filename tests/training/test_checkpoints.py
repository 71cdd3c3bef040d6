import hashlib
import io
import json
import os
import pickle
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

import diffrl
from diffrl.diffusion.networks.mlp import MLP
from diffrl.training import checkpoints
from diffrl.training.checkpoints import (
    CheckpointError,
    latest_checkpoint,
    list_checkpoints,
    load_checkpoint,
    save_checkpoint,
)
from diffrl.training.ema import EMA

FILES = ["model.safetensors", "ema.safetensors", "training.pt", "manifest.json"]


def save(folder: Path, step: int, keep: int = 10) -> Path:
    w = torch.full((100,), float(step))
    weights = {"model": {"w": w}, "ema": {"w": -w}}
    return save_checkpoint(folder, step, weights=weights, training={"lr": 0.1 * step, "w": w}, keep=keep)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# What is saved is what is loaded


def test_layout(tmp_path: Path) -> None:
    path = save(tmp_path / "new" / "checkpoints", 500)
    assert path == tmp_path / "new" / "checkpoints" / "step_000500"
    assert names(path) == sorted(FILES)
    manifest = json.loads((path / "manifest.json").read_text())
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
    (tmp_path / "step_000001").write_text("a file")
    (tmp_path / "notes").mkdir()
    (tmp_path / "step_1").mkdir()
    assert list_checkpoints(tmp_path) == []
    with pytest.raises(CheckpointError, match="there is no checkpoint .*step_000002$"):
        load_checkpoint(tmp_path / "step_000002")
    save(tmp_path, 7)
    with pytest.raises(CheckpointError, match="there is no checkpoint .*; the latest is step_000007"):
        load_checkpoint(tmp_path / "step_000002")


def test_other_files_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.tmp").write_text("mine"), (tmp_path / "step_notes.txt").write_text("mine")
    for step in (1, 2, 3):
        save(tmp_path, step, keep=1)
    assert names(tmp_path) == ["notes.tmp", "step_000003", "step_notes.txt"]


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
    manifest = json.loads((path / "manifest.json").read_text()) | changes
    for name in manifest["files"]:
        if (path / name).is_file():
            manifest["files"][name] = checkpoints._entry((path / name).read_bytes())
    (path / "manifest.json").write_text(json.dumps(manifest))


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
    rewrite(path, format=2)
    with pytest.raises(CheckpointError, match="format 2 and diffrl .* reads up to 1: upgrade diffrl$"):
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
    (path / "manifest.json").write_text(text)
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
    with pytest.raises(CheckpointError, match="training.pt cannot be read"):
        load_checkpoint(path)
    (path / "training.pt").write_bytes(pickle.dumps(Stranger()))
    rewrite(path)
    with pytest.raises(CheckpointError, match="training.pt cannot be read"):
        load_checkpoint(path)
    assert not trap.exists()


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/hostname", "..", "a.pt"])
def test_a_manifest_leads_nowhere_else(tmp_path: Path, name: str) -> None:
    path = save(tmp_path, 1)
    manifest = json.loads((path / "manifest.json").read_text())
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


def test_arguments_out_of_range(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="keep"):
        save(tmp_path, 1, keep=0)
    with pytest.raises(ValueError, match="step"):
        save(tmp_path, -1)
    with pytest.raises(ValueError, match="'../model' cannot be"):
        save_checkpoint(tmp_path, 1, weights={"../model": {}}, training={}, keep=1)
    assert names(tmp_path) == []


# Disk and death


@pytest.mark.parametrize("call", range(9))
def test_a_disk_that_refuses_leaves_the_old_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    save(tmp_path, 1)
    calls = 0

    def failing(function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == call + 1:
                raise OSError(28, "No space left on device")
            return function(*args, **kwargs)

        return wrapper

    with monkeypatch.context() as patch:
        for owner, name in [(os, "fsync"), (Path, "mkdir"), (Path, "rename")]:
            patch.setattr(owner, name, failing(getattr(owner, name)))
        with pytest.raises(
            CheckpointError, match=r"step_000002 could not be written \(.*No space left"
        ) as caught:
            save(tmp_path, 2)
    assert isinstance(caught.value.__cause__, OSError)
    assert load_checkpoint(tmp_path / "step_000001").training["lr"] == 0.1
    last = latest_checkpoint(tmp_path)
    assert load_checkpoint(last).step in (1, 2)
    assert [p.name for p in tmp_path.iterdir() if "tmp" in p.name] == []
    save(tmp_path, 3)
    assert load_checkpoint(latest_checkpoint(tmp_path)).step == 3


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="could not be written"):
        save(tmp_path / "file" / "checkpoints", 1)


KILLED = """
import os, shutil, signal, sys
from pathlib import Path
import torch
from diffrl.training import checkpoints

torch.set_num_threads(1)
folder, second, survivors = Path(sys.argv[1]), int(sys.argv[2]), []


def save(step, value):
    weights = {"model": {"w": torch.full((1000,), value)}}
    checkpoints.save_checkpoint(folder, step, weights=weights, training={"value": value}, keep=1)


def deadly(function, after, torn=False):
    def wrapper(*args, **kwargs):
        global calls
        calls += 1
        if calls == after:
            if torn:
                args[0].write_bytes(args[1][: len(args[1]) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)
    return wrapper


for after in range(1, 100):  # the second save is killed at its first, second, ... call to the disk
    shutil.rmtree(folder, ignore_errors=True)
    save(1, 1.0)
    child = os.fork()
    if child == 0:
        calls = 0
        checkpoints._write = deadly(checkpoints._write, after, torn=True)
        os.fsync = deadly(os.fsync, after)
        Path.rename = deadly(Path.rename, after)
        Path.mkdir = deadly(Path.mkdir, after)
        os.rmdir = deadly(os.rmdir, after)
        save(second, 2.0)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    loaded = checkpoints.load_checkpoint(checkpoints.latest_checkpoint(folder))
    value = loaded.training["value"]
    assert (loaded.step, value) in [(1, 1.0), (second, 2.0)], (after, loaded.step, value)
    assert (loaded.weights["model"]["w"] == value).all()
    survivors.append(value)
    save(second, 2.0)  # the next saves find their way, and sweep
    save(3, 3.0)
    assert [path.name for path in folder.iterdir()] == ["step_000003"], after
    if os.waitstatus_to_exitcode(status) == 0:
        break
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
print(*survivors)
"""


@pytest.mark.parametrize("second", [1, 2])
def test_kill_at_every_point_of_a_save_leaves_a_whole_checkpoint(tmp_path: Path, second: int) -> None:
    command = [sys.executable, "-c", KILLED, str(tmp_path / "checkpoints"), str(second)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    survivors = [float(word) for word in done.stdout.split()]
    assert len(survivors) > 10  # so many kills, and the last run through
    # until the rename the old one, from then on the new one
    assert survivors == sorted(survivors) and survivors[0] == 1.0 and survivors[-1] == 2.0


def test_interruption_by_the_user_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 1)

    def interrupted(descriptor: int) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", interrupted)
        with pytest.raises(KeyboardInterrupt):
            save(tmp_path, 2)
    assert names(tmp_path) == ["step_000001"]


def test_unreadable_file_is_not_for_deletion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path, 1)

    def refuse(self: Path) -> bytes:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(CheckpointError, match=r"manifest\.json cannot be read .*Permission denied") as caught:
        load_checkpoint(path)
    assert "delete" not in str(caught.value)
