"""What a worker is: a thread or a process that does one task after the other, and how each begins and ends."""

import multiprocessing
import os
import pickle
import signal
import sys
import threading
import time
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Any, NamedTuple

from diffrl.errors import InputError
from diffrl.registry import import_named, user_modules

__all__ = ["Failure", "Function", "ProcessWorker", "ThreadWorker", "Worker", "attempt", "pickled"]

Function = Callable[[Any], Any]


class Failure(NamedTuple):
    """What stands for the result of a task that raised, took too long, or lost its worker."""

    message: str
    """What went wrong, in one line."""
    details: str = ""
    """The traceback, or nothing."""
    hopeless: bool = False
    """Whether another attempt would fail in the same way."""
    cause: BaseException | None = None
    """What the task raised, if it ran in this process."""
    stopped: bool = False
    """Whether its worker process was asked to end from outside, by SIGTERM: it did nothing wrong."""


def attempt(
    function: Function,
    task: Any,
    errors: tuple[type[BaseException], ...] = (Exception, SystemExit),
) -> Any:
    """Return ``function(task)``, or a `Failure` if it raises one of `errors`.

    A worker also catches KeyboardInterrupt: there, no user has pressed Ctrl-C.
    """
    try:
        return function(task)
    except errors as error:
        first = (str(error).strip() or "no message").splitlines()[0]
        return Failure(f"{type(error).__name__}: {first}", traceback.format_exc(), cause=error)


class Worker(ABC):
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

    @property
    def still_runs(self) -> bool:
        """Whether it runs although it was stopped."""
        return False

    def join(self, patience: float) -> None:  # noqa: B027 (a thread cannot be waited for)
        """Wait for its end, and enforce it after `patience` seconds."""


class ThreadWorker(Worker):
    """A thread. It can be abandoned, not stopped."""

    def __init__(self, function: Function) -> None:
        self.channel, end = multiprocessing.Pipe(duplex=False)
        self._inbox: SimpleQueue[tuple[Any] | None] = SimpleQueue()
        self._outbox: SimpleQueue[Any] = SimpleQueue()
        arguments = (function, self._inbox, self._outbox, end)
        self._thread = threading.Thread(target=self._serve, args=arguments, daemon=True)
        self._thread.start()
        self.ready = True

    @property
    def still_runs(self) -> bool:
        return self._thread.is_alive()

    @staticmethod
    def _serve(function: Function, inbox: SimpleQueue, outbox: SimpleQueue, end: Connection) -> None:
        while (given := inbox.get()) is not None:
            outbox.put(attempt(function, given[0], errors=(BaseException,)))
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


class ProcessWorker(Worker):
    """A process that was started afresh, not forked."""

    def __init__(self, function: bytes, threads: int, patience: float) -> None:
        context = multiprocessing.get_context("spawn")
        self.channel, end = context.Pipe()
        arguments = (end, function, threads, user_modules(), patience)
        self.process = context.Process(target=_serve, args=arguments, daemon=not patience)
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
            answer = Failure(f"its worker process {how}", stopped=code == -signal.SIGTERM)
            if not was_ready and not answer.stopped:
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


def _serve(
    connection: Connection, function: bytes, threads: int, modules: list[str], patience: float
) -> None:
    """Life of a worker process: it says None when it is ready, then the result of each task."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which then stops its workers
    if hasattr(os, "setpgrp"):
        os.setpgrp()  # the terminal sends it to the parent's group
    if not patience:
        _die_with_parent()
    threading.Thread(target=_stop_with_parent, args=(patience,), daemon=True).start()
    try:
        work = _prepared(function, threads, modules)
        connection.send_bytes(pickle.dumps(work if isinstance(work, Failure) else None))
        while not isinstance(work, Failure):
            answer = attempt(work, pickle.loads(connection.recv_bytes()), errors=(BaseException,))
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


def pickled(function: Function) -> bytes:
    """The function as a process takes it.

    Raises:
        ValueError: it cannot be pickled.
    """
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


def _stop_with_parent(patience: float) -> None:
    """Wait for the parent's death; this process may save its work then, but does not outlive it for long."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(patience)
    os._exit(1)


def _die_with_parent() -> None:
    """Have Linux kill this process when its parent dies, also in C code that lets no other thread run."""
    if sys.platform != "linux":
        return
    import fcntl

    parent = multiprocessing.parent_process()
    assert parent is not None
    end = parent.sentinel  # a pipe, whose other end closes with the parent
    fcntl.fcntl(end, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(end, fcntl.F_SETSIG, signal.SIGKILL)
    fcntl.fcntl(end, fcntl.F_SETFL, fcntl.fcntl(end, fcntl.F_GETFL) | os.O_ASYNC)


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
