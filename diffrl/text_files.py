"""Text files: always UTF-8, written whole or not at all, with errors that name the file and the remedy."""

import csv
import errno
import io
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from diffrl.errors import FileError, InputError

__all__ = [
    *("file_errors", "new_folder", "read_json", "read_text", "remedy"),
    *("sync_folder", "write_atomically", "write_csv"),
]

REMEDIES = {
    errno.ENOSPC: "make room on the disk",
    errno.EDQUOT: "make room within your quota",
    errno.EACCES: "see to its permissions, or choose another place",
    errno.EPERM: "see to its permissions, or choose another place",
    errno.EROFS: "this place is read-only: choose another",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ENOENT: "it is not there, or was removed meanwhile",
    errno.EEXIST: "a file is where a folder is to be: choose another place, or move it away",
    errno.ENOTDIR: "a part of its path is a file: choose another place",
    errno.EISDIR: "it is a folder: give a file",
    errno.EMFILE: "too many files are open: raise the limit (ulimit -n)",
}


@contextmanager
def file_errors(path: Path | str, what: str = "read") -> Iterator[None]:
    """Turn an error of the operating system into a `FileError` that names the file and the remedy.

    Args:
        path: the file, or the folder that holds it.
        what: what is done to it: "read" or "written".
    """
    try:
        yield
    except FileError:
        raise
    except OSError as error:
        raise FileError(f"{path} cannot be {what} ({error.strerror or error}): {remedy(error)}") from error


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to write into, made where it is missing, in which nothing is written over; empty again after an error.

    Raises:
        InputError: it holds something already, or is a file.
        FileError: it cannot be written.
    """
    with file_errors(path, "written"):
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise InputError(f"{path} holds something already: give a new folder")
        path.mkdir(parents=True, exist_ok=True)
        try:
            yield path
        except BaseException:
            shutil.rmtree(path, ignore_errors=True)  # half of it would be in the way of the next try
            with suppress(OSError):
                path.mkdir(exist_ok=True)
            raise


def remedy(error: OSError) -> str:
    """What to do about an error of the operating system."""
    return REMEDIES.get(error.errno or 0, "see to the disk or the network, and try again")


def read_text(path: Path | str) -> str:
    """The text of a file in UTF-8, without a byte-order mark.

    Raises:
        FileError: it cannot be read, or is no text in UTF-8.
    """
    with file_errors(path):
        raw = Path(path).read_bytes()
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise FileError(f"{path} is not a text file in UTF-8 (byte {error.start}): convert it") from error


def read_json(path: Path | str, kind: type = dict) -> Any:
    """What a JSON file holds.

    Args:
        path: the file.
        kind: what it must hold: dict or list.

    Raises:
        FileError: it cannot be read, or holds something else.
    """
    try:
        found = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise FileError(
            f"{path} is damaged: it holds no JSON ({error}): restore it from a copy, or remove it"
        ) from error
    if not isinstance(found, kind):
        raise FileError(
            f"{path} is damaged: it holds a {type(found).__name__} and no {kind.__name__}: restore it from a copy, "
            "or remove it"
        )
    return found


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write bytes, or a text in UTF-8, so that a crash leaves the old file or the new one.

    Raises:
        FileError: it cannot be written; the old one is as it was.
    """
    temporary = path.with_name(path.name + ".tmp")
    with file_errors(path, "written"):
        if isinstance(content, str):
            # names of files keep their bytes, where the locale could not read them
            content = content.encode("utf-8", errors="surrogateescape")
        try:
            temporary.write_bytes(content)
            os.replace(temporary, path)
        except OSError:
            with suppress(OSError):
                temporary.unlink()
            raise


def sync_folder(folder: Path) -> None:
    """Force the names in a folder to the disk, where the system can (Windows cannot open folders)."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Write a table as `write_atomically` does; what a row lacks is left empty.

    Raises:
        FileError: it cannot be written.
    """
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, restval="")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, text.getvalue())
