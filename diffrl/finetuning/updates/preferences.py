"""Updates on boundaries, with others beside them on which the groups' samples are compared."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Generator, Tensor

from diffrl import keys
from diffrl.errors import InputError
from diffrl.finetuning.policy import DenoisingPolicy
from diffrl.finetuning.updates.boundaries import BoundaryUpdates, draw_times
from diffrl.finetuning.updates.registry import UPDATES
from diffrl.ranges import require_number

if TYPE_CHECKING:
    from diffrl.finetuning.recipe import Recipe

__all__ = ["PREFERENCE", "REWARD_NOISE", "REWARD_T", "PreferenceUpdates"]

PREFERENCE = "preference"  # boundaries on which a group is compared, TensorDict [n, m]
REWARD_T, REWARD_NOISE = "reward_t", "reward_noise"  # a second time and noise for the boundaries of an update


@UPDATES.register("preferences")
@dataclass(frozen=True)
class PreferenceUpdates(BoundaryUpdates):
    """`BoundaryUpdates` that keep groups whole, with boundaries x_{j+1} on which each group is compared.

        P(j) ∝ j+1,    t and j shared by the whole update or by each group, the noise by each group

    A second time and noise for the boundaries x_{k+1}, shared in the same way, are where the learnt reward is asked.

    Source: TDM-R1 (Luo et al., 2026), https://arxiv.org/abs/2603.07700, and its code.

    Args:
        interval: of the first noise, see `BoundaryUpdates`.
        draws: see there.
        margin: see there.
        minibatches: see there.
        passes: see there.
        micro_batch: see there.
        compared: the boundaries on which groups are compared: "all", or the "clean" samples only.
        times: what shares a time and a j: the whole "update", or each "group".
        preference_t_min: least time at which groups are compared, in the process's time.
        reward_t_min: least time at which the learnt reward is asked.

    Raises:
        ValueError: an argument outside its range.
    """

    unit: ClassVar[Literal["boundaries", "preferences"]] = "preferences"
    interval: Literal["trajectory", "reverse"] = "reverse"
    draws: int = 2
    compared: Literal["all", "clean"] = "all"
    times: Literal["update", "group"] = "update"
    preference_t_min: float = 0.55
    reward_t_min: float = 0.25

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.compared not in ("all", "clean"):
            raise InputError(f"updates.compared is {self.compared!r}: give 'all' or 'clean'")
        if self.times not in ("update", "group"):
            raise InputError(f"updates.times is {self.times!r}: give 'update' or 'group'")
        for name in ("preference_t_min", "reward_t_min"):
            require_number(f"updates.{name}", getattr(self, name), 0)

    def conflict(self, recipe: "Recipe") -> str | None:
        """Refuse trajectories without groups."""
        if recipe.rollouts.rows_of_a_group < 2:
            return "preferences compare trajectories of one group: set rollouts.group_size"
        return super().conflict(recipe)

    def refuses(self, policy: DenoisingPolicy) -> str | None:
        """Refuse least times that no time of the policy reaches."""
        for name in ("preference_t_min", "reward_t_min"):
            if getattr(self, name) >= policy.grid[0]:
                return f"updates.{name} is {getattr(self, name):g}, but the first time is {policy.grid[0]:g}: give less"
        return super().refuses(policy)

    def _minibatch(
        self, rollout: TensorDictBase, k: Tensor, policy: DenoisingPolicy, generator: Generator
    ) -> TensorDict:
        """Boundaries [n, m], the second time and noise of them, and those on which groups are compared."""
        part = super()._minibatch(rollout, k, policy, generator)
        _, member = rollout.get(keys.GROUP)[:, 0, 0].cpu().unique(return_inverse=True)
        (n, m), groups, K = k.shape, int(member.max()) + 1, rollout.shape[1]
        # rows of one unit share time and j
        unit, units = (member, groups) if self.times == "group" else (torch.zeros_like(member), 1)
        u = torch.rand(2, units, m, generator=generator)[:, unit]
        likelihood = torch.arange(1.0, K + 1).expand(units, K)
        j = torch.multinomial(likelihood, m, replacement=True, generator=generator)[unit]
        j = torch.full_like(j, K - 1) if self.compared == "clean" else j
        compared = rollout[torch.arange(n)[:, None].to(rollout.device), j.to(rollout.device)].select(
            keys.INDEX,
            (keys.NEXT, keys.X_T),
            (keys.NEXT, keys.T),
            keys.ADVANTAGE,
            keys.COND,
            keys.GROUP,
            strict=False,
        )
        k, j = (of.get(keys.INDEX).squeeze(-1).cpu() for of in (part, compared))
        reward_t = draw_times(policy, k, "reverse", self.margin, u[0], t_min=self.reward_t_min)
        t = draw_times(policy, j, "reverse", self.margin, u[1], t_min=self.preference_t_min)
        shape = (2, groups, *part.get(keys.X_T).shape[1:])
        shared = torch.randn(shape, generator=generator)[:, member].to(rollout.device)
        compared.update({keys.RENOISE_T: t[..., None].to(rollout.device), keys.NOISE: shared[1]})
        return part.update(
            {REWARD_T: reward_t[..., None].to(rollout.device), REWARD_NOISE: shared[0], PREFERENCE: compared}
        )
