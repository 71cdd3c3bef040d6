"""Which of a group is better, and not by how much: the credit of methods that learn from preferences."""

import math
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from tensordict import TensorDictBase
from torch import Tensor

from diffrl import keys
from diffrl.finetuning.credit.base import Credit
from diffrl.finetuning.credit.registry import CREDITS
from diffrl.rl.advantages import group_advantages

__all__ = ["Preference"]


@CREDITS.register("preference")
@dataclass
class Preference(Credit):
    """The sign of the return's distance to the mean of its group, centred again.

        b_i = sign(R_i - mean_group R),    adv_i = b_i - mean_group b,    R = Σ_i r_i

    Of a pair the better one has 1, the other -1, and both of a tie 0, so that a tie teaches nothing.

    Sources: pairs: Diffusion Model Alignment Using Direct Preference Optimization (Wallace et al., 2024), section 4,
    https://arxiv.org/abs/2311.12908; groups: the code of TDM-R1 (Luo et al., 2026), https://arxiv.org/abs/2603.07700.
    """

    min_group: ClassVar[int] = 2
    raw_std: float = field(init=False, default=math.nan, repr=False, compare=False)

    @property
    def takes_dense(self) -> bool:
        """No: a whole trajectory is better or worse."""
        return False

    def __call__(self, rollout: TensorDictBase, reward: Tensor) -> Tensor:
        """Advantages of the steps, the same for all steps of a trajectory."""
        group, R = rollout.get(keys.GROUP)[:, 0, 0], reward.double().sum((1, 2))
        distance = group_advantages(R, group, std="none")
        self.raw_std = float(distance.std(correction=0))
        adv = group_advantages(distance.sign(), group, std="none").to(reward)
        return adv[:, None, None].expand_as(reward)

    def centred_over(self, *, one_condition: bool) -> Literal["group"]:
        """Each group has mean 0."""
        return "group"
