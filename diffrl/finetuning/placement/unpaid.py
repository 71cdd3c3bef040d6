"""No rewards at all: for methods that learn from a teacher."""

from dataclasses import dataclass

import torch
from tensordict import TensorDictBase
from torch import Tensor

from diffrl.finetuning.placement.base import Placement
from diffrl.finetuning.placement.registry import PLACEMENTS
from diffrl.rewards.calls import Reward

__all__ = ["Unpaid"]


@PLACEMENTS.register("unpaid")
@dataclass(frozen=True)
class Unpaid(Placement):
    """Every reward is 0, and the reward is never asked: what a recipe without a reward collects."""

    def __call__(self, rollout: TensorDictBase, reward: Reward) -> Tensor:
        """Zeros."""
        return torch.zeros(*rollout.shape, 1, device=rollout.device)

    def queries(self, num_steps: int) -> int:
        """0."""
        return 0
