"""Rewards at every step of a chain for what the step adds to the reward of the clean estimate."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from tensordict import TensorDictBase
from torch import Tensor

from diffrl import keys
from diffrl.finetuning.placement.base import Placement
from diffrl.finetuning.placement.registry import PLACEMENTS
from diffrl.finetuning.placement.similarity import predict_dense
from diffrl.finetuning.rollouts.base import trajectory_condition
from diffrl.rewards.calls import Reward

__all__ = ["Gains"]


@PLACEMENTS.register("gains")
@dataclass(frozen=True)
class Gains(Placement):
    """Every step is paid what it adds to the reward of the clean estimate, and takes a loss for what it spoils.

        r_i = R(x̂_{i+1}) - R(x̂_i),    x̂_K = x_K,    Σ_i r_i = R(x_K) - R(x̂_0)

    These are the one-step TD errors of a critic that needs no learning, V(x_i) = R(x̂_i). The credit ``group`` takes
    them as they are (``of=pooled``, as published) or compares each step with its like (``of=step``);
    ``rewards_to_go`` makes TD(λ) of them, γ being λ: at 1, the last reward with R(x̂_i) as baseline.

    Source: Stepwise Credit Assignment for GRPO on Flow-Matching Models (Savani et al., 2026),
    https://arxiv.org/abs/2603.28718, where x̂_i is refined by five more steps of the ODE. Ours is the denoiser's
    estimate as the chain recorded it: no further network evaluations, and a cruder R(x̂_i) while noise is strong.
    """

    dense: ClassVar[bool] = True
    shared: ClassVar[bool] = True

    def __call__(self, rollout: TensorDictBase, reward: Reward) -> Tensor:
        """K + 1 queries a trajectory, in one call."""
        x_hat = torch.cat([rollout.get(keys.X0_HAT), rollout.get((keys.NEXT, keys.X_T))[:, -1:]], 1)
        R = predict_dense(x_hat, reward, trajectory_condition(rollout), mode="all")
        return (R[:, 1:] - R[:, :-1])[..., None]

    def queries(self, num_steps: int) -> int:
        """K + 1: the estimate of every state, and the sample."""
        return num_steps + 1
