"""One writer a folder: a lock of the operating system, which ends with its process. Readers need none."""

import errno
import json
import os
import shlex
import socket
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import IO

from diffrl.errors import DiffrlError
from diffrl.text_files import file_errors

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

__all__ = ["LOCK", "FolderInUse", "RunFolderError", "folder_lock"]

LOCK = ".lock"
"""Name of the file that is locked; it says who wrote last, and may lie there for good."""

_FAR = 1 << 30  # where Windows locks a byte: others can read the text before it
_TAKEN = (errno.EACCES, errno.EAGAIN, errno.EDEADLK)
_UNKNOWN = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


class RunFolderError(DiffrlError, RuntimeError):
    """A folder cannot be used as asked."""


class FolderInUse(RunFolderError):
    """Another process writes to the folder."""


@contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Hold a folder as its only writer. Processes that are started meanwhile do not hold it too.

    Args:
        folder: made where missing.

    Raises:
        FolderInUse: another process holds it, or this one already does; the error names process and host.
        FileError: the folder cannot be written to.
    """
    path = Path(folder) / LOCK
    with file_errors(path, "written"):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a+b")  # Python's descriptors are closed in processes that are started
    with file:
        if not _lock(file, path):
            raise FolderInUse(
                f"{folder} is being written by {_owner(file)}: wait for it, or choose another folder"
            )
        with file_errors(path, "written"):
            file.truncate(0)
            file.write(json.dumps(_about_me(), ensure_ascii=False).encode(errors="surrogateescape"))
            file.flush()
        yield


def _lock(file: IO[bytes], path: Path) -> bool:
    """Whether the lock was free, and is taken now."""
    try:
        if sys.platform == "win32":
            os.lseek(file.fileno(), _FAR, os.SEEK_SET)
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _TAKEN:
            return False
        if error.errno not in _UNKNOWN:
            with file_errors(path, "locked"):
                raise
        warnings.warn(
            f"{path.parent} lies where files cannot be locked: see to it that one process writes there",
            RuntimeWarning,
            stacklevel=4,
        )
    return True


def _about_me() -> dict[str, str | int]:
    return {
        "process": os.getpid(),
        "host": socket.gethostname(),
        "since": datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": shlex.join(sys.argv),
    }


def _owner(file: IO[bytes]) -> str:
    """Who holds the lock, as far as its file tells."""
    try:
        file.seek(0)
        told = json.loads(file.read())
        return f"process {told['process']} on {told['host']} (since {told['since']}: {told['command']})"
    except (OSError, ValueError, TypeError, KeyError):
        return "another process"
