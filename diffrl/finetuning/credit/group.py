"""Returns or step rewards relative to a group of trajectories with one condition: the credit of GRPO."""

import math
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from tensordict import TensorDictBase
from torch import Tensor

from diffrl import keys
from diffrl.errors import InputError
from diffrl.finetuning.credit.base import Credit
from diffrl.finetuning.credit.registry import CREDITS
from diffrl.rl.advantages import group_advantages

__all__ = ["GroupRelative"]


@CREDITS.register("group")
@dataclass
class GroupRelative(Credit):
    """Rewards minus the mean of their group, over a standard deviation: see `group_advantages`.

        of "trajectory":  adv_i = (R - mean_group)/(std + 1e-4),    R = Σ_i r_i, the same for all its steps
        of "step":        adv_i = (r_i - mean_group,i)/(std_i + 1e-4), each step among the same steps of its group
        of "pooled":      adv_i = (r_i - mean_group)/(std + 1e-4), each step among all steps of its group

    Pooled, a step whose rewards vary more moves the policy more, and steps that mostly gain are favoured as such.

    Source: DeepSeekMath (Shao et al., 2024), section 4.1.1, https://arxiv.org/abs/2402.03300; on denoising chains:
    Flow-GRPO (Liu et al., 2025), eq. 4, https://arxiv.org/abs/2505.05470; of steps, pooled and, as an ablation, by
    "step": Stepwise Credit Assignment for GRPO on Flow-Matching Models (Savani et al., 2026),
    https://arxiv.org/abs/2603.28718.

    Args:
        std: standard deviation to divide by: of the "group", "global" over all groups, or "none".
        of: what is compared in a group: the return of a "trajectory", the reward of each "step", or those of all
            steps "pooled".

    Raises:
        ValueError: an unknown choice.
    """

    shared: ClassVar[bool] = True
    min_group: ClassVar[int] = 2
    std: Literal["group", "global", "none"] = "group"
    of: Literal["trajectory", "step", "pooled"] = "trajectory"
    raw_std: float = field(init=False, default=math.nan, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.std not in ("group", "global", "none"):
            raise InputError(f"credit.std is {self.std!r}: give 'group', 'global' or 'none'")
        if self.of not in ("trajectory", "step", "pooled"):
            raise InputError(f"credit.of is {self.of!r}: give 'trajectory', 'step' or 'pooled'")

    @property
    def takes_dense(self) -> bool:
        """Yes, if steps are compared with steps."""
        return self.of != "trajectory"

    def __call__(self, rollout: TensorDictBase, reward: Tensor) -> Tensor:
        """Advantages of the steps."""
        group = rollout.get(keys.GROUP)[:, 0, 0]
        values = reward.squeeze(-1) if self.of == "step" else reward.sum((1, 2))
        if self.of == "pooled":
            values, group = reward.flatten(), group.repeat_interleave(reward.shape[1])
        self.raw_std = float(group_advantages(values, group, std="none").std(correction=0))
        adv = group_advantages(values, group, std=self.std)
        return adv[:, None, None].expand_as(reward) if self.of == "trajectory" else adv.view_as(reward)

    def centred_over(self, *, one_condition: bool) -> Literal["group"] | None:
        """Each group has mean 0, unless all its steps have it together."""
        return None if self.of == "pooled" else "group"
