"""What a placement is: it asks a reward about a rollout and pays the steps."""

from abc import ABC, abstractmethod
from typing import ClassVar

from tensordict import TensorDictBase
from torch import Tensor

from diffrl.finetuning.piece import Piece
from diffrl.rewards.calls import Reward

__all__ = ["Placement"]


class Placement(Piece, ABC):
    """Asks a reward about a rollout and pays its steps."""

    dense: ClassVar[bool] = False
    """Whether steps before the last are paid."""

    @abstractmethod
    def __call__(self, rollout: TensorDictBase, reward: Reward) -> Tensor:
        """Rewards r of the steps of a rollout [B, K], float32 [B, K, 1]."""

    @abstractmethod
    def queries(self, num_steps: int) -> int:
        """Reward queries of a trajectory of K = num_steps steps."""
