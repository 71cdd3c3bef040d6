"""Saving that fails or is killed leaves whole checkpoints only."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from diffrl.training.checkpoints import CheckpointError, latest_checkpoint, load_checkpoint
from tests.kit.checkpoints import names, save


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
    (tmp_path / "file").write_text("", encoding="utf-8")
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
