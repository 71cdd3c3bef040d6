"""Black-box rewards: any callable, called in batches, checked, counted and cached."""

import functools
import math
import os
import warnings
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from diffrl.errors import InputError, InputTypeError
from diffrl.ranges import MAX_REPEATS, require_int
from diffrl.rewards.cache import RewardCache, cache_keys
from diffrl.rewards.calls import Reward, RewardError, ask, takes_cond
from diffrl.workers import Failure, WorkerPool, attempt

__all__ = ["BlackBox"]


class BlackBox:
    """A reward that is called in batches without gradients, and whose answers are checked, counted and cached.

    Called with (x0 [N, *E], cond), it gives float32 [N] on x0's device. `cond` is a tensor [N, ...], a list of
    N objects (prompts), or None. A sample fails where the reward gives NaN, infinity or None, raises, or takes
    too long, and where the sample itself is not finite (it is not shown to the reward then). An exception or a
    time-out fails its whole batch. A failed batch or sample is tried again `retries` times; then `on_failure`
    says what becomes of it. An answer of a wrong shape or type always raises, since nobody can tell which
    number belongs to which sample.

    Identical samples with identical conditions are scored once, as long as the cache remembers them (see
    `diffrl.rewards.cache`). Switch it off for a reward that is random.

    Args:
        reward: (x0 [n, *E], cond) → n numbers, or (x0) alone. It gets copies, and may change them.
        batch_size: most samples in one call; None: all, split evenly among the workers.
        workers: threads or processes that call it side by side; 0 calls it here.
        backend: "thread", or "process": the reward must be picklable, and each process has a copy.
        timeout: seconds that one batch may take; needs workers. A thread that exceeds it is abandoned, not
            stopped, and still runs (where 16 do, a call raises); a process is killed and replaced.
        retries: further attempts at what failed.
        on_failure: "raise"; "worst", the lowest reward so far; "mean", of the samples of the call that did not
            fail; or a number. All but "raise" warn, and are counted in `failures`.
        cache: whether to remember rewards, by the exact bytes of sample and condition.

    Raises:
        TypeError: the reward cannot be called with such arguments, as its signature tells.
        ValueError: an argument out of its range.
        RewardError: the reward cannot be sent to a process; a call failed and `on_failure` is "raise", or there is
            nothing to take the worst or the mean of; 16 abandoned threads still run.
    """

    def __init__(
        self,
        reward: Reward,
        *,
        batch_size: int | None = None,
        workers: int = 0,
        backend: Literal["thread", "process"] = "thread",
        timeout: float | None = None,
        retries: int = 0,
        on_failure: Literal["raise", "worst", "mean"] | float = "raise",
        cache: bool = True,
    ) -> None:
        if not callable(reward):
            raise InputTypeError(f"reward is {reward!r}: give a callable (x0 [N, *E], cond) -> N numbers")
        takes_cond(reward)  # what can be called in no way is refused now
        if batch_size is not None and batch_size < 1:
            raise InputError(f"batch_size is {batch_size}: give at least 1, or None for all at once")
        require_int("workers", workers, 0)
        require_int("retries", retries, 0, MAX_REPEATS)
        if backend not in ("thread", "process"):
            raise InputError(f"backend is {backend!r}: give 'thread' or 'process'")
        if timeout is not None and not (timeout > 0 and workers):
            raise InputError(
                f"timeout is {timeout} with workers={workers}: give seconds > 0 and workers >= 1, which can be left"
            )
        if on_failure not in ("raise", "worst", "mean") and (
            isinstance(on_failure, str) or not math.isfinite(on_failure)
        ):
            raise InputError(f"on_failure is {on_failure!r}: give 'raise', 'worst', 'mean' or a number")
        self.reward, self.batch_size, self.workers, self.on_failure = reward, batch_size, workers, on_failure
        self.backend, self.retries, self.cache = backend, retries, cache
        self.name: str = _name_of(reward)
        """What errors and logs call it; may be set."""
        self.queries = 0
        """Samples that the reward was asked to score, not counting retries."""
        self.cache_hits = 0
        """Samples whose reward was found in the cache, or that equalled another sample of the same call."""
        self.retried = 0
        """Samples that it was asked to score again after a failure."""
        self.failures = 0
        """Samples that got what `on_failure` says."""
        self._pool = self._new_pool(timeout) if workers else None
        self._known = RewardCache()
        self._worst = math.inf

    def _new_pool(self, timeout: float | None) -> WorkerPool:
        threads = max(1, min(torch.get_num_threads(), os.cpu_count() or 1) // self.workers)
        try:
            return WorkerPool(
                functools.partial(ask, self.reward),
                workers=self.workers,
                backend=self.backend,
                threads=threads,
                timeout=timeout,
            )
        except ValueError as error:
            raise RewardError(f"reward {self.name!r}: {error}") from error

    def __call__(self, x0: Tensor, cond: Any = None) -> Tensor:
        """Rewards of samples.

        Args:
            x0: shape [N, *E].
            cond: tensor [N, ...], list of N, or None.

        Returns:
            float32 [N], without gradients.
        """
        _check_cond(cond, len(x0))
        keys = cache_keys(x0, cond) if self.cache else [b"%d" % i for i in range(len(x0))]
        known = self._known.find(keys) if self.cache else {}
        first: dict[bytes, int] = {}  # row of each sample that is new
        for i, key in enumerate(keys):
            if key not in known:
                first.setdefault(key, i)
        self.cache_hits += len(keys) - len(first)
        values, faults = self._score(x0, cond, list(first.values()), counted=True)
        known.update({key: values[i] for key, i in first.items() if i in values})
        if self.cache:
            self._known.remember(known)
        rewards = [known.get(key, math.nan) for key in keys]
        return self._completed(rewards, faults, x0)

    def score(self, x0: Tensor, cond: Any = None) -> Tensor:
        """Rewards of samples without the cache, and not counted as queries: for `nondeterminism`.

        Args:
            x0: shape [N, *E].
            cond: tensor [N, ...], list of N, or None.
        """
        _check_cond(cond, len(x0))
        before = self._worst, self.retried, self.failures
        values, faults = self._score(x0, cond, range(len(x0)), counted=False)
        rewards = self._completed([values.get(i, math.nan) for i in range(len(x0))], faults, x0)
        self._worst, self.retried, self.failures = before
        return rewards

    def _score(
        self, x0: Tensor, cond: Any, rows: Sequence[int], *, counted: bool
    ) -> tuple[dict[int, float], dict[int, Failure]]:
        """Rewards by row, and by row too what is wrong where there is none."""
        x0 = x0.detach()
        sound = x0.reshape(len(x0), math.prod(x0.shape[1:])).isfinite().all(1).tolist()
        values: dict[int, float] = {}
        unsound = Failure("the sample itself holds NaN or infinity")
        faults = {i: unsound for i in rows if not sound[i]}
        if faults and self.on_failure == "raise":
            raise self._error(list(faults), len(x0), unsound)
        pending = self._split([i for i in rows if sound[i]])
        self.queries += counted * sum(map(len, pending))
        for attempt_number in range(self.retries + 1):
            failed: list[list[int]] = []
            batches = [(x0[part], _take(cond, part)) for part in pending]
            with closing(self._answers(batches)) as answers:
                for number, answer in answers:
                    bad = _sort(pending[number], answer, values, faults)
                    if not bad:
                        continue
                    failed.append(bad)
                    last = attempt_number == self.retries
                    if faults[bad[0]].hopeless or (last and self.on_failure == "raise"):
                        raise self._error(bad, len(x0), faults[bad[0]])
            pending = failed
            if attempt_number < self.retries:
                self.retried += sum(map(len, pending))
        return values, faults

    def _split(self, rows: list[int]) -> list[list[int]]:
        size = self.batch_size or math.ceil(len(rows) / max(self.workers, 1)) or 1
        return [rows[i : i + size] for i in range(0, len(rows), size)]

    def _answers(self, batches: Sequence[tuple[Tensor, Any]]) -> Generator[tuple[int, np.ndarray | Failure]]:
        """Yield (number of the batch, what `ask` made of it), in the order they come."""
        if self._pool is None:
            for number, batch in enumerate(batches):
                yield number, attempt(functools.partial(ask, self.reward), batch)
            return
        if self.backend == "process":  # which takes tensors of the CPU only
            batches = [(x0.cpu(), cond.cpu() if isinstance(cond, Tensor) else cond) for x0, cond in batches]
        yield from self._pool.map(batches)

    def _error(self, rows: Sequence[int], n: int, fault: Failure) -> RewardError:
        which = f"sample {rows[0]}" if len(rows) == 1 else f"samples {', '.join(map(str, rows[:8]))}"
        more = ", ..." if len(rows) > 8 else ""
        error = RewardError(f"reward {self.name!r} failed for {which}{more} of {n}: {fault.message}")
        error.__cause__ = fault.cause
        return error

    def _completed(self, rewards: list[float], faults: dict[int, Failure], x0: Tensor) -> Tensor:
        """Rewards [N], with what `on_failure` says in place of NaN."""
        given = [r for r in rewards if not math.isnan(r)]
        self._worst = min([self._worst, *given])
        if faults:
            rows = [i for i, r in enumerate(rewards) if math.isnan(r)]
            error = self._error(rows, len(rewards), faults[min(faults)])
            mean = math.fsum(given) / len(given) if given else math.inf
            stand_in = float({"worst": self._worst, "mean": mean}.get(str(self.on_failure), self.on_failure))
            if math.isinf(stand_in):
                raise RewardError(
                    f"{error}; and there is no reward to take the {self.on_failure} of"
                ) from error
            warnings.warn(
                f"{error}; {stand_in:g} stands in ({self.on_failure})", RuntimeWarning, stacklevel=3
            )
            self.failures += len(rows)
            rewards = [stand_in if math.isnan(r) else r for r in rewards]
        return torch.tensor(rewards, dtype=torch.float32, device=x0.device)

    def metrics(self) -> dict[str, float]:
        """The counts, for a log."""
        counts = ("queries", "cache_hits", "retried", "failures")
        return {count: float(getattr(self, count)) for count in counts}

    def close(self) -> None:
        """End the workers; a later call starts new ones."""
        if self._pool is not None:
            self._pool.close()

    def state_dict(self) -> dict[str, Any]:
        """Counts and cache, for a checkpoint: numbers and tensors."""
        counts = {key: int(value) for key, value in self.metrics().items()}
        return {**counts, "worst": self._worst, "known": self._known.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take the counts and the cache of a checkpoint."""
        for count in self.metrics():
            setattr(self, count, int(state[count]))
        self._worst = float(state["worst"])
        self._known.load_state_dict(state["known"])


def _sort(
    rows: list[int], answer: np.ndarray | Failure, values: dict[int, float], faults: dict[int, Failure]
) -> list[int]:
    """Enter what a batch came to among the values or the faults; returns the rows that failed."""
    if isinstance(answer, Failure):
        faults.update(dict.fromkeys(rows, answer))
        return rows
    with np.errstate(over="ignore"):
        numbers = answer.astype(np.float32)  # what is too large for it is no reward
    bad = []
    for i, exact, number in zip(rows, answer.tolist(), numbers.tolist(), strict=True):
        if math.isfinite(number):
            values[i] = number
            faults.pop(i, None)
        else:
            faults[i] = Failure(f"it gave {'NaN or None' if math.isnan(exact) else f'{exact:g}'}")
            bad.append(i)
    return bad


def _name_of(reward: Any) -> str:
    while isinstance(reward, functools.partial):
        reward = reward.func
    return getattr(reward, "__name__", type(reward).__name__)


def _take(cond: Any, rows: Sequence[int]) -> Any:
    if isinstance(cond, Tensor):
        return cond[list(rows)]
    return None if cond is None else [cond[i] for i in rows]


def _check_cond(cond: Any, n: int) -> None:
    if cond is None:
        return
    if not isinstance(cond, Tensor | Sequence) or isinstance(cond, str):
        raise InputTypeError(f"cond is a {type(cond).__name__}: give a tensor [N, ...], a list of N, or None")
    if len(cond) != n:
        raise InputError(f"{len(cond)} conditions for {n} samples: give one each")
