"""Black-box rewards: any callable, called in batches, checked, counted and cached; and weighted sums of them."""

import functools
import math
import warnings
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from diffrl.rewards.cache import CACHE_SIZE, RewardCache, cache_keys
from diffrl.rewards.workers import Outcome, Reward, RewardError, WorkerPool, evaluate

__all__ = ["CACHE_SIZE", "BlackBox", "Reward", "RewardError", "WeightedSum", "as_reward", "nondeterminism"]

Fault = tuple[str, Exception | None]  # what is wrong with a sample's reward, and what the reward raised


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
        raise TypeError(f"cond is a {type(cond).__name__}: give a tensor [N, ...], a list of N, or None")
    if len(cond) != n:
        raise ValueError(f"{len(cond)} conditions for {n} samples: give one each")


class BlackBox:
    """A reward that is asked in batches without gradients, and whose answers are checked, counted and cached.

    Called with (x0 [N, *E], cond), it gives float32 [N] on x0's device. `cond` is a tensor [N, ...], a list of
    N objects (prompts), or None. A sample fails where the reward gives NaN, infinity or None, raises, or takes
    too long, and where the sample itself is not finite (it is not shown to the reward then). An exception or a
    time-out fails its whole batch. A failed batch or sample is tried again `retries` times; then `on_failure`
    says what becomes of it. An answer of a wrong shape or type always raises: it cannot be told which sample is
    whose.

    Identical samples with identical conditions are scored once while the cache, of the latest `CACHE_SIZE`,
    holds them: switch it off for a reward that is random.

    Args:
        reward: (x0 [n, *E], cond) → n numbers. It gets copies, and may change them.
        batch_size: most samples in one call; None: all, split evenly among the workers.
        workers: threads or processes that call it side by side; 0 calls it here.
        backend: "thread", or "process": the reward must be picklable, and each process has a copy.
        timeout: seconds that one batch may take; needs workers. A thread that exceeds it is abandoned, not
            stopped, and still runs; a process is killed and replaced.
        retries: further attempts at what failed.
        on_failure: "raise"; "worst", the lowest reward so far; "mean", of the samples of the call that did not
            fail; or a number. All but "raise" warn, and are counted in `failures`.
        cache: whether to remember rewards, by the exact bytes of sample and condition.

    Raises:
        ValueError: an argument out of its range.
        RewardError: the reward cannot be sent to a process; a call failed and `on_failure` is "raise", or there is
            nothing to take the worst or the mean of.
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
        self.name: str = _name_of(reward)
        """What errors and logs call it; may be set."""
        if not callable(reward):
            raise TypeError(f"reward is {reward!r}: give a callable (x0 [N, *E], cond) -> N numbers")
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}: give at least 1, or None for all at once")
        if workers < 0 or retries < 0:
            raise ValueError(f"workers is {workers} and retries {retries}: neither can be negative")
        if backend not in ("thread", "process"):
            raise ValueError(f"backend is {backend!r}: give 'thread' or 'process'")
        if timeout is not None and not (timeout > 0 and workers):
            raise ValueError(
                f"timeout is {timeout} with workers={workers}: give seconds > 0, and a worker that can be left"
            )
        if on_failure not in ("raise", "worst", "mean") and (
            isinstance(on_failure, str) or not math.isfinite(on_failure)
        ):
            raise ValueError(f"on_failure is {on_failure!r}: give 'raise', 'worst', 'mean' or a number")
        self.reward, self.batch_size, self.workers, self.on_failure = reward, batch_size, workers, on_failure
        self.retries, self.cache = retries, cache
        self.queries = 0
        """Samples that the reward was asked to score; neither found in the cache, nor retries."""
        self.cache_hits = 0
        """Samples whose reward was remembered, or equal to another's in the same call."""
        self.retried = 0
        """Samples that it was asked to score again after a failure."""
        self.failures = 0
        """Samples that got what `on_failure` says."""
        self._pool: WorkerPool | None = None
        if workers:
            try:
                self._pool = WorkerPool(reward, workers, backend, timeout)
            except RewardError as error:
                raise RewardError(f"reward {self.name!r}: {error}") from error
        self._known = RewardCache()
        self._worst = math.inf

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
        """Rewards of samples, past the cache and not counted as queries: for `nondeterminism`.

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
    ) -> tuple[dict[int, float], dict[int, Fault]]:
        """Rewards of the rows asked for, and what is wrong with those that have none."""
        x0 = x0.detach()
        sound = x0.reshape(len(x0), math.prod(x0.shape[1:])).isfinite().all(1).tolist()
        values: dict[int, float] = {}
        faults: dict[int, Fault] = {
            i: ("the sample itself holds NaN or infinity", None) for i in rows if not sound[i]
        }
        if faults and self.on_failure == "raise":
            raise self._error(list(faults), len(x0), next(iter(faults.values())))
        pending = self._split([i for i in rows if sound[i]])
        self.queries += counted * sum(map(len, pending))
        for attempt in range(self.retries + 1):
            failed: list[list[int]] = []
            batches = [(x0[part], _take(cond, part)) for part in pending]
            with closing(self._outcomes(batches)) as outcomes:
                for number, outcome in outcomes:
                    bad = _sort(pending[number], outcome, values, faults)
                    final = outcome.hopeless or (attempt == self.retries and self.on_failure == "raise")
                    if bad and final:
                        raise self._error(bad, len(x0), faults[bad[0]])
                    failed += [bad] if bad else []
            pending = failed
            if attempt < self.retries:
                self.retried += sum(map(len, pending))
        return values, faults

    def _split(self, rows: list[int]) -> list[list[int]]:
        size = self.batch_size or math.ceil(len(rows) / max(self.workers, 1)) or 1
        return [rows[i : i + size] for i in range(0, len(rows), size)]

    def _outcomes(self, batches: Sequence[tuple[Tensor, Any]]) -> Generator[tuple[int, Outcome]]:
        if self._pool is None:
            for number, batch in enumerate(batches):
                yield number, evaluate(self.reward, *batch)
            return
        try:
            yield from self._pool.map(batches)
        except RewardError as error:
            raise RewardError(f"reward {self.name!r}: {error}") from error

    def _error(self, rows: Sequence[int], n: int, fault: Fault) -> RewardError:
        which = f"sample {rows[0]}" if len(rows) == 1 else f"samples {', '.join(map(str, rows[:8]))}"
        more = ", ..." if len(rows) > 8 else ""
        error = RewardError(f"reward {self.name!r} failed for {which}{more} of {n}: {fault[0]}")
        error.__cause__ = fault[1]
        return error

    def _completed(self, rewards: list[float], faults: dict[int, Fault], x0: Tensor) -> Tensor:
        """Rewards with what `on_failure` says in place of NaN."""
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


def _sort(rows: list[int], outcome: Outcome, values: dict[int, float], faults: dict[int, Fault]) -> list[int]:
    """Enter what a batch came to; the rows that failed."""
    if outcome.values is None:
        faults.update(dict.fromkeys(rows, (outcome.error, outcome.cause)))
        return rows
    with np.errstate(over="ignore"):
        numbers = outcome.values.astype(np.float32)  # what is too large for it is no reward
    bad = []
    for i, exact, number in zip(rows, outcome.values.tolist(), numbers.tolist(), strict=True):
        if math.isfinite(number):
            values[i] = number
            faults.pop(i, None)
        else:
            faults[i] = f"it gave {'NaN or None' if math.isnan(exact) else f'{exact:g}'}", None
            bad.append(i)
    return bad


class WeightedSum:
    """Several rewards as one, each standardised by itself if wished.

        R = Σⱼ wⱼ Rⱼ    or    R = Σⱼ wⱼ (Rⱼ - mⱼ)/(sⱼ + tol)

    mⱼ and sⱼ (denominator n) are of all values that reward j has given to this object, those of the call
    included: without them, the reward with the largest spread decides alone. A value then depends on what came
    before, so a `BlackBox` with a cache may be a part of a running sum, but not wrap one.

    Source: GDPO: Group reward-Decoupled Normalization Policy Optimization for Multi-reward RL Optimization (Liu et
    al., 2026), https://arxiv.org/abs/2601.05242, which standardises within a group.

    Args:
        rewards: name → (reward, weight). Callables that are no `BlackBox` are made one; weight 0 only logs.
        normalise: "none" or "running".
        tol: added to sⱼ.

    Raises:
        ValueError: no reward, a weight that is not finite, an unknown normalisation.
    """

    def __init__(
        self,
        rewards: Mapping[str, tuple[Reward, float]],
        *,
        normalise: Literal["none", "running"] = "none",
        tol: float = 1e-6,
    ) -> None:
        if not rewards:
            raise ValueError("a weighted sum needs at least one reward: name -> (reward, weight)")
        if normalise not in ("none", "running"):
            raise ValueError(f"normalise is {normalise!r}: give 'none' or 'running'")
        for name, (_, weight) in rewards.items():
            if not math.isfinite(weight):
                raise ValueError(f"the weight of {name!r} is {weight}: give a finite number")
        self.parts = {name: as_reward(reward) for name, (reward, _) in rewards.items()}
        for name, part in self.parts.items():
            part.name = name
        self.weights = {name: float(weight) for name, (_, weight) in rewards.items()}
        self.normalise, self.tol = normalise, tol
        self.name: str = " + ".join(rewards)
        self.latest: dict[str, Tensor] = {}
        """What each reward gave in the last call, as it is, float32 [N]."""
        self._moments = {name: (0, 0.0, 0.0) for name in rewards}  # count, mean, sum of squared deviations

    def __call__(self, x0: Tensor, cond: Any = None) -> Tensor:
        """Weighted sums of rewards.

        Args:
            x0: samples, shape [N, *E].
            cond: tensor [N, ...], list of N, or None.

        Returns:
            float32 [N], without gradients.
        """
        self.latest = {name: part(x0, cond) for name, part in self.parts.items()}
        total = torch.zeros(len(x0), dtype=torch.float64, device=x0.device)
        for name, reward in self.latest.items():
            r = reward.double()
            if self.normalise == "running":
                m, s = self._updated(name, r)
                r = (r - m) / (s + self.tol)
            total += self.weights[name] * r
        return total.float()

    def score(self, x0: Tensor, cond: Any = None) -> Tensor:
        """Weighted sums as they are, neither standardised nor cached nor counted: for evaluation.

        Args:
            x0: samples, shape [N, *E].
            cond: tensor [N, ...], list of N, or None.
        """
        parts = [self.weights[name] * part.score(x0, cond).double() for name, part in self.parts.items()]
        return torch.stack(parts).sum(0).float()

    def _updated(self, name: str, r: Tensor) -> tuple[float, float]:
        """Mean and standard deviation, with r [N] among the values."""
        count, mean, squares = self._moments[name]
        if n := len(r):
            shift = float(r.mean()) - mean
            squares += float((r - r.mean()).square().sum()) + shift**2 * count * n / (count + n)
            mean += shift * n / (count + n)
        self._moments[name] = count + n, mean, squares
        return mean, math.sqrt(squares / max(count + n, 1))

    @property
    def queries(self) -> int:
        """Samples that the rewards were asked to score, over all of them."""
        return sum(part.queries for part in self.parts.values())

    @property
    def failures(self) -> int:
        """Samples for which something stood in, over all of them."""
        return sum(part.failures for part in self.parts.values())

    def metrics(self) -> dict[str, float]:
        """Of each reward, for a log: mean and standard deviation in the last call, and its counts."""
        log: dict[str, float] = {}
        for name, part in self.parts.items():
            if name in self.latest and len(self.latest[name]):
                r = self.latest[name].double()
                log |= {f"{name}/mean": float(r.mean()), f"{name}/std": float(r.std(correction=0))}
            log |= {f"{name}/{key}": value for key, value in part.metrics().items()}
        return log

    def close(self) -> None:
        """End the workers of all rewards."""
        for part in self.parts.values():
            part.close()

    def state_dict(self) -> dict[str, Any]:
        """The statistics, and the state of every reward, for a checkpoint."""
        moments = {name: list(moment) for name, moment in self._moments.items()}
        return {"moments": moments, "parts": {name: part.state_dict() for name, part in self.parts.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take the state of a checkpoint."""
        self._moments = {name: tuple(state["moments"][name]) for name in self.parts}
        for name, part in self.parts.items():
            part.load_state_dict(state["parts"][name])


def as_reward(reward: Reward) -> "BlackBox | WeightedSum":
    """The reward itself if its calls are checked and counted already, else a `BlackBox` of it."""
    return reward if isinstance(reward, BlackBox | WeightedSum) else BlackBox(reward)


def nondeterminism(reward: Reward, x0: Tensor, cond: Any = None) -> float:
    """The largest difference between the rewards of the same samples, asked twice: 0 for a deterministic reward.

    It looks past caches and is not counted in `queries`. Of a `WeightedSum`, the largest of its rewards'.

    Args:
        reward: the callable.
        x0: samples, shape [N, *E].
        cond: tensor [N, ...], list of N, or None.
    """
    box = as_reward(reward)
    if isinstance(box, WeightedSum):
        return max(nondeterminism(part, x0, cond) for part in box.parts.values())
    first, second = box.score(x0, cond), box.score(x0, cond)
    return float((first - second).abs().max()) if len(x0) else 0.0
