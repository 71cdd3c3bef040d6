"""Worker processes: results, failures, killed workers, and how they stop."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from diffrl import registry, workers
from diffrl.rewards.registry import REWARDS
from diffrl.workers import Failure, WorkerPool, attempt, run_tasks
from tests.kit.paths import ROOT
from tests.kit.worker_tasks import Unloadable, reward_is_known, unsendable, work


def wait_until(condition: Any, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.02)


KILL, TERMINATE = ("kill", signal.SIGKILL), ("kill", signal.SIGTERM)
TASKS: list[Any] = [("value", 1), ("raise", "no such thing\nand more"), ("leave", SystemExit), ("value", 4)]
OF_PROCESSES: list[Any] = [("leave", KeyboardInterrupt), KILL, TERMINATE, ("value", 7)]


@pytest.mark.parametrize("workers", [0, 1])
def test_every_task_comes_back_once_and_a_failure_sinks_no_other(workers: int) -> None:
    tasks = [*TASKS, *OF_PROCESSES] if workers else TASKS
    found = list(run_tasks(work, tasks, workers=workers))
    assert sorted(index for index, _ in found) == list(range(len(tasks)))
    replies = dict(zip(tasks, (reply for _, reply in sorted(found, key=lambda pair: pair[0])), strict=True))
    failure = replies[TASKS[1]]
    assert failure.message == "ValueError: no such thing" and not failure.stopped
    assert "Traceback" in failure.details and "raise ValueError(text)" in failure.details
    assert replies[TASKS[2]].message == "SystemExit: 3" and not replies[TASKS[2]].hopeless
    assert replies["value", 4] == 40
    if workers:  # one that is asked to end is told from one that failed
        assert replies[OF_PROCESSES[0]].message == "KeyboardInterrupt: 3"
        assert replies[KILL] == Failure("its worker process was killed by SIGKILL", "")
        assert replies[TERMINATE] == Failure("its worker process was killed by SIGTERM", stopped=True)
        assert replies["value", 7] == 70


def test_leaving_early_asks_once_and_waits(tmp_path: Path) -> None:
    outcomes = run_tasks(work, [("value", 1), ("wait", str(tmp_path))], workers=1)
    assert next(outcomes) == (0, 10)
    wait_until((tmp_path / "pid").exists)
    outcomes.close()
    assert (tmp_path / "saved").read_text(encoding="utf-8") == "1"
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text(encoding="utf-8")), 0)


def runs(pid: int) -> bool:
    """Whether the process runs: not one that waits for somebody to ask how it ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


PARENT = """
import sys
from threading import Thread
from diffrl.workers import WorkerPool, run_tasks
from tests.kit.worker_tasks import work

if __name__ == "__main__":
    wait, hang, deaf = sys.argv[1:]
    for begun in (
        run_tasks(work, [("wait", wait)], workers=1),
        WorkerPool(work, workers=1).map([("hang", hang)]),
        WorkerPool(work, workers=1, patience=0.5).map([("deaf", deaf)]),
    ):
        Thread(target=list, args=(begun,)).start()
"""
"""A process with workers of three kinds."""


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's help and /proc are Linux's")
def test_no_worker_outlives_its_parent_however_it_hangs(tmp_path: Path) -> None:
    """One that can save its work does; one that hangs, in C code or deaf to SIGTERM, is killed."""
    script, folders = tmp_path / "parent.py", [tmp_path / name for name in ("wait", "hang", "deaf")]
    script.write_text(PARENT, encoding="utf-8")
    for folder in folders:
        folder.mkdir()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    parent = subprocess.Popen([sys.executable, str(script), *map(str, folders)], env=environment)
    try:
        wait_until(lambda: all((folder / "pid").exists() for folder in folders), seconds=120)
        pids = [int((folder / "pid").read_text(encoding="utf-8")) for folder in folders]
        assert all(map(runs, pids))
    finally:
        parent.kill()
        parent.wait()
    wait_until(lambda: not any(map(runs, pids)), seconds=20)
    assert (folders[0] / "saved").exists()


@pytest.mark.parametrize("workers", [0, 1])
def test_tasks_end_when_they_are_to_stop(tmp_path: Path, workers: int) -> None:
    """Here before the next task; a process in the middle of one is asked once, and may save its work."""
    tasks = [("value", 1), ("wait", str(tmp_path)) if workers else ("value", 2), ("value", 3)]
    found: list[Any] = []
    stop = (tmp_path / "pid").exists if workers else lambda: bool(found)
    for outcome in run_tasks(work, tasks, workers=workers, stop=stop):
        found.append(outcome)
    assert found == [(0, 10)]
    assert not workers or (tmp_path / "saved").read_text(encoding="utf-8") == "1"


@pytest.mark.parametrize("kind", [SystemExit, KeyboardInterrupt])
def test_a_task_that_wants_to_end_its_thread_is_a_failure(kind: type) -> None:
    """Of processes see above."""
    pool = WorkerPool(work, workers=1, backend="thread")
    found = outcomes(pool, [("leave", kind), ("value", 2)])
    assert found[0].message == f"{kind.__name__}: 3" and not found[0].hopeless and found[1] == 20
    pool.close()


def test_without_workers_a_task_cannot_end_the_program_but_the_user_can() -> None:
    assert attempt(work, ("leave", SystemExit)).message == "SystemExit: 3"
    with pytest.raises(KeyboardInterrupt):
        attempt(work, ("leave", KeyboardInterrupt))


def test_abandoned_threads_are_not_without_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where too many of them still run, the pool says so; those that have ended do not count."""
    monkeypatch.setattr(workers, "MOST_ABANDONED", 3)
    release, begun = threading.Event(), list[threading.Thread]()

    def wait_for_release(task: int) -> None:
        begun.append(threading.current_thread())
        release.wait(30)

    pool = WorkerPool(wait_for_release, workers=2, backend="thread", timeout=0.05)
    found = outcomes(pool, [1, 2, 3, 4])
    assert [failure.hopeless for failure in found] == [False, False, True, True]
    assert "3 threads that did so still run: backend='process' is killed instead" in found[2].message
    assert len({*begun}) == 4 and all(thread.is_alive() for thread in begun)
    release.set()
    wait_until(lambda: not any(thread.is_alive() for thread in begun))
    pool = WorkerPool(lambda task: time.sleep(0.3), workers=1, backend="thread", timeout=0.25)
    for _ in range(5):
        assert not outcomes(pool, [1])[0].hopeless
        time.sleep(0.1)


@pytest.mark.parametrize("wrong", [{"workers": -1}, {"workers": 1, "threads": 0}])
def test_numbers_out_of_range(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="give workers >= 0 and threads >= 1"):
        list(run_tasks(work, [("value", 1)], **wrong))


def test_no_tasks() -> None:
    assert list(run_tasks(work, [], workers=2)) == []


# The pool


def outcomes(pool: WorkerPool, tasks: list[Any]) -> list[Any]:
    found = dict(pool.map(tasks))
    return [found[i] for i in range(len(tasks))]


@pytest.mark.parametrize("backend", ["thread", "process"])
def test_a_pool_stays_between_calls_and_replaces_what_is_too_slow(backend: Any) -> None:
    pool = WorkerPool(work, workers=2, backend=backend, threads=3, timeout=1.0)
    try:
        if backend == "process":  # they are reused, and have the threads asked for
            pids, threads = zip(*outcomes(pool, [("threads",)] * 6), strict=True)
            assert len({*pids}) <= 2 and os.getpid() not in pids and {*threads} == {3}
        assert outcomes(pool, [("value", n) for n in (1, 2, 3)]) == [10, 20, 30]
        found = outcomes(pool, [("value", 1), ("sleep", 60), ("raise", "no")])
        assert found[0] == 10 and found[1] == Failure("it took longer than 1 s")
        assert found[2].message == "ValueError: no" and not found[2].hopeless
        assert isinstance(found[2].cause, ValueError) == (backend == "thread")
        assert outcomes(pool, [("value", 4)]) == [40]
    finally:
        pool.close()
    assert outcomes(pool, [("value", 5)]) == [50]  # and a closed pool starts again
    pool.close()


def test_what_no_process_can_take_or_give_back() -> None:
    with pytest.raises(ValueError, match="cannot be sent to a process .*backend='thread'"):
        WorkerPool(lambda task: task, workers=1)
    for function, tasks, message in (
        (unsendable, [1, 2], "its result cannot be sent back"),
        (Unloadable(), [1], "could not start"),
    ):
        found = [reply for _, reply in run_tasks(function, tasks, workers=1)]
        assert len(found) == len(tasks) and all(
            message in reply.message and reply.hopeless for reply in found
        )


def test_workers_know_the_methods_of_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module that the parent imported by name is imported in each process before its first task."""
    (tmp_path / "my_reward.py").write_text(
        "from diffrl.rewards.registry import REWARDS\n\n\n"
        "@REWARDS.register('sum')\n"
        "class Sum:\n"
        "    def __call__(self, x0, cond=None):\n"
        "        return x0.flatten(1).sum(1)\n",
        encoding="utf-8",
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(registry, "_USERS", {})
    monkeypatch.setattr(REWARDS, "_entries", {**{entry.name: entry for entry in REWARDS.entries()}})
    assert "sum" not in REWARDS
    registry.import_named("my_reward")
    assert "sum" in REWARDS
    assert list(run_tasks(reward_is_known, ["sum", "product"], workers=1)) == [(0, True), (1, False)]
    monkeypatch.setattr(registry, "_USERS", {"no_such_module": None})
    [(_, failure)] = run_tasks(reward_is_known, ["sum"], workers=1)
    assert "could not start" in failure.message and "no_such_module" in failure.message
