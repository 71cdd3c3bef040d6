"""Workers: processes or threads that do one task after the other, may fail one by one, and stop cleanly."""

import multiprocessing
import os
import pickle
import signal
import threading
import time
import traceback
import weakref
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from multiprocessing.connection import Connection, wait
from queue import SimpleQueue
from typing import Any, Literal, NamedTuple

from diffrl.errors import InputError
from diffrl.registry import import_named, user_modules

__all__ = ["Failure", "WorkerPool", "attempt", "run_tasks"]

Function = Callable[[Any], Any]

PATIENCE_SECONDS = 60.0  # for a process that was asked to stop, until it has saved its work


class Failure(NamedTuple):
    """What stands for the result of a task that raised, took too long, or lost its worker."""

    message: str
    """What went wrong, in one line."""
    details: str = ""
    """The traceback, or nothing."""
    hopeless: bool = False
    """Whether another attempt would fail in the same way."""
    cause: Exception | None = None
    """What the task raised, if it ran in this process."""


def attempt(function: Function, task: Any) -> Any:
    """Return ``function(task)``, or a `Failure` if it raises."""
    try:
        return function(task)
    except Exception as error:
        first = (str(error).strip() or "no message").splitlines()[0]
        return Failure(f"{type(error).__name__}: {first}", traceback.format_exc(), cause=error)


def run_tasks(
    function: Function, tasks: Sequence[Any], *, workers: int, threads: int = 1
) -> Generator[tuple[int, Any]]:
    """Yield (index of the task, what function(task) returned or its `Failure`), in the order they finish.

    A task that raises, or whose process is killed, is a `Failure`; the others go on. When the iteration is left
    early (Ctrl-C, an exception, `close`), each busy process gets SIGTERM once and may save its work. Processes whose
    parent dies get it too.

    Args:
        function: a function of a module's top level, which other processes can import.
        tasks: its arguments; they and the results must be picklable.
        workers: processes; 0 runs the tasks here, one after the other.
        threads: of torch in each process.

    Raises:
        ValueError: workers or threads outside their range.
    """
    if workers < 0 or threads < 1:
        raise InputError(f"workers is {workers} and threads {threads}: give workers >= 0 and threads >= 1")
    if workers == 0:
        for index, task in enumerate(tasks):
            yield index, attempt(function, task)
        return
    pool = WorkerPool(function, workers=workers, threads=threads, patience=PATIENCE_SECONDS)
    try:
        yield from pool.map(tasks)
    finally:
        pool.close()


class WorkerPool:
    """Workers that call one function and stay between calls; they start when they are first needed.

    Each process first imports the modules in which the user registers methods, and works with a copy of the
    function. It never sees Ctrl-C, and ends when this process does.

    Args:
        function: what is called with each task. Processes need it picklable, and tasks and results too.
        workers: how many, at least 1.
        backend: "process" or "thread".
        threads: of torch in each process.
        timeout: seconds that a task may take; None: any time. A process that exceeds them is killed. A thread cannot
            be stopped: it is abandoned, and its result dropped.
        patience: seconds that a process has to save its work when it is stopped in the middle of a task. With 0 it is
            killed at once; it cannot start processes of its own then.

    Raises:
        ValueError: the function cannot be sent to a process.
    """

    def __init__(
        self,
        function: Function,
        *,
        workers: int,
        backend: Literal["process", "thread"] = "process",
        threads: int = 1,
        timeout: float | None = None,
        patience: float = 0.0,
    ) -> None:
        self._copy = partial(
            WorkerPool,
            function,
            workers=workers,
            backend=backend,
            threads=threads,
            timeout=timeout,
            patience=patience,
        )
        self._workers, self._timeout, self._patience = workers, timeout, patience
        self._start: Callable[[], _Worker] = partial(_ThreadWorker, function)
        if backend == "process":
            self._start = partial(_ProcessWorker, _pickled(function), threads, daemon=not patience)
        self._crew: list[_Worker] = []
        weakref.finalize(self, _end, self._crew, patience)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[()]]:
        return self._copy, ()  # a copy has workers of its own

    def close(self) -> None:
        """End the workers; the next call starts new ones."""
        _end(self._crew, self._patience)

    def map(self, tasks: Sequence[Any]) -> Generator[tuple[int, Any]]:
        """Yield (index of the task, what the function returned or a `Failure`), in the order they finish.

        When the iteration is left early, the workers that are busy are stopped.
        """
        todo = deque(enumerate(tasks))
        try:
            while todo or self._busy():
                self._hand_out(todo)
                for worker in self._with_news():
                    index, was_ready = worker.index, worker.ready
                    answer = worker.receive()
                    if not worker.alive:
                        self._crew.remove(worker)
                        if not was_ready and todo:  # it never began: the task that was waiting for it fails
                            index = todo.popleft()[0]
                    if index is not None:
                        self._hand_out(todo)  # before the caller takes its time
                        yield index, answer
                now = time.monotonic()
                for worker in [worker for worker in self._busy() if worker.deadline <= now]:
                    index = worker.index
                    self._dismiss([worker], patience=0.0)
                    assert index is not None
                    yield index, Failure(f"it took longer than {self._timeout:g} s")
        finally:
            self._dismiss(self._busy(), self._patience)  # or their answers would come in the next call

    def _busy(self) -> list["_Worker"]:
        return [worker for worker in self._crew if worker.index is not None]

    def _hand_out(self, todo: deque[tuple[int, Any]]) -> None:
        """Start as many workers as there is work for, and give each that is free a task."""
        while len(self._crew) < min(self._workers, len(todo) + len(self._busy())):
            self._crew.append(self._start())
        for worker in self._crew:
            if todo and worker.ready and worker.index is None:
                worker.index, task = todo.popleft()
                worker.deadline = time.monotonic() + (
                    float("inf") if self._timeout is None else self._timeout
                )
                worker.submit(task)

    def _with_news(self) -> list["_Worker"]:
        """Wait for workers that have something to say, no longer than the next deadline."""
        nearest = min((worker.deadline for worker in self._busy()), default=float("inf"))
        seconds = None if nearest == float("inf") else max(0.0, nearest - time.monotonic())
        talking = wait([worker.channel for worker in self._crew], seconds)
        return [worker for worker in self._crew if worker.channel in talking]

    def _dismiss(self, workers: list["_Worker"], patience: float) -> None:
        self._crew[:] = [worker for worker in self._crew if worker not in workers]
        _end(workers, patience)


def _end(workers: list["_Worker"], patience: float) -> None:
    """Stop all of them, then wait for each."""
    for worker in workers:
        worker.stop()
    while workers:
        workers[-1].join(patience)
        workers.pop()


class _Worker(ABC):
    """A worker and the task that it has."""

    channel: Connection  # readable when the worker has something to say
    ready = False  # whether it takes tasks
    alive = True
    index: int | None = None  # of its task; None: it has none
    deadline = float("inf")  # of its task

    @abstractmethod
    def submit(self, task: Any) -> None:
        """Give it a task."""

    @abstractmethod
    def receive(self) -> Any:
        """What it says: the result of its task, or a `Failure`; None from a process that has become ready."""

    @abstractmethod
    def stop(self) -> None:
        """Ask it to end."""

    def join(self, patience: float) -> None:  # noqa: B027 (a thread cannot be waited for)
        """Wait for its end, and enforce it after `patience` seconds."""


class _ThreadWorker(_Worker):
    """A thread. It can be abandoned, not stopped."""

    def __init__(self, function: Function) -> None:
        self.channel, end = multiprocessing.Pipe(duplex=False)
        self._inbox: SimpleQueue[tuple[Any] | None] = SimpleQueue()
        self._outbox: SimpleQueue[Any] = SimpleQueue()
        arguments = (function, self._inbox, self._outbox, end)
        threading.Thread(target=self._serve, args=arguments, daemon=True).start()
        self.ready = True

    @staticmethod
    def _serve(function: Function, inbox: SimpleQueue, outbox: SimpleQueue, end: Connection) -> None:
        while (given := inbox.get()) is not None:
            outbox.put(attempt(function, *given))
            try:
                end.send_bytes(b"done")
            except OSError:  # it was abandoned
                return

    def submit(self, task: Any) -> None:
        self._inbox.put((task,))

    def receive(self) -> Any:
        self.channel.recv_bytes()
        self.index = None
        return self._outbox.get()

    def stop(self) -> None:
        self._inbox.put(None)
        self.channel.close()


class _ProcessWorker(_Worker):
    """A process that was started afresh, not forked."""

    def __init__(self, function: bytes, threads: int, *, daemon: bool) -> None:
        context = multiprocessing.get_context("spawn")
        self.channel, end = context.Pipe()
        arguments = (end, function, threads, user_modules())
        self.process = context.Process(target=_serve, args=arguments, daemon=daemon)
        with _interrupt_ignored():
            self.process.start()
        end.close()

    def submit(self, task: Any) -> None:
        message = pickle.dumps(task)
        try:
            self.channel.send_bytes(message)
        except OSError:
            pass  # it has died: `receive` says so

    def receive(self) -> Any:
        was_ready, self.ready, self.index = self.ready, True, None
        try:
            answer = pickle.loads(self.channel.recv_bytes())
        except (EOFError, OSError):
            self.process.join()
            code = self.process.exitcode or 0
            how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
            answer = Failure(f"its worker process {how}")
            if not was_ready:
                answer = Failure(
                    f"its worker process {how} before it was ready; a script that uses processes must keep its work "
                    "under `if __name__ == '__main__':`",
                    hopeless=True,
                )
            self._bury()
        else:
            if not was_ready and answer is not None:  # it could not start, and has ended
                self.process.join()
                self._bury()
        return answer

    def stop(self) -> None:
        if not self.ready:
            self.process.kill()  # it has no work to save
        elif self.index is not None:
            self.process.terminate()
        self.channel.close()

    def join(self, patience: float) -> None:
        self.process.join(patience)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        self._bury()

    def _bury(self) -> None:
        self.alive = False
        self.channel.close()
        self.process.close()


def _serve(connection: Connection, function: bytes, threads: int, modules: list[str]) -> None:
    """Life of a worker process: it says None when it is ready, then the result of each task."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which then stops its workers
    if hasattr(os, "setpgrp"):
        os.setpgrp()  # the terminal sends it to the parent's group
    threading.Thread(target=_stop_with_parent, daemon=True).start()
    try:
        work = _prepared(function, threads, modules)
        connection.send_bytes(pickle.dumps(work if isinstance(work, Failure) else None))
        while not isinstance(work, Failure):
            answer = attempt(work, pickle.loads(connection.recv_bytes()))
            connection.send_bytes(_sendable(answer))
    except (EOFError, OSError):  # the parent has gone, or has no use for it any more
        return


def _prepared(function: bytes, threads: int, modules: list[str]) -> Function | Failure:
    """The function that this process is for, or why there is none."""
    import torch

    torch.set_num_threads(threads)
    try:
        import_named(*modules)
        work: Function = pickle.loads(function)
    except Exception as error:
        message = f"its worker process could not start: {type(error).__name__}: {error}"
        return Failure(message, traceback.format_exc(), hopeless=True)
    return work


def _pickled(function: Function) -> bytes:
    try:
        return pickle.dumps(function)
    except Exception as error:
        raise InputError(
            f"it cannot be sent to a process ({error}): define it at the top level of a module, or take "
            "backend='thread'"
        ) from error


def _sendable(answer: Any) -> bytes:
    if isinstance(answer, Failure):
        answer = answer._replace(cause=None)  # not every exception can be made again elsewhere
    try:
        return pickle.dumps(answer)
    except Exception as error:
        return pickle.dumps(Failure(f"its result cannot be sent back: {error}", hopeless=True))


def _stop_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)


@contextmanager
def _interrupt_ignored() -> Iterator[None]:
    """A process started in here ignores Ctrl-C from its first moment on."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    old = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, old)
