"""Worker processes: results, failures, killed workers, and how they stop."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from diffrl.workers import Failure, run_tasks
from tests.kit.paths import ROOT


def work(task: Any) -> Any:
    """What a task says: ("value", x), ("raise", text), ("kill",), ("threads",), ("wait", folder)."""
    match task:
        case ("value", x):
            return x * 10
        case ("raise", text):
            raise ValueError(text)
        case ("kill",):
            os.kill(os.getpid(), signal.SIGKILL)
        case ("threads",):
            import torch

            return os.getpid(), torch.get_num_threads()
        case ("wait", folder):
            return wait_for_sigterm(Path(folder))
    return None


def wait_for_sigterm(folder: Path) -> None:
    """Say that it runs, and after SIGTERM that it has saved."""
    stopped: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: stopped.append(number))
    (folder / "pid").write_text(str(os.getpid()))
    while not stopped:
        time.sleep(0.01)
    (folder / "saved").write_text(f"{len(stopped)}")


def wait_until(condition: Any, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.02)


TASKS = [("value", 1), ("raise", "no such thing\nand more"), ("kill",), ("value", 4)]


@pytest.mark.parametrize("workers", [0, 1])
def test_every_task_comes_back_once_and_a_failure_sinks_no_other(workers: int) -> None:
    tasks = TASKS if workers else [task for task in TASKS if task != ("kill",)]
    found = list(run_tasks(work, tasks, workers=workers))
    assert sorted(index for index, _ in found) == list(range(len(tasks)))
    replies = dict(zip(tasks, (reply for _, reply in sorted(found, key=lambda pair: pair[0])), strict=True))
    failure = replies[TASKS[1]]
    assert failure.message == "ValueError: no such thing"
    assert "Traceback" in failure.details and "raise ValueError(text)" in failure.details
    assert replies["value", 4] == 40
    if workers:
        assert replies[("kill",)] == Failure("its worker process was killed by SIGKILL", "")


def test_workers_are_reused_and_have_the_threads_asked_for() -> None:
    found = [reply for _, reply in run_tasks(work, [("threads",)] * 6, workers=2, threads=3)]
    assert 1 <= len({pid for pid, _ in found}) <= 2
    assert os.getpid() not in {pid for pid, _ in found} and {threads for _, threads in found} == {3}


def test_leaving_early_asks_once_and_waits(tmp_path: Path) -> None:
    outcomes = run_tasks(work, [("value", 1), ("wait", str(tmp_path))], workers=1)
    assert next(outcomes) == (0, 10)
    wait_until((tmp_path / "pid").exists)
    outcomes.close()
    assert (tmp_path / "saved").read_text() == "1"
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_workers_stop_when_their_parent_is_killed(tmp_path: Path) -> None:
    program = (
        "from tests.test_workers import work; from diffrl.workers import run_tasks\n"
        f"if __name__ == '__main__': list(run_tasks(work, [('wait', {str(tmp_path)!r})], workers=1))"
    )
    script = tmp_path / "parent.py"
    script.write_text(program)
    path = os.pathsep.join([str(ROOT), *sys.path])
    parent = subprocess.Popen([sys.executable, str(script)], env={**os.environ, "PYTHONPATH": path})
    wait_until((tmp_path / "pid").exists)
    parent.kill()
    parent.wait()
    wait_until((tmp_path / "saved").exists)


@pytest.mark.parametrize("wrong", [{"workers": -1}, {"workers": 1, "threads": 0}])
def test_numbers_out_of_range(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="give workers >= 0 and threads >= 1"):
        list(run_tasks(work, [("value", 1)], **wrong))


def test_no_tasks() -> None:
    assert list(run_tasks(work, [], workers=2)) == []
