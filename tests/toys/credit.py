"""A credit in one file: ranks."""

from dataclasses import dataclass

from tensordict import TensorDictBase
from torch import Tensor

from diffrl.finetuning.credit.base import Credit
from diffrl.finetuning.credit.registry import CREDITS


@CREDITS.register("toy_credit")
@dataclass
class Ranks(Credit):
    """adv = scale (2 rank(R)/(B-1) - 1): what counts is the order of the rewards alone.

    Args:
        scale: of the advantages, > 0.
    """

    min_group = 4
    scale: float = 1.0

    @property
    def takes_dense(self) -> bool:
        return False

    def __call__(self, rollout: TensorDictBase, reward: Tensor) -> Tensor:
        R = reward.sum((1, 2))
        self.raw_std = float(R.std(correction=0))
        rank = R.argsort().argsort().to(R)
        return (self.scale * (2 * rank / (len(R) - 1) - 1))[:, None, None].expand_as(reward)
