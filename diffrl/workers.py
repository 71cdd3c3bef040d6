"""Workers: processes or threads that do one task after the other, may fail one by one, and stop cleanly."""

import time
import weakref
from collections import deque
from collections.abc import Callable, Generator, Sequence
from functools import partial
from multiprocessing.connection import wait
from typing import Any, Literal

from diffrl.errors import InputError
from diffrl.worker_kinds import Failure, Function, ProcessWorker, ThreadWorker, Worker, attempt, pickled

__all__ = ["Failure", "WorkerPool", "attempt", "run_tasks"]

PATIENCE_SECONDS = 60.0  # for a process that was asked to stop, until it has saved its work
POLL_SECONDS = 0.2  # between two looks at whether to stop
MOST_ABANDONED = (
    16  # threads of a pool that took too long and still run: each costs a thread and a descriptor
)


def run_tasks(
    function: Function,
    tasks: Sequence[Any],
    *,
    workers: int,
    threads: int = 1,
    stop: Callable[[], bool] = lambda: False,
) -> Generator[tuple[int, Any]]:
    """Yield (index of the task, what function(task) returned or its `Failure`), in the order they finish.

    A task that raises, or whose process is killed, is a `Failure`; the others go on. When the iteration ends or is
    left early (`stop`, Ctrl-C, an exception, `close`), each busy process gets SIGTERM once and may save its work.
    Processes whose parent dies get it too.

    Args:
        function: a function of a module's top level, which other processes can import.
        tasks: its arguments; they and the results must be picklable.
        workers: processes; 0 runs the tasks here, one after the other.
        threads: of torch in each process.
        stop: asked all the time, here between two tasks; if true, the iteration ends.

    Raises:
        ValueError: workers or threads outside their range.
    """
    if workers < 0 or threads < 1:
        raise InputError(f"workers is {workers} and threads {threads}: give workers >= 0 and threads >= 1")
    if workers == 0:
        for index, task in enumerate(tasks):
            if stop():
                return
            yield index, attempt(function, task)
        return
    pool = WorkerPool(function, workers=workers, threads=threads, patience=PATIENCE_SECONDS)
    try:
        yield from pool.map(tasks, stop)
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
            be stopped: it is abandoned, and its result dropped; where 16 of them still run, a further one is a
            hopeless `Failure`.
        patience: seconds that a process has to save its work when it is stopped in the middle of a task, or when this
            process dies. With 0 it is killed at once; it cannot start processes of its own then.

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
        self._start: Callable[[], Worker] = partial(ThreadWorker, function)
        if backend == "process":
            self._start = partial(ProcessWorker, pickled(function), threads, patience)
        self._crew: list[Worker] = []
        self._abandoned: list[Worker] = []
        weakref.finalize(self, _end, self._crew, patience)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[()]]:
        return self._copy, ()  # a copy has workers of its own

    def close(self) -> None:
        """End the workers; the next call starts new ones."""
        _end(self._crew, self._patience)

    def map(
        self, tasks: Sequence[Any], stop: Callable[[], bool] = lambda: False
    ) -> Generator[tuple[int, Any]]:
        """Yield (index of the task, what the function returned or a `Failure`), in the order they finish.

        When the iteration is left early, or `stop` says so, the workers that are busy are stopped.
        """
        todo = deque(enumerate(tasks))
        try:
            while (todo or self._busy()) and not stop():
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
                    assert index is not None
                    yield index, self._too_slow(worker)
        finally:
            self._dismiss(self._busy(), self._patience)  # or their answers would come in the next call

    def _busy(self) -> list[Worker]:
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

    def _with_news(self) -> list[Worker]:
        """Wait for workers that have something to say, no longer than the next deadline."""
        nearest = min((worker.deadline for worker in self._busy()), default=float("inf"))
        seconds = min(max(0.0, nearest - time.monotonic()), POLL_SECONDS)
        talking = wait([worker.channel for worker in self._crew], seconds)
        return [worker for worker in self._crew if worker.channel in talking]

    def _too_slow(self, worker: Worker) -> Failure:
        """Replace a worker whose time is over."""
        self._dismiss([worker], patience=0.0)
        self._abandoned = [left for left in (*self._abandoned, worker) if left.still_runs]
        fault = f"it took longer than {self._timeout:g} s"
        if len(self._abandoned) < MOST_ABANDONED:
            return Failure(fault)
        fault += (
            f", and {len(self._abandoned)} threads that did so still run: backend='process' is killed instead"
        )
        return Failure(fault, hopeless=True)

    def _dismiss(self, workers: list[Worker], patience: float) -> None:
        self._crew[:] = [worker for worker in self._crew if worker not in workers]
        _end(workers, patience)


def _end(workers: list[Worker], patience: float) -> None:
    """Stop all of them, then wait for each; a second Ctrl-C meanwhile kills them."""
    for worker in workers:
        worker.stop()
    end = time.monotonic() + patience
    try:
        while workers:
            workers[-1].join(max(0.0, end - time.monotonic()))
            workers.pop()
    except KeyboardInterrupt:
        while workers:
            workers.pop().join(0.0)
        raise
