"""Two processes of which one is killed, late or abandoned, or which come too late; what is left goes on to the same."""

import errno
import json
import os
import re
import shutil
import signal
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from torch.distributed.checkpoint.filesystem import FileSystem

from diffrl.errors import DiffrlError
from diffrl.experiments.run import Interrupted
from diffrl.experiments.train import TrainingJob, run_experiment
from diffrl.ranks import FIRST_TIMEOUT
from diffrl.training import distributed
from diffrl.training.checkpoints import CheckpointError, list_checkpoints, load_checkpoint
from diffrl.training.distributed import RankLost
from diffrl.training.lock import folder_lock
from diffrl.training.runs import load
from diffrl.training.trainer import Trainer
from tests.experiments.test_many_processes import WORDS, assert_close
from tests.kit.configs import small
from tests.kit.pairs import free_ports, in_pair, lose_the_other, stopped
from tests.kit.run_states import state

pytestmark = [
    pytest.mark.skipif(not dist.is_gloo_available(), reason="torch was built without gloo"),
    pytest.mark.filterwarnings(r"ignore:.*ranks 2 → 1:RuntimeWarning"),
]

CUT = ("trainer.sharded=true", "trainer.batch_size=7", "trainer.checkpoint_every=2")
TIMEOUT = 3.0  # seconds that one waits for another; an evaluation takes longer
RUNS = ("late", "stuck", "abandoned", "taken", "full", "dying")


def work(rank: int, folder: Path, meet: Callable[[], None]) -> None:
    """What each of the two does."""
    configs = json.loads((folder / "configs.json").read_text(encoding="utf-8"))
    advance, evaluate, parent, said = Trainer._advance, TrainingJob.evaluate, os.getppid, dict[str, Any]()

    def evaluate_late(self: TrainingJob) -> dict[str, float]:
        if self.trainer.step == 3:
            time.sleep(TIMEOUT + 1)
        return evaluate(self)

    def evaluate_for_ever(self: TrainingJob) -> dict[str, float]:
        """Until the other one has given up, which it says in a file."""
        while self.trainer.step == 3 and not (folder / "gave_up").exists():
            time.sleep(0.05)
        return evaluate(self)

    def patch(late: Any, parent_now: Callable[[], int]) -> None:
        TrainingJob.evaluate, os.getppid = late, parent_now  # type: ignore[method-assign]

    warnings.filterwarnings("error", message="FSDP2")
    meet()
    patch(evaluate_late, parent)
    said["late"] = str(run_experiment(configs["late"], progress=False).path)
    meet()
    patch(evaluate_for_ever, parent)
    with pytest.raises(RankLost) as lost:
        run_experiment(configs["stuck"], progress=False)
    said["stuck"] = str(lost.value)
    if rank == 1:
        (folder / "gave_up").touch()
    meet()
    patch(evaluate, parent)
    if rank == 1:
        stopped(Trainer, 3, lambda: patch(evaluate, lambda: 1))
    for run in ("abandoned", "taken"):
        try:
            run_experiment(configs[run], progress=False)
        except (Interrupted, DiffrlError) as error:
            said[run] = f"{type(error).__name__}: {error}"
        patch(evaluate, parent)
        Trainer._advance = advance  # type: ignore[method-assign]
        meet()
    with pytest.MonkeyPatch.context() as patched:
        if rank == 1:
            patched.setattr(FileSystem, "create_stream", no_room)
        try:
            run_experiment(configs["full"], progress=False)
        except DiffrlError as error:
            said["full"] = f"{type(error).__name__}: {error}"
    meet()
    if rank == 1:
        stopped(Trainer, 5, lambda: os.kill(os.getpid(), signal.SIGKILL))
    lose_the_other(
        lambda: run_experiment(configs["dying"], progress=False), said, folder / f"said{rank}.json"
    )


def no_room(self: FileSystem, path: Any, mode: str) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


Pair = tuple[Path, list[int | None], list[dict[str, Any]]]


def config_of(folder: Path, run: str) -> dict[str, Any]:
    times = (f"rank_timeout={TIMEOUT}", *(["first_timeout=2"] if run == "stuck" else []))
    return small(*WORDS, *(CUT if run != "taken" else ()), f"run_dir={folder}/{run}", *times)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """The folder in which two processes worked, their exit codes, and what each said."""
    folder = tmp_path_factory.mktemp("lost")
    (folder / "configs.json").write_text(
        json.dumps({run: config_of(folder, run) for run in RUNS}), encoding="utf-8"
    )
    with folder_lock(folder / "taken"):
        codes = in_pair(work, folder, meetings=6)
    shutil.copytree(folder / "dying", folder / "damaged")
    said = [json.loads((folder / f"said{rank}.json").read_text(encoding="utf-8")) for rank in (0, 1)]
    return folder, codes, said


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What one process makes of the same, undisturbed."""
    return state(run_experiment(config_of(tmp_path_factory.mktemp("one"), "whole"), progress=False).path)


def goes_on(folder: Path, run: str) -> dict[str, Any]:
    config = {**config_of(folder, run), "run_dir": None, "resume": str(folder / run)}
    return state(run_experiment(config, progress=False).path)


def test_an_evaluation_may_take_longer_than_one_waits_for_another(pair: Pair, one: dict[str, Any]) -> None:
    folder, _, said = pair
    assert [found["late"] for found in said] == [f"{folder}/late"] * 2
    assert_close(state(folder / "late"), one)


def test_an_evaluation_that_never_ends_is_waited_for_no_longer_than_was_said(
    pair: Pair, one: dict[str, Any]
) -> None:
    """Though rank 0 gives signs of life; the run goes on."""
    folder, _, said = pair
    assert {found["stuck"] for found in said} == {
        "the first process has been at the evaluation at gradient step 3 of td for 2 s (first_timeout), and is waited "
        "for no longer: if it only needs more time, go on by resume=... with a longer first_timeout"
    }
    assert [path.name for path in saved(folder, "stuck")] == ["step_000002"]
    found = goes_on(folder, "stuck")
    found["results"]["config"]["first_timeout"] = FIRST_TIMEOUT
    assert_close(found, one)


def test_processes_whose_launcher_has_ended_save_and_stop(pair: Pair, one: dict[str, Any]) -> None:
    folder, _, (first, second) = pair
    told = "stopped after gradient step 4 of td, and saved; continue with"
    assert first["abandoned"].startswith(f"Interrupted: {told}")
    assert second["abandoned"].startswith(f"Interrupted: what started the processes has ended: {told}")
    assert [path.name for path in saved(folder, "abandoned")] == ["step_000002", "step_000004"]
    assert_close(goes_on(folder, "abandoned"), one)


def test_two_that_come_to_a_folder_in_use_are_refused_and_write_nothing(pair: Pair) -> None:
    folder, _, (first, second) = pair
    assert first["taken"].startswith(
        f"FolderInUse: {folder}/taken is being written by process {os.getpid()} on "
    )
    assert second["taken"] == "RankLost: the first process could not go on: see what it says"
    assert [path.name for path in (folder / "taken").iterdir()] == [".lock"]


def test_all_are_told_whose_part_of_a_checkpoint_could_not_be_written(pair: Pair) -> None:
    folder, _, (first, second) = pair
    assert first["full"] == second["full"]
    assert re.fullmatch(
        rf"CheckpointError: process 1 could not write its part of a checkpoint, {folder}/full/checkpoints/td/"
        r"step_000002\.tmp-\d+/shard-00002\S+\.safetensors \(No space left on device\): make room there, or let it "
        r"write to that folder; earlier checkpoints are as they were",
        first["full"],
    )
    assert not [*(folder / "full" / "checkpoints" / "td").glob("step_*")]


def saved(folder: Path, run: str) -> list[Path]:
    return list_checkpoints(folder / run / "checkpoints" / "td")


def test_of_two_that_have_cut_a_run_one_is_killed(pair: Pair, one: dict[str, Any]) -> None:
    folder, codes, said = pair
    assert codes == [3, -signal.SIGKILL]
    assert said[0]["seconds"] < 60 and said[0]["lost"].startswith("process 0 of 2 lost another one")
    assert not (folder / "dying" / "results.json").exists()
    assert [path.name for path in saved(folder, "dying")] == ["step_000002", "step_000004"]
    assert_close(goes_on(folder, "dying"), one)


def cut_short(checkpoint: Path) -> str:
    part = checkpoint / "part_00002.safetensors"
    part.write_bytes(part.read_bytes()[:-8])
    return r"part_00002\.safetensors has \d+ bytes instead of \d+"


def lost(checkpoint: Path) -> str:
    (checkpoint / "part_00001.safetensors").unlink()
    return r"part_00001\.safetensors is missing"


def of_another_step(checkpoint: Path) -> str:
    name = "part_00002.safetensors"
    shutil.copy(checkpoint.with_name("step_000002") / name, checkpoint / name)
    return r"part_00002\.safetensors has been altered"


def no_manifest(checkpoint: Path) -> str:
    (checkpoint / "manifest.json").unlink()
    return r"manifest\.json is missing"


def broken_manifest(checkpoint: Path) -> str:
    (checkpoint / "manifest.json").write_bytes(b"\x00{")
    return r"manifest\.json is not JSON"


def mute_part(checkpoint: Path) -> str:
    """The manifest does not name one of the parts."""
    file = checkpoint / "manifest.json"
    manifest = json.loads(file.read_text(encoding="utf-8"))
    del manifest["files"]["part_00002.safetensors"]
    file.write_text(json.dumps(manifest), encoding="utf-8")
    return r"its parts do not make whole tensors \(parts of .* are missing\)"


FAULTS = (cut_short, lost, of_another_step, mute_part, no_manifest, broken_manifest)


def test_what_is_damaged_of_a_checkpoint_in_parts_is_named_with_the_older_one(
    pair: Pair, one: dict[str, Any]
) -> None:
    """As a checkpoint of one file is; without it the run goes on from the older one, to the same."""
    folder, _, _ = pair
    for fault in FAULTS:
        shutil.copytree(folder / "damaged", folder / fault.__name__)
        newest = saved(folder, fault.__name__)[-1]
        text = f"{newest}: {fault(newest)}.*; delete step_000004 to resume from step_000002$"
        with pytest.raises(CheckpointError, match=text) as caught:
            goes_on(folder, fault.__name__)
        assert "\n" not in str(caught.value)
    with pytest.raises(CheckpointError, match=text):  # the last one
        load(folder / fault.__name__)
    shutil.rmtree(newest)
    assert_close(goes_on(folder, fault.__name__), one)
    older, newest = saved(folder, "damaged")
    cut_short(newest), lost(older)
    with pytest.raises(CheckpointError, match=r"there is no older sound one: delete it to start again$"):
        load_checkpoint(newest)


def test_processes_whose_launcher_is_gone_before_they_meet_end_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """And not after the time that they would wait for each other."""
    monkeypatch.setattr(distributed, "LAUNCHER_TIMEOUT", 0.2)
    told = {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_ports(1)[0])}
    for name, value in (told | {"TORCHELASTIC_USE_AGENT_STORE": "True"}).items():
        monkeypatch.setenv(name, value)
    begun = time.monotonic()
    with pytest.raises(RankLost, match="process 1 of 2 lost another one"), distributed.joined("cpu", 600):
        pass
    assert time.monotonic() - begun < 60
