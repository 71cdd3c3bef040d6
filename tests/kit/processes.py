"""Commands as processes in a session of their own, to be signalled one by one or all at once."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tests.kit.paths import ROOT

Running = subprocess.Popen[str]


def start(*words: str, launcher: tuple[str, ...] = ()) -> Running:
    """``python -m diffrl`` with these words, on one thread; or by a launcher, such as ``-m torch.distributed.run``."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", *launcher, "-m", "diffrl", *words],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def ended(running: Running, seconds: float = 250.0) -> tuple[int, str]:
    """Exit status and what was said, once it and everything that it started have ended."""
    said, _ = running.communicate(timeout=seconds)  # its workers hold the pipe too
    return running.returncode, said


def wait_until(condition: Callable[[], object], running: Running, seconds: float = 120.0) -> None:
    """Wait for something that a running command does."""
    end = time.monotonic() + seconds
    while not condition():
        assert running.poll() is None, running.communicate()[0]
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.02)


def members(running: Running) -> list[int]:
    """Every process of the command's session."""
    return members_of(running.pid)


def members_of(session: int) -> list[int]:
    """Every process of a session that has not ended."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, its_session = stat.read_text(encoding="utf-8").rpartition(")")[2].split()[:4]
        except OSError:  # it has ended
            continue
        if int(its_session) == session and state != "Z":
            found.append(int(stat.parent.name))
    return found


def workers(running: Running) -> list[int]:
    """The worker processes of a command."""

    def is_worker(pid: int) -> bool:
        try:
            return b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()
        except OSError:
            return False

    return [pid for pid in members(running) if is_worker(pid)]


def send(number: signal.Signals, pids: list[int]) -> None:
    """Signal them all, but for those that have ended."""
    for pid in pids:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            pass
