"""A placement in one file: the final reward, spread evenly over the last steps."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from tensordict import TensorDictBase
from torch import Tensor

from diffrl import keys
from diffrl.finetuning.placement.base import Placement
from diffrl.finetuning.placement.registry import PLACEMENTS
from diffrl.finetuning.policy import DenoisingPolicy
from diffrl.finetuning.rollouts.base import trajectory_condition
from diffrl.rewards.calls import Reward


@PLACEMENTS.register("toy_placement")
@dataclass(frozen=True)
class Spread(Placement):
    """r_i = R(x_K)/share for the last `share` steps."""

    dense: ClassVar[bool] = True
    share: int = 2

    def __call__(self, rollout: TensorDictBase, reward: Reward) -> Tensor:
        R = torch.as_tensor(reward(rollout.get((keys.NEXT, keys.X_T))[:, -1], trajectory_condition(rollout)))
        r = torch.zeros(*rollout.shape, 1)
        r[:, -self.share :] = R[:, None, None] / self.share
        return r

    def queries(self, num_steps: int) -> int:
        return 1

    def refuses(self, policy: DenoisingPolicy) -> str | None:
        return "placement.share is longer than the chain" if self.share > policy.num_steps else None
