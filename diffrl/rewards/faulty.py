"""A reward that fails on purpose, to see what a run does then."""

import math
import time
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from diffrl.errors import InputError
from diffrl.rewards.registry import REWARDS

__all__ = ["Faulty"]


@REWARDS.register("faulty")
@dataclass
class Faulty:
    """A reward that fails on purpose: the mean of each sample, with one fault in each call.

    Args:
        kind: what is wrong: the first number is NaN ("nan"), infinite ("inf") or None ("none"), the numbers have
            shape [N, 1] ("shape"), an "exception" is raised, or the call takes `seconds` ("hang").
        calls: the first so many calls fail, the later ones do not; None: all fail.
        seconds: how long "hang" takes.

    Raises:
        ValueError: an unknown kind.
    """

    kind: Literal["nan", "inf", "none", "shape", "exception", "hang"] = "nan"
    calls: int | None = None
    seconds: float = 60.0

    def __post_init__(self) -> None:
        kinds = ("nan", "inf", "none", "shape", "exception", "hang")
        if self.kind not in kinds:
            raise InputError(f"kind is {self.kind!r}: give one of {', '.join(kinds)}")
        self._count = 0

    def __call__(self, x0: Tensor, cond: Any = None) -> Any:
        """Rewards of samples [N, *E]: N numbers, or what the kind says."""
        self._count += 1
        numbers = x0.flatten(1).double().mean(1).tolist()
        if self.calls is not None and self._count > self.calls:
            return numbers
        if self.kind == "exception":
            raise RuntimeError("this reward is faulty")
        if self.kind == "hang":
            time.sleep(self.seconds)
        if self.kind == "shape":
            return [[number] for number in numbers]
        wrong = {"nan": math.nan, "inf": math.inf, "none": None}
        return [wrong[self.kind], *numbers[1:]] if self.kind in wrong else numbers
