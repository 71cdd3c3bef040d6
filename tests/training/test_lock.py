"""One writer a folder: the second is told the first, and a lock ends with its process."""

import errno
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from diffrl.errors import FileError
from diffrl.training import lock
from diffrl.training.lock import LOCK, FolderInUse, folder_lock
from tests.kit.paths import ROOT
from tests.kit.processes import wait_until

HOLDS = """
import sys, time
from pathlib import Path
from diffrl.training.lock import folder_lock
with folder_lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def other_process(folder: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-W", "ignore", "-c", HOLDS, str(folder)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def test_the_second_is_told_process_and_host_and_a_lock_dies_with_its_process(tmp_path: Path) -> None:
    with other_process(tmp_path) as first:
        with pytest.raises(FolderInUse) as refused, folder_lock(tmp_path):
            pytest.fail("two writers")
        told = str(refused.value)
        assert f"process {first.pid} on {socket.gethostname()} (since " in told and "\n" not in told
        first.send_signal(signal.SIGKILL)
        first.wait()
        with folder_lock(tmp_path):  # nothing to clean up by hand
            assert str(os.getpid()) in (tmp_path / LOCK).read_text(encoding="utf-8")


def test_the_same_process_is_refused_too_and_may_come_again(tmp_path: Path) -> None:
    folder = tmp_path / "made" / "now"
    with folder_lock(folder):
        with pytest.raises(FolderInUse, match=f"process {os.getpid()} "), folder_lock(folder):
            pytest.fail("two writers")
        with folder_lock(tmp_path):  # another folder
            pass
    with folder_lock(folder):
        pass


def test_workers_do_not_inherit_it(tmp_path: Path) -> None:
    with folder_lock(tmp_path):
        worker = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(600,), daemon=True)
        worker.start()
        child = subprocess.Popen(
            [sys.executable, "-c", "import time; time.sleep(600)"], close_fds=False, text=True
        )

    def is_free() -> bool:
        try:
            with folder_lock(tmp_path):
                return True
        except FolderInUse:
            return False

    try:
        wait_until(is_free, child, 20)  # both share it for the instant before they begin their programs
        assert worker.is_alive() and child.poll() is None
    finally:
        for process in (worker, child):
            process.kill()
        child.wait()
        worker.join()


def test_an_owner_that_left_no_word_is_another_process(tmp_path: Path) -> None:
    with folder_lock(tmp_path):
        (tmp_path / LOCK).write_text("{", encoding="utf-8")
        with pytest.raises(FolderInUse, match="is being written by another process"), folder_lock(tmp_path):
            pytest.fail("two writers")


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(
        FileError, match=r"\.lock cannot be written \(.*\): choose another place|a part of its path"
    ):
        with folder_lock(tmp_path / "file" / "inside"):
            pytest.fail("there is no folder")


def test_where_files_cannot_be_locked_it_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lock.fcntl, "flock", refuse)
    with pytest.warns(RuntimeWarning, match="see to it that one process writes there"), folder_lock(tmp_path):
        pass
