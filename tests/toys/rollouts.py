"""A rollout plan in one file: noise at the first steps only."""

from dataclasses import dataclass
from typing import Any

import torch
from tensordict import TensorDict

from diffrl.finetuning.policy import DenoisingPolicy
from diffrl.finetuning.rollouts.base import RolloutPlan
from diffrl.finetuning.rollouts.chains import collect_rollout
from diffrl.finetuning.rollouts.registry import ROLLOUTS


@ROLLOUTS.register("toy_rollouts")
@dataclass(frozen=True)
class EarlyNoise(RolloutPlan):
    """Chains whose first steps have noise, and no others.

    Args:
        trajectories: B.
        noisy: how many steps.
    """

    trajectories: int = 64
    noisy: int = 2

    def refuses(self, policy: DenoisingPolicy) -> str | None:
        few = self.noisy < 1 or self.noisy > policy.num_steps
        return f"rollouts.noisy is {self.noisy}: the policy has {policy.num_steps} steps" if few else None

    def collect(self, policy: DenoisingPolicy, event_shape: tuple[int, ...], **options: Any) -> TensorDict:
        n = options.pop("trajectories")
        mask = (torch.arange(policy.num_steps) < self.noisy).expand(n, -1)
        return collect_rollout(policy, event_shape, batch_size=n, stochastic=mask, **options)
