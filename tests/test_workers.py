"""Worker processes: results, failures, killed workers, and how they stop."""

import os
import re
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


def work(task: Any) -> Any:
    """What a task says: ("value", x), ("raise", text), ("kill", signal), ("threads",), ("wait", folder), ..."""
    match task:
        case ("value", x):
            return x * 10
        case ("raise", text):
            raise ValueError(text)
        case ("kill", number):
            os.kill(os.getpid(), number)
        case ("leave", kind):
            raise kind(3)
        case ("deaf", folder):  # to SIGTERM
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            (Path(folder) / "pid").write_text(str(os.getpid()), encoding="utf-8")
            time.sleep(60)
        case ("hang", folder):  # in C code that lets no other thread run
            (Path(folder) / "pid").write_text(str(os.getpid()), encoding="utf-8")
            re.fullmatch("(a+)+b", "a" * 64)
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
    (folder / "pid").write_text(str(os.getpid()), encoding="utf-8")
    while not stopped:
        time.sleep(0.01)
    (folder / "saved").write_text(f"{len(stopped)}", encoding="utf-8")


def wait_until(condition: Any, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.02)


KILL = ("kill", signal.SIGKILL)
TASKS = [("value", 1), ("raise", "no such thing\nand more"), KILL, ("value", 4)]


@pytest.mark.parametrize("workers", [0, 1])
def test_every_task_comes_back_once_and_a_failure_sinks_no_other(workers: int) -> None:
    tasks = TASKS if workers else [task for task in TASKS if task != KILL]
    found = list(run_tasks(work, tasks, workers=workers))
    assert sorted(index for index, _ in found) == list(range(len(tasks)))
    replies = dict(zip(tasks, (reply for _, reply in sorted(found, key=lambda pair: pair[0])), strict=True))
    failure = replies[TASKS[1]]
    assert failure.message == "ValueError: no such thing"
    assert "Traceback" in failure.details and "raise ValueError(text)" in failure.details
    assert replies["value", 4] == 40
    if workers:
        assert replies[KILL] == Failure("its worker process was killed by SIGKILL", "")


def test_workers_are_reused_and_have_the_threads_asked_for() -> None:
    found = [reply for _, reply in run_tasks(work, [("threads",)] * 6, workers=2, threads=3)]
    assert 1 <= len({pid for pid, _ in found}) <= 2
    assert os.getpid() not in {pid for pid, _ in found} and {threads for _, threads in found} == {3}


def test_leaving_early_asks_once_and_waits(tmp_path: Path) -> None:
    outcomes = run_tasks(work, [("value", 1), ("wait", str(tmp_path))], workers=1)
    assert next(outcomes) == (0, 10)
    wait_until((tmp_path / "pid").exists)
    outcomes.close()
    assert (tmp_path / "saved").read_text(encoding="utf-8") == "1"
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text(encoding="utf-8")), 0)


def orphans(tmp_path: Path, program: str) -> int:
    """The worker process of a script whose process was killed; the script knows `work`, `task` and `workers`."""
    script = tmp_path / "parent.py"
    script.write_text(
        "import sys; from tests.test_workers import work; from diffrl import workers\n"
        f"if __name__ == '__main__':\n    folder = sys.argv[1]\n    {program}\n",
        encoding="utf-8",
    )
    path = os.pathsep.join([str(ROOT), *sys.path])
    words = [sys.executable, str(script), str(tmp_path)]
    parent = subprocess.Popen(words, env={**os.environ, "PYTHONPATH": path})
    wait_until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text(encoding="utf-8"))
    parent.kill()
    parent.wait()
    return int((tmp_path / "pid").read_text(encoding="utf-8"))


def runs(pid: int) -> bool:
    """Whether the process runs: not one that waits for somebody to ask how it ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_workers_stop_when_their_parent_is_killed(tmp_path: Path) -> None:
    orphans(tmp_path, "list(workers.run_tasks(work, [('wait', folder)], workers=1))")
    wait_until((tmp_path / "saved").exists)


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's help and /proc are Linux's")
@pytest.mark.parametrize(
    "pool",
    ["workers.WorkerPool(work, workers=1).map([('hang', folder)])",
     "workers.WorkerPool(work, workers=1, patience=0.5).map([('deaf', folder)])"],
)  # fmt: skip
def test_no_worker_outlives_its_parent_however_it_hangs(tmp_path: Path, pool: str) -> None:
    pid = orphans(tmp_path, f"list({pool})")
    wait_until(lambda: not runs(pid), seconds=20)


def test_a_worker_that_is_asked_to_end_is_told_from_one_that_failed() -> None:
    found = dict(run_tasks(work, [("kill", signal.SIGTERM), ("value", 1), ("raise", "no")], workers=1))
    assert found[0] == Failure("its worker process was killed by SIGTERM", stopped=True)
    assert found[1] == 10 and not found[2].stopped


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
@pytest.mark.parametrize("backend", ["thread", "process"])
def test_a_task_that_wants_to_end_its_worker_is_a_failure(backend: Any, kind: type) -> None:
    pool = WorkerPool(work, workers=1, backend=backend)
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
    release = threading.Event()
    pool = WorkerPool(lambda task: release.wait(30), workers=2, backend="thread", timeout=0.05)
    before = threading.active_count()
    found = outcomes(pool, [1, 2, 3, 4])
    assert [failure.hopeless for failure in found] == [False, False, True, True]
    assert "3 threads that did so still run: backend='process' is killed instead" in found[2].message
    assert threading.active_count() == before + 4
    release.set()
    wait_until(lambda: threading.active_count() == before)
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


def double_or_wait(task: float) -> float:
    """Twice the number; a negative one takes a minute, and 0 raises."""
    if task < 0:
        time.sleep(60)
    if task == 0:
        raise ValueError("nothing to double")
    return 2 * task


def unsendable(task: Any) -> Any:
    return lambda: task


class Unloadable:
    """Can be pickled, but not made again."""

    def __reduce__(self) -> tuple[Any, ...]:
        return int, ("no number",)

    def __call__(self, task: Any) -> Any:
        return task


def outcomes(pool: WorkerPool, tasks: list[Any]) -> list[Any]:
    found = dict(pool.map(tasks))
    return [found[i] for i in range(len(tasks))]


@pytest.mark.parametrize("backend", ["thread", "process"])
def test_a_pool_stays_between_calls_and_replaces_what_is_too_slow(backend: Any) -> None:
    pool = WorkerPool(double_or_wait, workers=2, backend=backend, timeout=1.0)
    try:
        assert outcomes(pool, [1, 2, 3]) == [2, 4, 6]
        found = outcomes(pool, [1, -1, 0])
        assert found[0] == 2 and found[1] == Failure("it took longer than 1 s")
        assert found[2].message == "ValueError: nothing to double" and not found[2].hopeless
        assert isinstance(found[2].cause, ValueError) == (backend == "thread")
        assert outcomes(pool, [4]) == [8]
    finally:
        pool.close()
    assert outcomes(pool, [5]) == [10]  # and a closed pool starts again
    pool.close()


def test_what_no_process_can_take_or_give_back() -> None:
    with pytest.raises(ValueError, match="cannot be sent to a process .*backend='thread'"):
        WorkerPool(lambda task: task, workers=1)
    for function, message in (
        (unsendable, "its result cannot be sent back"),
        (Unloadable(), "could not start"),
    ):
        found = [reply for _, reply in run_tasks(function, [1, 2], workers=1)]
        assert len(found) == 2 and all(message in reply.message and reply.hopeless for reply in found)


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


def reward_is_known(name: str) -> bool:
    return name in REWARDS
