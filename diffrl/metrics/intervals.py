"""A figure over seeds: its interquartile mean and the 95 % bootstrap interval around it."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from diffrl.metrics.seeds import bootstrap_interval, iqm

__all__ = ["Interval", "interval"]


class Interval(NamedTuple):
    """Interquartile mean over seeds and its 95 % bootstrap interval; the ends are None for one seed.

    Formatted, both are shown with the number format that is given.

    >>> f"{Interval(0.6213, 0.58, 0.66):.2f}"
    '0.62 [0.58, 0.66]'
    >>> f"{Interval(0.6213, None, None):.2f}"
    '0.62'
    """

    iqm: float
    low: float | None
    high: float | None

    def __format__(self, form: str) -> str:
        if self.low is None or self.high is None:
            return format(self.iqm, form)
        return f"{self.iqm:{form}} [{self.low:{form}}, {self.high:{form}}]"


def interval(x: Sequence[float] | NDArray[np.float64]) -> Interval:
    """The interval of a figure that was taken once at each seed.

    Args:
        x: the figure at each seed, at least one.

    Raises:
        ValueError: no seed, or NaN or infinity at one of several seeds.
    """
    if len(x) < 2:
        return Interval(float(iqm(x)), None, None)
    return Interval(float(iqm(x)), *bootstrap_interval(x))
