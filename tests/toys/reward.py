"""A reward in one file: the mean of a sample."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from diffrl.rewards import REWARDS


@REWARDS.register("toy_reward")
@dataclass
class Mean:
    """R = scale · mean(x_0).

    Args:
        scale: of the rewards.
    """

    scale: float = 1.0

    def __call__(self, x0: Tensor, cond: Any = None) -> Tensor:
        return self.scale * x0.flatten(1).mean(1)
