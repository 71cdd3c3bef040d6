"""Flow-GRPO and Flow-CPS: PPO on groups of trajectories of a flow's stochastic sampler, held by a KL term."""

from typing import Any

from diffrl.finetuning.credit.group import GroupRelative
from diffrl.finetuning.methods.ddpo import PPOClip
from diffrl.finetuning.methods.registry import METHODS
from diffrl.finetuning.placement.terminal import Terminal
from diffrl.finetuning.recipe import Recipe, Regulariser
from diffrl.finetuning.rollouts.chains import Rollouts
from diffrl.finetuning.updates.steps import Updates

__all__ = ["flow_grpo"]


@METHODS.register("flow_grpo", label="Flow-GRPO")
def flow_grpo(**pieces: Any) -> Recipe:
    """Flow-GRPO: groups of 24, two updates a rollout, all stochastic steps but the last, KL by time.

    Give the policy the sampler `FlowSDE`; with `CPS` in its place it is Flow-CPS.

    Sources: Flow-GRPO: Training Flow Matching Models via Online RL (Liu et al., 2025) and its code,
    https://arxiv.org/abs/2505.05470; Coefficients-Preserving Sampling for Reinforcement Learning with Flow Matching
    (Wang & Yu, 2025), https://arxiv.org/abs/2509.05952.

    Args:
        **pieces: of `Recipe`, in place of the published ones.
    """
    published = {
        "rollouts": Rollouts(trajectories=48 * 24, group_size=24),
        "placement": Terminal(),
        "credit": GroupRelative(std="global"),
        "updates": Updates(minibatches=2, drop_last=1),
        "surrogate": PPOClip(),
        "regulariser": Regulariser(kl_coef=0.04, by_time=True),
    }
    return Recipe(**{**published, **pieces})
