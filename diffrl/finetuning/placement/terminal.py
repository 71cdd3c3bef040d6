"""Rewards at the end of a chain, for the sample that it came to."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from tensordict import TensorDictBase
from torch import Tensor

from diffrl import keys
from diffrl.finetuning.placement.base import Placement
from diffrl.finetuning.placement.registry import PLACEMENTS
from diffrl.finetuning.rollouts.base import trajectory_condition
from diffrl.rewards.calls import Reward

__all__ = ["Terminal"]


@PLACEMENTS.register("terminal")
@dataclass(frozen=True)
class Terminal(Placement):
    """The last step is paid for the sample that it draws: r_{K-1} = R(x_K, c), all others 0.

    Source: Training Diffusion Models with Reinforcement Learning (Black et al., 2024), section 4.2,
    https://arxiv.org/abs/2305.13301.
    """

    shared: ClassVar[bool] = True

    def __call__(self, rollout: TensorDictBase, reward: Reward) -> Tensor:
        """One query a trajectory."""
        x_K = rollout.get((keys.NEXT, keys.X_T))[:, -1]
        r = torch.zeros(*rollout.shape, 1, device=x_K.device)
        r[:, -1, 0] = torch.as_tensor(reward(x_K, trajectory_condition(rollout))).to(r)
        return r

    def queries(self, num_steps: int) -> int:
        """1."""
        return 1
