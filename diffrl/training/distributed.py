"""The processes that share a run, as torchrun starts them: rows of a batch, sums, and an end where one of them dies."""

import json
import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar, cast

import torch
import torch.distributed as dist
from tensordict import TensorDictBase
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from diffrl import keys
from diffrl.errors import DiffrlError, InputError
from diffrl.ranges import require_number
from diffrl.ranks import FIRST_TIMEOUT, RANK_TIMEOUT, own_rank, ranks_started

__all__ = ["ALONE", "RankLost", "Ranks", "Share", "bounds_of_units", "joined"]

Made = TypeVar("Made")
OF_PEERS = re.compile(r"gloo|nccl|process ?group|connection|timed? ?out|heartbeat|broken pipe", re.IGNORECASE)
"""What errors of torch say that are about another process."""

LAUNCHER_TIMEOUT = 30.0
"""Seconds that a process waits for torchrun, which is there before it, to answer."""


class RankLost(DiffrlError, RuntimeError):
    """Another process of the run has ended, or did not answer in time."""


class Share(NamedTuple):
    """What one process takes of a batch: its rows, and how much of the batch they are."""

    rows: slice
    weight: float


@dataclass(frozen=True)
class Ranks:
    """The processes that share a run, seen from one of them. Where there are several, each makes the same calls.

    Args:
        rank: of this process, counted from 0; the first one writes, evaluates and speaks for all.
        size: how many there are.
        timeout: seconds that one waits for another.
        first_timeout: seconds that the others wait for what the first one does alone, while it gives signs of life.
    """

    rank: int = 0
    size: int = 1
    timeout: float = RANK_TIMEOUT
    first_timeout: float = FIRST_TIMEOUT
    _parent: int = field(default_factory=os.getppid, repr=False, compare=False)
    _parallel: list[DistributedDataParallel] = field(default_factory=list, repr=False, compare=False)

    @property
    def first(self) -> bool:
        """Whether this is the one that writes, evaluates and speaks."""
        return self.rank == 0

    @property
    def abandoned(self) -> bool:
        """Whether what started this process with the others, such as torchrun, has ended before it."""
        return self.size > 1 and os.getppid() != self._parent

    def share(self, states: TensorDictBase) -> Share:
        """The rows that this process takes of a batch [B, K]: as many as others have, or one more; whole groups.

        Raises:
            ValueError: there are fewer rows, or groups, than processes; the rows of a group lie apart.
        """
        if self.size == 1:
            return Share(slice(None), 1.0)
        bounds = bounds_of_units(states)
        units = len(bounds) - 1
        if units < self.size:
            what = "groups" if keys.GROUP in states.keys() else "rows"
            raise InputError(
                f"a batch has {units} {what} for {self.size} processes: raise trainer.batch_size, or start fewer"
            )
        part = self.part(units)
        first, end = bounds[part.start], bounds[part.stop]
        return Share(slice(first, end), (end - first) / bounds[-1])

    def part(self, units: int) -> slice:
        """What this process takes of so many: as many as others, or one more; none where there are too few."""
        return slice(units * self.rank // self.size, units * (self.rank + 1) // self.size)

    def sums(self, *values: float) -> list[float]:
        """Sum of each value over the processes, in float64, the same to the last bit in all of them."""
        if self.size == 1:
            return [*values]
        x = torch.tensor(values, dtype=torch.float64)
        with self.answered():
            dist.all_reduce(x)
        found: list[float] = x.tolist()
        return found

    def add_up(self, tensors: Sequence[Tensor]) -> None:
        """Put the sums over the processes in the place of tensors, which have the same shapes in all of them."""
        for dtype in dict.fromkeys(x.dtype for x in tensors):
            same = [x for x in tensors if x.dtype == dtype]
            flat = torch.cat([x.flatten() for x in same])
            with self.answered():
                dist.all_reduce(flat)
            parts = flat.split([x.numel() for x in same])
            torch._foreach_copy_(same, [part.view_as(x) for part, x in zip(parts, same, strict=True)])

    def any(self, what: bool) -> bool:
        """Whether it holds in any process."""
        return self.sums(float(what))[0] > 0

    def whole(self, part: Tensor, rows: slice, count: int) -> Tensor:
        """The tensor [count, ...] of which each process has its rows."""
        found = part.new_zeros(count, *part.shape[1:])
        found[rows] = part
        if self.size > 1:
            with self.answered():
                dist.all_reduce(found)
        return found

    def from_first(self, make: Callable[[], Made], what: str) -> Made:
        """What the first process makes, in all of them; the others wait for `first_timeout` while it lives.

        Args:
            make: called in the first process.
            what: that is, for the error.

        Raises:
            RankLost: it takes too long; in the others, where it could not be made; in the first one the error itself.
        """
        if self.size == 1:
            return make()
        if not self.first:
            return cast(Made, self._heard(what))
        try:
            with self._heartbeat(what):
                made = make()
        except RankLost:  # the others know
            raise
        except Exception:
            self._tell("failed")
            raise
        self._tell("made", made)
        return made

    def _late(self, what: str) -> RankLost:
        return RankLost(
            f"the first process has been at {what} for {self.first_timeout:g} s (first_timeout), and is waited for no "
            "longer: if it only needs more time, go on by resume=... with a longer first_timeout"
        )

    def _tell(self, word: str, what: object = None) -> None:
        with self.answered():
            dist.broadcast_object_list([word, what])

    def _heard(self, what: str) -> object:
        """What the first process tells at last."""
        told: list[Any] = ["at it", None]
        while told[0] == "at it":
            with self.answered():
                dist.broadcast_object_list(told)
        if told[0] == "late":
            raise self._late(what)
        if told[0] == "failed":
            raise RankLost("the first process could not go on: see what it says")
        return told[1]

    @contextmanager
    def _heartbeat(self, what: str) -> Iterator[None]:
        """Within, a thread tells the others from time to time that this process is still at it, but not for ever.

        Raises:
            RankLost: it took too long, and the others have ended.
        """
        done, late, end = threading.Event(), threading.Event(), time.monotonic() + self.first_timeout

        def beat() -> None:
            while not late.is_set() and not done.wait(min(self.timeout / 4, end - time.monotonic())):
                if time.monotonic() >= end:
                    late.set()
                try:
                    self._tell("late" if late.is_set() else "at it")
                except RankLost:  # the next that is told raises it, in the main thread
                    return

        thread = threading.Thread(target=beat, name="heartbeat", daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
            if late.is_set():
                raise self._late(what)

    def agree(self, facts: Mapping[str, Any]) -> None:
        """Refuse processes that were given different things.

        Args:
            facts: what must be the same in all of them, by name.

        Raises:
            ValueError: in those where a fact is not that of the first one; it names them.
        """
        mine: dict[str, Any] = json.loads(json.dumps(dict(facts)))
        first = self.from_first(lambda: mine, "what it was given")
        told = ", ".join(
            f"{key} {first.get(key)!r} → {mine.get(key)!r}"
            for key in sorted(first.keys() | mine.keys())
            if first.get(key) != mine.get(key)
        )
        if told:
            raise InputError(
                f"process {self.rank} is not given what process 0 is: {told}; start all with the same words, data and "
                "versions"
            )

    def parallel(self, module: nn.Module, *, unused: bool) -> DistributedDataParallel:
        """The module with gradients that are means over the processes.

        Args:
            module: the same in all of them; it begins with the weights of the first one's.
            unused: whether some parameters get no gradient.
        """
        with self.answered():
            made = DistributedDataParallel(module, forward_sync_buffers=False, find_unused_parameters=unused)
        self._parallel.append(made)
        return made

    def leave(self) -> None:
        """Part from the others."""
        # A reducer that is the last to hold the group of processes ends it under Python's lock, and waits for a thread
        # of gloo that waits for the same lock.
        for module in self._parallel:
            del module.reducer, module.logger
        self._parallel.clear()
        dist.destroy_process_group()

    @contextmanager
    def answered(self) -> Iterator[None]:
        """Tell torch's errors about other processes in one line.

        Raises:
            RankLost: instead of them.
        """
        try:
            yield
        except RuntimeError as error:
            if isinstance(error, DiffrlError) or not (
                isinstance(error, dist.DistError) or OF_PEERS.search(str(error))
            ):
                raise
            raise RankLost(
                f"process {self.rank} of {self.size} lost another one, which ended or did not answer within "
                f"{self.timeout:g} s (rank_timeout): see what the others say; a run continues from its last checkpoint "
                f"by resume=... ({' '.join(str(error).split())[:120]})"
            ) from error

    def device(self, asked: str) -> str:
        """The device of this process: with "cuda" each has a GPU of its own.

        Raises:
            ValueError: one GPU is asked for by all, or there are too few.
        """
        if self.size == 1 or asked == "cpu":
            return asked
        if asked != "cuda":
            raise InputError(
                f"device is {asked!r}, for each of {self.size} processes: give cuda, of which each takes one, or cpu"
            )
        local, found = int(os.environ.get("LOCAL_RANK", self.rank)), torch.cuda.device_count()
        if local >= found:
            raise InputError(
                f"device is 'cuda', and process {local} of this machine has none: {found} are here; start as many "
                "processes as there are (--nproc-per-node), or give cpu"
            )
        torch.cuda.set_device(local)
        return f"cuda:{local}"


ALONE = Ranks()
"""One process."""


def bounds_of_units(states: TensorDictBase) -> list[int]:
    """Where a batch [B, K] may be cut: 0, ..., B; between groups where states have groups, else between any two rows.

    Raises:
        ValueError: rows of a group do not follow each other.
    """
    group = states.get(keys.GROUP, None)
    if group is None:
        return [*range(len(states) + 1)]
    names, counts = torch.unique_consecutive(group.flatten(1)[:, 0], return_counts=True)
    if len(names.unique()) < len(names):
        raise InputError(
            "the rows of a group do not follow each other, so that processes cannot share the batch"
        )
    return [0, *counts.cumsum(0).tolist()]


@contextmanager
def joined(device: str, timeout: float, first_timeout: float = FIRST_TIMEOUT) -> Iterator[Ranks]:
    """Meet the processes that torchrun started with this one, on gloo, and NCCL for what lies on GPUs.

    Args:
        device: where each will work, such as "cpu" or "cuda".
        timeout: seconds that one waits for another, in (0, 1e6].
        first_timeout: seconds that the others wait for what the first one does alone, in (0, 1e6].

    Raises:
        ValueError: they were not started by torchrun, or have met already; see `Ranks.device`.
        RankLost: they do not meet.
    """
    require_number("rank_timeout", timeout, 0, 1e6, "(]")
    require_number("first_timeout", first_timeout, 0, 1e6, "(]")
    size = ranks_started()
    if size == 1:
        yield ALONE
        return
    if missing := [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]:
        raise InputError(
            f"WORLD_SIZE is {size}, but {', '.join(missing)} is not set: start the processes by torchrun, or unset it"
        )
    if dist.is_initialized():
        raise InputError("torch.distributed is set up already: leave that to the run")
    ranks = Ranks(own_rank(), size, timeout, first_timeout)
    ranks.device(device)
    backend = "gloo" if device == "cpu" else "cpu:gloo,cuda:nccl"
    limit, launched = timedelta(seconds=timeout), os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    with ranks.answered():
        soon = timedelta(seconds=min(timeout, LAUNCHER_TIMEOUT)) if launched else limit
        store, rank, _ = next(dist.rendezvous("env://", timeout=soon))
        store.set_timeout(limit)
        # where torchrun starts its processes again, the store still has the addresses of the dead ones
        store = dist.PrefixStore(f"attempt_{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=limit)
    try:
        yield ranks
    finally:
        ranks.leave()
