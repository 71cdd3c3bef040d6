"""Batches that worker processes read, decode and augment ahead of who uses them, by PyTorch's DataLoader."""

import atexit
import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.context import SpawnContext, SpawnProcess
from typing import Any, cast

import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from diffrl.data.augmentation import transformed
from diffrl.data.dataset import Rows
from diffrl.errors import DiffrlError

__all__ = ["Order", "ReadAhead", "WorkerLost", "made"]

Order = tuple[Tensor, Tensor | None]
"""Numbers of a batch's rows, int64 [n], and the augmentation of each, see `draw_augmentation`: [n, 8], or None."""

LOST = "DataLoader worker"  # how torch begins to tell of one that has died


class WorkerLost(DiffrlError, RuntimeError):
    """A process that reads batches ahead has died."""


def made(rows: Rows | Tensor, order: Order) -> Tensor:
    """The batch of an order: float32 [n, *E].

    Raises:
        DataError: a sample cannot be used.
    """
    i, a = order
    return rows[i] if a is None else transformed(rows[i], a)


class ReadAhead:
    """Yields the batch of each order, in their order: `made(rows, order)`, whichever process makes it.

    A worker makes a whole batch, and two batches a worker are made ahead. All that is random is in the orders, so that
    batches are the same for every number of workers. Workers are started afresh, hear no SIGINT and no SIGTERM, which
    are for the process that trains, and end when it does.

    Args:
        rows: what is read; it is sent to each worker, by pickle.
        workers: processes, at least 1.
        orders: of the batches, which are asked for ahead, too.

    Raises:
        DataError: from the iteration, as `made`, in place of the batch that it is about.
        WorkerLost: from the iteration, some seconds after a worker has died.
    """

    def __init__(self, rows: Rows, workers: int, orders: Iterable[Order]) -> None:
        self._context = _Recording()
        loader: DataLoader[Any] = DataLoader(
            _Reader(rows),
            batch_size=None,
            sampler=cast(Any, _Plain(orders)),
            num_workers=workers,
            collate_fn=_as_it_is,
            multiprocessing_context=self._context,
            generator=torch.Generator(),  # or it would draw from the global one
        )
        with _undisturbed():
            self._batches: Iterator[Any] | None = iter(loader)
        atexit.register(
            self.close
        )  # the last one registered is the first one called: others would wait for them

    def __iter__(self) -> Iterator[Tensor]:
        return self

    def __next__(self) -> Tensor:
        if self._batches is None:
            raise StopIteration
        try:
            found = next(self._batches)
        except RuntimeError as error:
            if not str(error).startswith(LOST):
                raise
            raise WorkerLost(
                f"a process of data.workers has died ({str(error).splitlines()[0].removeprefix(LOST).strip()}), most "
                "often for want of memory or of room in /dev/shm: lower data.workers or trainer.batch_size, and go on "
                "from the last checkpoint"
            ) from error
        if isinstance(found, DiffrlError):
            raise found
        return cast(Tensor, found)

    def close(self) -> None:
        """End the workers."""
        self._batches = None  # torch ends them with the last reference, which a traceback may hold on to
        for worker in self._context.started:
            worker.kill()
            worker.join()
        atexit.unregister(self.close)


class _Recording(SpawnContext):
    """Processes that are started afresh, and a list of them."""

    def __init__(self) -> None:
        super().__init__()
        self.started: list[SpawnProcess] = []

    def Process(self, *args: Any, **kwargs: Any) -> SpawnProcess:  # type: ignore[override]  # noqa: N802
        """A process, as the context makes them."""
        made = SpawnProcess(*args, **kwargs)
        self.started.append(made)
        return made


@dataclass(frozen=True)
class _Reader(Dataset[Any]):
    """What a worker has."""

    rows: Rows

    def __getitem__(self, order: tuple[NDArray[Any], NDArray[Any] | None]) -> Tensor | DiffrlError:
        i, a = order
        try:
            return made(self.rows, (torch.from_numpy(i), None if a is None else torch.from_numpy(a)))
        except DiffrlError as error:  # torch would send its traceback as its text
            return error


@dataclass(frozen=True)
class _Plain:
    """Orders as arrays, which need no shared memory on their way."""

    orders: Iterable[Order]

    def __iter__(self) -> Iterator[tuple[NDArray[Any], NDArray[Any] | None]]:
        for i, a in self.orders:
            yield i.numpy(), None if a is None else a.numpy()


def _as_it_is(batch: Any) -> Any:
    return batch


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Processes started in here hear no SIGINT and no SIGTERM, and their death interrupts nothing in this one.

    torch's handler of SIGCHLD would raise between any two lines; a loss is told where a batch is waited for.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "pthread_sigmask"):
        yield
        return
    resource_tracker.ensure_running()  # it unblocks both signals as it starts
    handler = signal.getsignal(signal.SIGCHLD)
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        signal.signal(signal.SIGCHLD, handler)
