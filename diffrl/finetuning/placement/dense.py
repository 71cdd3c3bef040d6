"""Rewards at every step of a chain, for the clean estimates along it."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from tensordict import TensorDictBase
from torch import Tensor

from diffrl import keys
from diffrl.errors import InputError
from diffrl.finetuning.placement.base import Placement
from diffrl.finetuning.placement.registry import PLACEMENTS
from diffrl.finetuning.placement.similarity import DenseMode, dense_queries, predict_dense
from diffrl.finetuning.policy import DenoisingPolicy
from diffrl.finetuning.rollouts.base import trajectory_condition
from diffrl.rewards.calls import Reward

__all__ = ["Dense"]


@PLACEMENTS.register("dense")
@dataclass(frozen=True)
class Dense(Placement):
    """Every step is paid for a clean estimate, queried or predicted from few: see `predict_dense`.

        timing "state":  r_i = R̂(x̂_i)        the estimate that step i starts from, as published
        timing "next":   r_i = R̂(x̂_{i+1}),   r_{K-1} = R(x_K): what step i leads to

    x̂_i is a function of x_i alone, so with "state" the reward of a step does not depend on its own noise: only
    later rewards teach it, and the last step learns nothing.

    Source: Aligning Few-Step Diffusion Models with Dense Reward Difference Learning (Zhang et al., 2024),
    https://arxiv.org/abs/2411.11727; "next" is ours.

    Args:
        mode: what to query: "anchor" (3 a trajectory), "linear" (2), "last" (1) or "all" (K).
        timing: "state" or "next".
        interior: where the anchor is looked for.
        guarded: whether similarities below 0 count as 0; False is the published form.

    Raises:
        ValueError: an unknown mode or timing.
    """

    dense: ClassVar[bool] = True
    shared: ClassVar[bool] = True
    mode: DenseMode = "anchor"
    timing: Literal["state", "next"] = "state"
    interior: bool = True
    guarded: bool = True

    def __post_init__(self) -> None:
        dense_queries(self.mode, 1)
        if self.timing not in ("state", "next"):
            raise InputError(f"placement.timing is {self.timing!r}: give 'state' or 'next'")

    def __call__(self, rollout: TensorDictBase, reward: Reward) -> Tensor:
        """`queries` queries a trajectory."""
        x_hat = rollout.get(keys.X0_HAT)
        if self.timing == "next":
            x_hat = torch.cat([x_hat[:, 1:], rollout.get((keys.NEXT, keys.X_T))[:, -1:]], 1)
        options = {"mode": self.mode, "interior": self.interior, "guarded": self.guarded}
        return predict_dense(x_hat, reward, trajectory_condition(rollout), **options)[..., None]  # type: ignore[arg-type]

    def queries(self, num_steps: int) -> int:
        """As `dense_queries`."""
        return dense_queries(self.mode, num_steps)

    def refuses(self, policy: DenoisingPolicy) -> str | None:
        """Refuse a policy of one step, whose reward would not depend on what it does."""
        if self.timing == "state" and policy.num_steps == 1:
            return (
                "with one step, a reward of the state it starts from says nothing of the step: give "
                "placement.timing=next, or placement terminal"
            )
        return None
