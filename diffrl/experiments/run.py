"""What every run from a configuration shares: settings, table and logger, interruption, one loop to its end."""

import signal
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from diffrl.devices import usable_device
from diffrl.errors import InputError, of_group
from diffrl.experiments.run_log import RunLog, check_log
from diffrl.ranks import FIRST_TIMEOUT, RANK_TIMEOUT
from diffrl.registry import as_tuples
from diffrl.shell_words import setting
from diffrl.training.checkpoints import tidy
from diffrl.training.distributed import Ranks, joined
from diffrl.training.identity import ACCEPT, identity_of
from diffrl.training.loop import Loop, Unfinished
from diffrl.training.runs import RunFolder, RunFolderError
from diffrl.training.table import Table

__all__ = [
    "AUTOCAST",
    "Interrupted",
    "Job",
    "check_settings",
    "interruptible",
    "left_when",
    "made_of",
    "processes",
    "shown",
    "started_folder",
]

AUTOCAST = {"float32": None, "float64": None, "bfloat16": torch.bfloat16, "float16": torch.float16}
Made = TypeVar("Made")


class Interrupted(Exception):
    """A run was asked to stop by SIGINT or SIGTERM; it is saved."""


class Job(ABC):
    """One loop of a run.

    Args:
        config: of the run.
        name: of the folder of its checkpoints.
        loop: what runs.
    """

    count: ClassVar[str]
    """Column of the table that counts the loop's steps."""

    def __init__(self, config: Mapping[str, Any], name: str, loop: Loop) -> None:
        self.config, self.name, self.loop = config, name, loop
        self._log: RunLog | None = None
        self.loop.identity = {**loop.identity, **identity_of(config)}

    @property
    @abstractmethod
    def columns(self) -> tuple[str, ...]:
        """Names of the columns of metrics.csv."""

    @property
    def evaluated(self) -> Sequence[nn.Module]:
        """Networks whose calls an evaluation consists of: where one is asked for while the run is to stop, it ends."""
        return ()

    @property
    def tag(self) -> dict[str, str]:
        """Columns that tell this job's rows from those of others in the same table."""
        return {}

    @abstractmethod
    def evaluate(self) -> dict[str, float]:
        """Evaluate what the loop has made so far; its figures."""

    def finished(self, row: dict[str, float]) -> str | None:
        """Why to end the loop early, after a row with an evaluation; None to go on."""
        return None

    def table(self, folder: RunFolder) -> Table:
        """The run's metrics.csv."""
        return Table(folder.path / "metrics.csv", self.columns, tuple(self.tag), self.former)

    @property
    def former(self) -> dict[str, str]:
        """What columns are called now, by the names that they have in tables of earlier versions."""
        return {}

    def compare(self) -> None:
        """Refuse a run to resume whose data or methods are not what they were.

        Raises:
            RunChanged: see `Loop.compare`.
        """
        if self.config["resume"] is not None:
            self.loop.folder = RunFolder(Path(self.config["resume"])).checkpoints(self.name)
            self.loop.compare(**self._words())
            self.loop.folder = None

    def tidy(self, folder: RunFolder) -> None:
        """Remove what a kill left among the checkpoints of a job that is done."""
        if self.loop.ranks.first:
            tidy(folder.checkpoints(self.name), self.loop.length.keep_checkpoints)

    def _words(self) -> dict[str, bool]:
        extend, accepted = self.config.get("extend") is not None, bool(self.config.get(ACCEPT, False))
        return {"extend": extend, ACCEPT: accepted}

    def resume(self, folder: RunFolder) -> None:
        """Continue from the newest checkpoint; rows that will be written again are dropped from the table."""
        self.loop.folder = folder.checkpoints(self.name)
        self.loop.resume(**self._words())
        if not self.loop.ranks.first:
            return
        written = self.loop.step > 0 and self.loop.due is None
        done = range(self.loop.step + written)

        def wanted(row: dict[str, str]) -> bool:
            return (
                any(row.get(k) != v for k, v in self.tag.items()) or float(row.get(self.count) or -1) in done
            )

        self.table(folder).keep(wanted)

    def log(self, folder: RunFolder) -> RunLog:
        """The run's logger, which is opened once; of several processes the first has one."""
        if self._log is None:
            kind = self.config["logger"] if self.loop.ranks.first else "csv"
            self._log = RunLog(kind, str(folder.path), self.name)
        return self._log

    def run_loop(self, folder: RunFolder, interrupted: Callable[[], bool], progress: bool) -> None:
        """Run the loop to its end.

        Raises:
            Interrupted: it was asked to stop, and is saved.
        """
        table, log = self.table(folder), self.log(folder)

        def report(row: dict[str, float]) -> None:
            if not folder.config_file.exists():  # a checkpoint would make the folder again, without it
                raise RunFolderError(f"{folder.path} was removed while the run went on: start it again")
            table.append({**self.tag, **row})
            for key, value in row.items():
                log.scalar("/".join([*self.tag.values(), key]), value, int(row[self.count]))

        def evaluate(loop: Loop) -> dict[str, float]:
            with left_when(interrupted, self.evaluated):
                return self.evaluate()

        ended = self.loop.fit(
            report=report,
            evaluate=evaluate,
            stop=interrupted,
            finished=self.finished,
            progress=progress,
        )
        if not ended:
            place = " of ".join([f"{self.loop.step_name} {self.loop.step}", *self.tag.values()])
            why = "what started the processes has ended: " if self.loop.ranks.abandoned else ""
            raise Interrupted(
                f"{why}stopped after {place}, and saved; continue with {setting('resume', folder.path)}"
            )


def processes(config: Mapping[str, Any]) -> AbstractContextManager[Ranks]:
    """The processes of the run, as `joined` has them meet; a configuration of Python may leave out their times."""
    given = (config.get("rank_timeout", RANK_TIMEOUT), config.get("first_timeout", FIRST_TIMEOUT))
    return joined(config["device"], *given)


@contextmanager
def left_when(asked: Callable[[], bool], networks: Sequence[nn.Module]) -> Iterator[None]:
    """Within, a call of one of the networks raises `Unfinished` where the run was asked to stop."""

    def leave(*_: object) -> None:
        if asked():
            raise Unfinished

    hooks = [network.register_forward_pre_hook(leave) for network in networks]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def started_folder(config: Mapping[str, Any], ranks: Ranks, label: str | None = None) -> Iterator[RunFolder]:
    """The run's folder, which the first process holds as its only writer; arguments as of `RunFolder.start`."""
    with ExitStack() as held:
        yield ranks.from_first(lambda: held.enter_context(RunFolder.start(config, label)), "the run's folder")


def check_settings(config: Mapping[str, Any]) -> None:
    """Refuse settings that are of the right type, but cannot work."""
    if config["dtype"] not in AUTOCAST:
        raise InputError(f"dtype is {config['dtype']!r}: give {', '.join(AUTOCAST)}")
    check_log(config["logger"])
    usable_device(config["device"])


def made_of(group: str, make: Callable[..., Made], config: Mapping[str, Any], **more: Any) -> Made:
    """What a group of one constructor describes; errors name an option as it is typed.

    Args:
        group: the config group.
        make: the constructor.
        config: of the run.
        more: what is not configured.
    """
    options = as_tuples(config[group])
    with of_group(group, options):
        return make(**more, **options)


@contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Turn SIGINT and SIGTERM into a flag, so that a run stops between two steps.

    A second SIGINT stops at once. SIGTERM may come any number of times: batch systems send it to each process of a
    group, and a comparison sends it to its workers once more.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False  # only the main thread hears signals
        return
    seen: list[int] = []

    def remember(number: int, frame: FrameType | None) -> None:
        if seen and number == signal.SIGINT:
            raise KeyboardInterrupt
        seen.append(number)

    old = {number: signal.signal(number, remember) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(seen)
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def shown(x: Tensor) -> Tensor:
    """The samples kept for figures: the first 64 images, or the first 1,000 points."""
    return x[: 64 if x.ndim == 4 else 1000].float()
