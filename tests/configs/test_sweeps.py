"""Sweeps, signals outside of runs, several processes: what a command does as a whole."""

import json
import os
import runpy
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from diffrl import __main__ as program
from diffrl.configs import commands
from diffrl.errors import InputError
from diffrl.experiments.comparison import run_cells
from diffrl.ranks import own_rank, ranks_started
from tests.kit.configs import TINY
from tests.kit.paths import EXAMPLES
from tests.kit.processes import ended, members, send, start

pytestmark = pytest.mark.usefixtures("unrendered")


def swept(monkeypatch: pytest.MonkeyPatch, script: str, *words: str) -> str:
    """What the exit of a sweep says; nothing where it ended well."""
    monkeypatch.setattr(sys, "argv", [script, "--multirun", *words])
    try:
        runpy.run_path(str(EXAMPLES / script), run_name="__main__")
    except SystemExit as end:
        return str(end.code)
    return ""


def seeds(folder: Path) -> list[int]:
    return sorted(
        json.loads(file.read_text(encoding="utf-8"))["seed"] for file in folder.glob("runs/*/results.json")
    )


def test_a_failed_job_ends_no_other_and_is_named_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    words = [*TINY, "compare=false", "objective.lmbda=0,2,0.5", f"hydra.sweep.dir={tmp_path}/sweep"]
    said = swept(monkeypatch, "train_td_lambda.py", *words)
    assert (
        said.startswith("error: 1 jobs failed: job 1 (") and "objective.lmbda=2" in said and "\n" not in said
    )
    assert said.endswith("the others are done") and "failed  job 1 (" in capsys.readouterr().out
    found = [
        json.loads(file.read_text(encoding="utf-8"))["config"]
        for file in tmp_path.glob("runs/*/results.json")
    ]
    assert sorted(config["objective"]["lmbda"] for config in found) == [0, 0.5]


def test_an_error_of_the_program_keeps_its_traceback_and_ends_no_other_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran: list[int] = []

    def broken(config: dict[str, Any]) -> Any:
        ran.append(config["seed"])
        raise KeyError("a bug")

    monkeypatch.setattr(commands, "run_experiment", broken)
    said = swept(monkeypatch, "train_td_lambda.py", *TINY, "seed=0,1", f"hydra.sweep.dir={tmp_path}")
    assert ran == [0, 1] and said.startswith("error: 2 jobs failed: job 0 (")
    assert capsys.readouterr().err.count("Traceback") == 2


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_job_is_saved_and_ends_the_sweep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    from diffrl.training.trainer import Trainer

    step = Trainer._advance

    def step_and_stop(self: Trainer) -> Any:
        if self.step == 3 and self.seed == 1:
            signal.raise_signal(number)
        return step(self)

    monkeypatch.setattr(Trainer, "_advance", step_and_stop)
    monkeypatch.chdir(tmp_path)
    words = [*TINY, "compare=false", "seed=0,1,2", f"hydra.sweep.dir={tmp_path}/sweep"]
    said = swept(monkeypatch, "train_td_lambda.py", *words)
    assert said.startswith("error: stopped after gradient step 4") and "the sweep ends with job 1 (" in said
    assert seeds(tmp_path) == [0] and len(list(tmp_path.glob("runs/*"))) == 2
    assert list(tmp_path.glob("runs/*/checkpoints/td/step_000004"))


def test_ctrl_c_outside_of_a_run_ends_the_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[int] = []

    def interrupted(config: dict[str, Any]) -> Any:
        ran.append(config["seed"])
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(commands, "run_experiment", interrupted)
    said = swept(monkeypatch, "train_td_lambda.py", *TINY, "seed=0,1", f"hydra.sweep.dir={tmp_path}")
    assert said.startswith("error: interrupted; the sweep ends with job 0 (") and ran == [0]


@pytest.mark.parametrize("command", [name for name in program.COMMANDS if name not in ("train", "finetune")])
def test_several_processes_are_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    """As torchrun starts them: each would do it all, or one end the other. No folder is made."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setattr(sys, "argv", ["diffrl", command, "run"])
        with pytest.raises(SystemExit) as end:
            program.main()
        said = str(end.value)
        assert said.startswith(f"error: the command {command} takes one process, and WORLD_SIZE=2 asks for 2")
        assert "\n" not in said and "workers=N" in said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["seeds=[1,2]"], "a table over seeds takes one process, and WORLD_SIZE=2 asks for 2"),
        (["--multi", "seed=0,1"], "a sweep takes one process, and WORLD_SIZE=2 asks for 2"),
        ([], "WORLD_SIZE is 2, but MASTER_ADDR, MASTER_PORT is not set: start the processes by torchrun"),
        (["device=cuda:1"], "device is 'cuda:1', for each of 2 processes: give cuda"),
        (["rank_timeout=0"], "rank_timeout is 0"),
        (["first_timeout=0"], "first_timeout is 0"),
    ],
)
def test_what_processes_cannot_share_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], text: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, value in (("WORLD_SIZE", "2"), ("RANK", "1")):
        monkeypatch.setenv(name, value)
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "1" if "device=cuda:1" in words else "")
    monkeypatch.setattr(sys, "argv", ["diffrl", "train", *TINY, *words])
    with pytest.raises(SystemExit) as end:
        program.main()
    assert str(end.value).startswith(f"error: {text}") and "\n" not in str(end.value)
    assert list(tmp_path.iterdir()) == []


def test_what_torchrun_says_is_read_as_it_is_meant(monkeypatch: pytest.MonkeyPatch) -> None:
    for size, rank, found in (("", "", (1, 0)), ("1", "0", (1, 0)), ("1", "3", (1, 0)), ("8", "7", (8, 7))):
        monkeypatch.setenv("WORLD_SIZE", size)
        monkeypatch.setenv("RANK", rank)
        assert (ranks_started(), own_rank()) == found
    for size in ("0", "-1", "two", "1.5"):
        monkeypatch.setenv("WORLD_SIZE", size)
        with pytest.raises(InputError, match=f"WORLD_SIZE is '{size}'"):
            ranks_started()


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ([], r"a comparison of methods (compare=[] makes one run) takes one process"),
        (
            ["compare=[]"],
            "training what is to be tuned (model.path=RUN names one that is trained) takes one process",
        ),
    ],
)
def test_fine_tuning_that_processes_cannot_share_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], text: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(sys, "argv", ["diffrl", "finetune", *words])
    with pytest.raises(SystemExit) as end:
        program.main()
    assert str(end.value).startswith(f"error: {text}") and "\n" not in str(end.value)
    assert list(tmp_path.iterdir()) == []


def test_a_comparison_by_several_processes_is_refused_in_python_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="takes one process, and WORLD_SIZE=2"):
        run_cells([], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_modules_are_imported_is_one_line(number: signal.Signals) -> None:
    running = start("train", *TINY)
    maps = Path(f"/proc/{running.pid}/maps")
    end = time.monotonic() + 60
    while "libtorch" not in maps.read_text(encoding="utf-8"):  # in the middle of the import of torch
        assert time.monotonic() < end and running.poll() is None
        time.sleep(0.005)
    send(number, members(running))
    assert ended(running) == (1, "error: interrupted\n")


def test_handlers_are_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    monkeypatch.setattr(sys, "argv", ["diffrl", "report", "/nowhere"])
    with pytest.raises(SystemExit, match="error: /nowhere holds no comparison"):
        program.main()
    assert before == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    assert os.environ.get("HYDRA_FULL_ERROR", "0") != "1"
