"""Tasks in worker processes that are reused, may fail or be killed one by one, and stop cleanly."""

import multiprocessing
import os
import signal
import threading
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple

__all__ = ["Failure", "run_tasks"]

PATIENCE_SECONDS = 60.0  # for a worker that was asked to stop, until it has saved its work


class Failure(NamedTuple):
    """What became of a task that raised, or whose worker died."""

    message: str
    """One line."""
    details: str
    """The traceback, or nothing."""


def run_tasks(
    function: Callable[[Any], Any], tasks: Sequence[Any], *, workers: int, threads: int = 1
) -> Generator[tuple[int, Any]]:
    """Yield (index of the task, what function(task) returned or its `Failure`), in the order they finish.

    A task that raises, or whose worker is killed, is a `Failure`; the others go on. When the iteration is
    left early (Ctrl-C, an exception, `close`), each busy worker gets SIGTERM once and may save its work.
    Workers whose parent dies get it too.

    Args:
        function: a function of a module's top level, which spawned processes can import.
        tasks: its arguments; they and the results must be picklable.
        workers: processes; 0 runs the tasks here, one after the other.
        threads: of torch in each worker.

    Raises:
        ValueError: workers or threads outside their range.
    """
    if workers < 0 or threads < 1:
        raise ValueError(f"workers is {workers} and threads {threads}: give workers >= 0 and threads >= 1")
    if workers == 0:
        for i, task in enumerate(tasks):
            yield i, _attempt(function, task)
        return
    todo = deque(enumerate(tasks))
    pool: list[_Worker] = []
    try:
        for _ in range(min(workers, len(tasks))):
            pool.append(_Worker(function, threads))
            pool[-1].give(*todo.popleft())
        while pool:
            ready = wait([worker.connection for worker in pool])
            for worker in [worker for worker in pool if worker.connection in ready]:
                done = worker.task, worker.reply()
                if not worker.alive:
                    pool.remove(worker)
                    if todo:
                        worker = _Worker(function, threads)
                        pool.append(worker)
                if todo:
                    worker.give(*todo.popleft())
                elif worker.alive:
                    pool.remove(worker)
                    worker.dismiss()
                yield done
    finally:
        for worker in pool:
            worker.process.terminate()
        for worker in pool:
            worker.dismiss()


class _Worker:
    """A process and the task that it has."""

    def __init__(self, function: Callable[[Any], Any], threads: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, function, threads))
        with _interrupt_ignored():
            self.process.start()
        theirs.close()
        self.task, self.alive = -1, True

    def give(self, index: int, task: Any) -> None:
        self.task = index
        try:
            self.connection.send(task)
        except BrokenPipeError:
            pass  # it has died: `reply` says so

    def reply(self) -> Any:
        """What the task came to; the worker may be found dead."""
        try:
            return self.connection.recv()
        except (EOFError, ConnectionResetError):
            self.process.join()
            self.alive = False
            code = self.process.exitcode or 0
            how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
            return Failure(f"its worker process {how}", "")

    def dismiss(self) -> None:
        """Wait for its end."""
        self.connection.close()
        self.process.join(PATIENCE_SECONDS)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()


def _attempt(function: Callable[[Any], Any], task: Any) -> Any:
    try:
        return function(task)
    except Exception as error:
        first = (str(error).strip() or "no message").splitlines()[0]
        return Failure(f"{type(error).__name__}: {first}", traceback.format_exc())


def _serve(connection: Connection, function: Callable[[Any], Any], threads: int) -> None:
    """Life of a worker process."""
    import torch

    if hasattr(os, "setpgrp"):
        os.setpgrp()  # Ctrl-C is for the parent, which then asks its workers to stop
    threading.Thread(target=_stop_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    while True:
        try:
            task = connection.recv()
            connection.send(_attempt(function, task))
        except (EOFError, ConnectionError):  # the parent has gone, or has no use for it any more
            return


def _stop_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)


@contextmanager
def _interrupt_ignored() -> Iterator[None]:
    """A process started in here ignores SIGINT from its first moment on."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    old = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, old)
