"""What a credit is: rewards of a rollout in, an advantage for every step out."""

import math
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from tensordict import TensorDictBase
from torch import Tensor

from diffrl.finetuning.piece import Piece, Setting

if TYPE_CHECKING:
    from diffrl.finetuning.recipe import Recipe

__all__ = ["Credit"]


class Credit(Piece, ABC):
    """Gives every step an advantage. What it remembers over rollouts is saved with the run.

    A subclass sets the class variables that differ for it, and `raw_std` at every call.
    """

    min_group: ClassVar[int] = 1
    """Trajectories that must share a condition."""

    raw_std: float = math.nan
    """Standard deviation of the latest advantages before they were scaled, in units of the reward."""

    @property
    def takes_dense(self) -> bool:
        """Whether each step keeps the reward that it is paid, so that dense rewards make a difference."""
        return True

    @abstractmethod
    def __call__(self, rollout: TensorDictBase, reward: Tensor) -> Tensor:
        """Advantages [B, K, 1] of the steps of a rollout [B, K] that were paid `reward` [B, K, 1]."""

    def prepare(self, setting: Setting) -> None:  # noqa: B027 (most credits have nothing to prepare)
        """Build what the credit needs for a run; called once, before everything else."""

    def centred_over(self, *, one_condition: bool) -> Literal["group", "batch"] | None:
        """What the advantages of a first rollout have mean 0 over, step by step; None where they need not.

        Args:
            one_condition: whether all trajectories share their condition.
        """
        return None

    def conflict(self, recipe: "Recipe") -> str | None:
        """Refuse groups that are too small, and dense rewards that would only be summed."""
        if recipe.rollouts.rows_of_a_group < self.min_group:
            return (
                f"{type(self).__name__} compares trajectories of one group, at least {self.min_group}: "
                "set rollouts.group_size"
            )
        if recipe.placement.dense and not self.takes_dense:
            return (
                f"{type(self).__name__} gives a whole trajectory one advantage, so dense rewards would only be "
                "summed: take credit rewards_to_go or critic, or placement terminal"
            )
        return None

    def state_dict(self) -> dict[str, Any]:
        """What it remembers: tensors and numbers."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:  # noqa: B027 (nothing to take)
        """Continue from `state_dict`."""
