"""Rewards that a rollout brings with it, such as recorded preferences."""

from dataclasses import dataclass

from tensordict import TensorDictBase
from torch import Tensor

from diffrl import keys
from diffrl.finetuning.placement.registry import PLACEMENTS
from diffrl.finetuning.placement.terminal import Terminal
from diffrl.rewards.calls import Reward

__all__ = ["Recorded"]


@PLACEMENTS.register("recorded")
@dataclass(frozen=True)
class Recorded(Terminal):
    """What was recorded with the samples is paid, and no reward is asked.

    The preferred sample of a pair gets 1, the other one 0. Samples that the policy draws have no record: the reward
    judges them, as by `Terminal`.
    """

    def __call__(self, rollout: TensorDictBase, reward: Reward) -> Tensor:
        """No query for a rollout of `RecordedPairs`, else one a trajectory."""
        recorded = rollout.get((keys.NEXT, keys.REWARD), None)
        return super().__call__(rollout, reward) if recorded is None else recorded
