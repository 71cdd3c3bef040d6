"""Ratios of run times on a machine that is not idle: interleaved runs, their median and an interval."""

import gc
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from diffrl.metrics.seeds import bootstrap_interval

__all__ = ["Ratio", "interleave"]

Seconds = Mapping[str, NDArray[np.float64]]


@dataclass(frozen=True)
class Ratio:
    """Median over rounds of one time over another of the same round, with its 95 % bootstrap interval."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, seconds: Seconds, numerator: str, denominator: str) -> "Ratio":
        """Of two of the variants that `interleave` timed."""
        ratios = seconds[numerator] / seconds[denominator]
        return cls(float(np.median(ratios)), *bootstrap_interval(ratios, statistic=np.median))

    def __str__(self) -> str:
        return self.written(2 if self.median < 10 else 1)

    def written(self, digits: int) -> str:
        """With so many digits after the point."""
        return f"{self.median:.{digits}f} [{self.low:.{digits}f}, {self.high:.{digits}f}]"


def interleave(
    variants: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    repeats: int = 1,
    warm_up: int = 3,
    clock: Callable[[], float] = time.process_time,
) -> Seconds:
    """Time all variants in every round, a few calls at a time, forwards and backwards in turn.

    What is taken is the processor time of this process, unless another clock is given: other jobs can only disturb it
    through the caches, and they disturb the variants of one round alike.

    Args:
        variants: name → what to time.
        rounds: R, the number of ratios to be had.
        repeats: calls in a row that make one time.
        warm_up: calls of each variant before the first round.
        clock: in seconds.

    Returns:
        name → seconds per call in each round, shape [R].
    """
    for call in variants.values():
        for _ in range(warm_up):
            call()
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    names = list(variants)
    gc.collect()
    for r in range(rounds):
        for name in names if r % 2 == 0 else reversed(names):
            call = variants[name]
            start = clock()
            for _ in range(repeats):
                call()
            seconds[name].append((clock() - start) / repeats)
    return {name: np.array(values) for name, values in seconds.items()}
