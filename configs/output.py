"""What a command prints reaches any terminal, file or pipe; no torch here, so that quick commands stay quick."""

import codecs
import os
import sys
from io import TextIOWrapper

__all__ = ["leave_quietly", "write_utf8"]


def _escape(error: UnicodeError) -> tuple[str | bytes, int]:
    """Bytes of a name that the locale could not read as they are, other letters by their code."""
    try:
        return codecs.lookup_error("surrogateescape")(error)
    except UnicodeError:
        return codecs.backslashreplace_errors(error)


def write_utf8() -> None:
    """Let no letter stop a command: files and pipes get UTF-8; a terminal of few letters gets the code of others."""
    codecs.register_error("diffrl", _escape)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(encoding=None if stream.isatty() else "utf-8", errors="diffrl")


def leave_quietly() -> None:
    """End where the reader of the output has left, as `head` does, with status 1."""
    # else Python tries once more as it ends
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(1)
