"""How long a comparison will take, and how much memory: from runs that are finished, or from a few steps."""

import sys
import time
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np

from diffrl.experiments.run import Job
from diffrl.registry import Config
from diffrl.workers import Failure, run_tasks

__all__ = ["Kind", "Pace", "estimate", "measure", "peak_memory"]

STEPS = 3  # that are timed, after one that is not
LONGEST = 20.0  # seconds of trying, all kinds together


class Kind(NamedTuple):
    """Runs that take as long as each other: those that differ in their seed, or in their learning rate."""

    opened: Callable[[Config], Job]
    """A run in no folder; importable from other processes."""
    config: Config
    steps: int
    """Of each run."""
    left: int
    """Runs that are not finished."""
    known: Sequence[float]
    """Seconds that finished ones took."""


class Pace(NamedTuple):
    """What a few steps took."""

    step: float
    """Seconds of a step."""
    evaluation: float
    """Seconds of an evaluation."""
    eval_every: int
    memory: int
    """Most bytes that the process has held so far; 0 where the system does not tell."""

    def seconds(self, steps: int) -> float:
        """Of a run of so many steps, without what is drawn at its end."""
        return steps * self.step + (1 + steps // self.eval_every) * self.evaluation


def measure(task: tuple[Callable[[Config], Job], Config]) -> Pace:
    """The pace of a run, by a few steps of it and one evaluation."""
    opened, config = task
    job = opened({**config, "run_dir": None, "resume": None})
    begun = time.perf_counter()
    job.evaluate()
    evaluation, steps = time.perf_counter() - begun, job.loop.steps()
    next(steps)  # the first is slow
    begun = time.perf_counter()
    done = sum(1 for _ in islice(steps, STEPS))
    step = (time.perf_counter() - begun) / max(done, 1)
    return Pace(step, evaluation, job.loop.length.eval_every, peak_memory())


def estimate(
    kinds: Sequence[Kind],
    *,
    workers: int,
    stop: Callable[[], bool],
    at_most: bool = False,
    tries: bool = True,
) -> str | None:
    """One line for people on what is to come; None if nothing is, or nothing could be tried.

    Args:
        kinds: of the runs.
        workers: processes side by side; 0 for this one.
        stop: whether the user wants to end.
        at_most: whether some of the runs may turn out to be one.
        tries: whether kinds of which no run is finished are tried for a few steps.
    """
    todo = [kind for kind in kinds if kind.left]
    untried = [kind for kind in todo if not kind.known]
    paces, end = dict[int, Pace](), time.monotonic() + LONGEST
    tasks = [(kind.opened, kind.config) for kind in untried if tries]
    for i, found in run_tasks(measure, tasks, workers=workers, stop=lambda: stop() or time.monotonic() > end):
        if not isinstance(found, Failure):  # the run itself will say why
            paces[i] = found
    runs, timed = sum(kind.left for kind in todo), [kind for kind in todo if kind.known]
    each = [(float(np.mean(kind.known)), kind) for kind in timed]
    each += [(pace.seconds(untried[i].steps), untried[i]) for i, pace in paces.items()]
    if not each:
        return None
    side_by_side = min(max(workers, 1), runs)
    mean = sum(seconds * kind.left for seconds, kind in each) / sum(kind.left for _, kind in each)
    total = mean * runs / side_by_side
    memory = max((pace.memory for pace in paces.values()), default=0) * side_by_side
    holds = f" and {memory / 2**30:.1f} GiB of memory" if memory else ""
    left = f"{'at most ' if at_most else ''}{_count(runs, 'run')} left, {side_by_side} at a time"
    return f"{left}: about {_time(total)}{holds}, by {_basis(timed, paces, todo)}"


def _basis(timed: Sequence[Kind], paces: dict[int, Pace], todo: Sequence[Kind]) -> str:
    """What an estimate rests on, and how far it can be trusted."""
    parts = []
    if timed:
        parts.append(f"finished runs of {_count(len(timed), 'kind')} (± a quarter)")
    if paces:
        parts.append(
            f"{STEPS} steps and one evaluation of {_count(len(paces), 'kind')} (within a factor of two; samples at the "
            "end of each run come on top)"
        )
    rest = len(todo) - len(timed) - len(paces)
    return " and ".join(parts) + (f"; not tried: {_count(rest, 'kind')}" if rest else "")


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _time(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def peak_memory() -> int:
    """Most bytes that this process has held so far; 0 on systems that do not tell."""
    status = Path("/proc/self/status")  # Linux, whose getrusage starts with what the parent held
    if status.exists():
        lines = status.read_text(encoding="utf-8").splitlines()
        return sum(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
    if sys.platform == "win32":
        return 0
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
