"""Calls of a reward, here or in worker threads or processes that may exceed their time or die."""

import multiprocessing
import os
import pickle
import signal
import threading
import time
import traceback
import weakref
from collections import deque
from collections.abc import Generator, Sequence
from multiprocessing.connection import Connection, wait
from queue import SimpleQueue
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

__all__ = ["Outcome", "Reward", "RewardError", "WorkerPool", "evaluate"]


class RewardError(RuntimeError):
    """A reward gave no usable number; the message names the reward, the samples and what went wrong."""


class Reward(Protocol):
    """What a reward is: any callable (x0 [N, *E], cond) → N numbers.

    cond is what the samples were asked to be (labels [N], a list of N prompts) or None. The numbers may be a
    tensor, an array or a sequence, of floats or integers, of shape [N].
    """

    def __call__(self, x0: Tensor, cond: Any, /) -> Tensor | np.ndarray | Sequence[float]: ...


class Outcome(NamedTuple):
    """What one call of a reward came to."""

    values: np.ndarray | None
    """float64 [n], NaN where the reward gave None; None if the call gave no numbers."""
    error: str = ""
    """Why it gave none, in a few words."""
    hopeless: bool = False
    """Whether trying again is in vain: an answer of a wrong shape or type."""
    cause: Exception | None = None
    """What the reward raised, where it ran in this process."""


def _as_numbers(answer: Any, n: int) -> Outcome:
    if isinstance(answer, Tensor):
        answer = answer.detach().cpu()
        answer = answer.double().numpy() if not answer.is_complex() else answer.numpy()
    if answer is None:
        return Outcome(np.full(n, np.nan))
    try:
        array = np.asarray(answer)
    except (RuntimeError, TypeError, ValueError):  # a ragged list
        return Outcome(
            None, f"it gave a {type(answer).__name__} that is no array of shape [{n}]", hopeless=True
        )
    if array.shape != (n,):
        return Outcome(None, f"it gave shape {list(array.shape)}, not [{n}]", hopeless=True)
    if array.dtype.kind == "O":
        array = np.array([np.nan if value is None else value for value in answer])
    if array.dtype.kind not in "fiub":
        return Outcome(None, f"it gave {array.dtype}, not real numbers", hopeless=True)
    return Outcome(array.astype(np.float64))


def evaluate(reward: Reward, x0: Tensor, cond: Any) -> Outcome:
    """One call of a reward, without gradients; whatever it raises is part of the outcome.

    Args:
        reward: the callable.
        x0: samples, shape [n, *E].
        cond: their conditions.
    """
    try:
        with torch.no_grad():
            answer = reward(x0, cond)
    except Exception as error:
        return Outcome(None, f"{type(error).__name__}: {error}", cause=error)
    return _as_numbers(answer, len(x0))


class _ThreadWorker:
    """A thread that scores one batch after the other. It can be abandoned, not stopped."""

    def __init__(self, reward: Reward) -> None:
        self.signal, end = multiprocessing.Pipe(duplex=False)
        self._inbox: SimpleQueue[tuple[Tensor, Any] | None] = SimpleQueue()
        self._outbox: SimpleQueue[Outcome] = SimpleQueue()
        arguments = (reward, self._inbox, self._outbox, end)
        threading.Thread(target=self._serve, args=arguments, daemon=True).start()
        self.ready = True

    @staticmethod
    def _serve(reward: Reward, inbox: SimpleQueue, outbox: SimpleQueue, end: Connection) -> None:
        while (batch := inbox.get()) is not None:
            outbox.put(evaluate(reward, *batch))
            try:
                end.send_bytes(b"done")
            except OSError:  # abandoned
                return

    def submit(self, x0: Tensor, cond: Any) -> None:
        self._inbox.put((x0, cond))

    def receive(self) -> Outcome | None:
        self.signal.recv_bytes()
        return self._outbox.get()

    def drop(self) -> None:
        self._inbox.put(None)
        self.signal.close()


class _ProcessWorker:
    """A process that holds a copy of the reward and scores one batch after the other."""

    def __init__(self, pickled: bytes, threads: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.signal, end = context.Pipe()
        self.process = context.Process(target=_serve_process, args=(end, pickled, threads), daemon=True)
        self.process.start()
        end.close()
        self.ready = False

    def submit(self, x0: Tensor, cond: Any) -> None:
        try:
            self.signal.send_bytes(pickle.dumps((x0.cpu(), cond.cpu() if isinstance(cond, Tensor) else cond)))
        except OSError:
            pass  # it has died: `receive` says so

    def receive(self) -> Outcome | None:
        try:
            message = pickle.loads(self.signal.recv_bytes())
        except (EOFError, OSError):
            self.process.join()
            code = self.process.exitcode or 0
            how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
            if self.ready:
                return Outcome(None, f"its worker process {how}")
            message = (
                f"its worker process {how} before it was ready; a script that uses processes must keep its work "
                "under `if __name__ == '__main__':`"
            )
        if isinstance(message, str):
            raise RewardError(message)
        self.ready = True
        return message

    def drop(self) -> None:
        self.process.kill()
        self.process.join()
        self.process.close()
        self.signal.close()


def _serve_process(end: Connection, pickled: bytes, threads: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    torch.set_num_threads(threads)
    try:
        reward, message = pickle.loads(pickled), None
    except Exception:
        reward, message = None, f"it could not be loaded in a process: {traceback.format_exc(limit=-1)}"
    try:
        end.send_bytes(pickle.dumps(message))
        while reward is not None:
            batch = pickle.loads(end.recv_bytes())
            end.send_bytes(pickle.dumps(evaluate(reward, *batch)._replace(cause=None)))
    except (EOFError, OSError):  # the parent has gone
        return


def _drop_all(crew: list) -> None:
    while crew:
        crew.pop().drop()


class WorkerPool:
    """Workers that stay between calls, started when they are first needed.

    Args:
        reward: what they call.
        workers: how many, ≥ 1.
        backend: "thread", or "process": each gets a copy of the reward.
        timeout: seconds that a batch may take, its worker being ready; None: any time. A thread that exceeds it
            cannot be stopped: it is abandoned, and its answer dropped. A process is killed.

    Raises:
        RewardError: the reward cannot be sent to a process.
    """

    def __init__(self, reward: Reward, workers: int, backend: str, timeout: float | None) -> None:
        self._arguments = reward, workers, backend, timeout
        self._reward, self._workers, self._timeout = reward, workers, timeout
        self._pickled = b""
        if backend == "process":
            try:
                self._pickled = pickle.dumps(reward)
            except Exception as error:
                raise RewardError(
                    f"it cannot be sent to a process ({error}): define it at the top level of a module, or take "
                    "backend='thread'"
                ) from error
        self._threads = max(1, min(torch.get_num_threads(), os.cpu_count() or 1) // workers)
        self._crew: list[_ThreadWorker | _ProcessWorker] = []
        weakref.finalize(self, _drop_all, self._crew)

    def __reduce__(self) -> tuple[type, tuple]:
        return WorkerPool, self._arguments  # a copy has workers of its own

    def close(self) -> None:
        """End the workers; the next call starts new ones."""
        _drop_all(self._crew)

    def _recruit(self, wanted: int) -> None:
        while len(self._crew) < min(wanted, self._workers):
            self._crew.append(
                _ProcessWorker(self._pickled, self._threads) if self._pickled else _ThreadWorker(self._reward)
            )

    def _dismiss(self, worker: _ThreadWorker | _ProcessWorker) -> None:
        self._crew.remove(worker)
        worker.drop()

    def map(self, batches: Sequence[tuple[Tensor, Any]]) -> Generator[tuple[int, Outcome]]:
        """Yield (number of the batch, its outcome), in the order they come; may be left early.

        Args:
            batches: (x0 [n, *E], cond) each.

        Raises:
            RewardError: a worker process did not start.
        """
        todo = deque(enumerate(batches))
        busy: dict[_ThreadWorker | _ProcessWorker, tuple[int, float]] = {}  # number, deadline
        limit = float("inf") if self._timeout is None else self._timeout
        try:
            while todo or busy:
                self._recruit(len(todo) + len(busy))
                for worker in self._crew:
                    if todo and worker.ready and worker not in busy:
                        number, batch = todo.popleft()
                        worker.submit(*batch)
                        busy[worker] = number, time.monotonic() + limit
                nearest = min((deadline for _, deadline in busy.values()), default=float("inf"))
                patience = None if nearest == float("inf") else max(0.0, nearest - time.monotonic())
                talking = wait([worker.signal for worker in self._crew], patience)
                for worker in [worker for worker in self._crew if worker.signal in talking]:
                    outcome = self._listen(worker)
                    if worker in busy and outcome is not None:
                        yield busy.pop(worker)[0], outcome
                now = time.monotonic()
                for worker in [worker for worker, (_, deadline) in busy.items() if deadline <= now]:
                    number, _ = busy.pop(worker)
                    self._dismiss(worker)
                    yield number, Outcome(None, f"it took longer than {limit:g} s")
        finally:
            for worker in busy:  # their answers would be taken for those of the next call
                self._dismiss(worker)

    def _listen(self, worker: _ThreadWorker | _ProcessWorker) -> Outcome | None:
        """What a worker has to say: an outcome, or None for ready; one that has died is dismissed."""
        try:
            outcome = worker.receive()
        except RewardError:
            self._dismiss(worker)
            raise
        if isinstance(worker, _ProcessWorker) and worker.process.exitcode is not None:
            self._dismiss(worker)
        return outcome
