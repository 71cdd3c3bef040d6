"""Commands in processes of their own, which are forked from one that has imported what all of them need."""

import json
import os
import pkgutil
import runpy
import subprocess
import sys
import tempfile
from importlib import import_module
from pathlib import Path
from typing import NamedTuple, NoReturn

from tests.kit.paths import ROOT


class Ended(NamedTuple):
    """How a command ended."""

    status: int
    out: str
    err: str


class Shell:
    """Runs ``python -W ignore ...`` with words, as a shell would, but for the seconds that imports take.

    Args:
        environment: variables that differ from those of this process.
    """

    def __init__(self, **environment: str) -> None:
        one_thread = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        self._environment = {**os.environ, "PYTHONPATH": str(ROOT), **one_thread, **environment}
        self._server: subprocess.Popen[str] | None = None

    def run(self, *words: str, folder: Path, path: tuple[Path, ...] = ()) -> Ended:
        """A command, ``-m MODULE ...`` or ``FILE ...``, run in a folder, with more places to import from."""
        if self._server is None:
            self._server = subprocess.Popen(
                [sys.executable, "-W", "ignore", "-m", "tests.kit.shell"],
                cwd=ROOT, env=self._environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            )  # fmt: skip
        assert self._server.stdin is not None and self._server.stdout is not None
        with tempfile.TemporaryDirectory() as place:
            asked = [[*words], [str(folder)], [*map(str, path)], [place]]
            self._server.stdin.write(json.dumps([[*map(as_bytes, part)] for part in asked]) + "\n")
            self._server.stdin.flush()
            status = int(self._server.stdout.readline())
            out, err = ((Path(place) / name).read_text(encoding="utf-8") for name in ("out", "err"))
        return Ended(status, out, err)

    def __call__(self, *words: str, folder: Path, ok: bool = True, path: tuple[Path, ...] = ()) -> str:
        """What a command printed; of one that is to fail, its last line of errors."""
        ended = self.run(*words, folder=folder, path=path)
        assert (ended.status == 0) == ok, ended.out + ended.err
        return ended.out if ok else ended.err.strip().splitlines()[-1]

    def close(self) -> None:
        if self._server is not None:
            self._server.communicate()
            self._server = None


def as_bytes(word: str) -> str:
    """A word as the bytes that a process is given, a letter for each."""
    return os.fsencode(word).decode("latin-1")


def as_word(letters: str) -> str:
    """What a process of this locale reads in them."""
    return os.fsdecode(letters.encode("latin-1"))


def serve() -> None:
    """Fork for each command that is asked for, and say how it ended."""
    import diffrl

    for module in pkgutil.walk_packages(diffrl.__path__, "diffrl."):
        if not module.name.endswith("__main__"):
            import_module(module.name)
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            words, (folder,), path, (place,) = ([*map(as_word, part)] for part in json.loads(line))
            become(words, folder, path, place)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def become(words: list[str], folder: str, path: list[str], place: str) -> NoReturn:
    """Be the command, in its folder, until its end."""
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(os.path.join(place, name), os.O_WRONLY | os.O_CREAT), number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.chdir(folder)
    module = words[1] if words[0] == "-m" else None
    sys.argv = [words[0], *words[1:]] if module is None else [module, *words[2:]]
    sys.path[:1] = [folder if module is not None else str(Path(words[0]).parent), *path]
    if module is not None:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(words[0], run_name="__main__")
    sys.exit(0)


if __name__ == "__main__":
    serve()
