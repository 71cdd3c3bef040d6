"""D3PO: the preferred one of two trajectories is preferred at every step."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from tensordict import TensorDict, TensorDictBase
from tensordict.nn import dispatch
from tensordict.utils import NestedKey
from torch import Tensor, nn
from torchrl.objectives.common import LossModule

from diffrl import keys
from diffrl.errors import InputError
from diffrl.finetuning.credit.group import GroupRelative
from diffrl.finetuning.methods.registry import METHODS
from diffrl.finetuning.piece import Setting
from diffrl.finetuning.placement.terminal import Terminal
from diffrl.finetuning.policy import DenoisingPolicy
from diffrl.finetuning.recipe import Recipe
from diffrl.finetuning.rollouts.chains import Rollouts
from diffrl.finetuning.surrogate import (
    SURROGATES,
    Surrogate,
    reference_log_prob,
    trainable_law,
)
from diffrl.finetuning.updates.steps import Updates
from diffrl.ranges import require_number

__all__ = ["D3PO", "D3POLoss", "d3po"]


class D3POLoss(LossModule):
    """Bradley-Terry loss of two trajectories of one condition, step by step.

        ρ = clip(π(a|x)/π_ref(a|x), 1-ε, 1+ε),    L = -mean log σ(β log ρ_w - β log ρ_l)

    w is the trajectory of the higher advantage. Pairs of equal advantage are left out.

    Source: Using Human Feedback to Fine-tune Diffusion Models without Any Reward Model (Yang et al., 2024) and its
    code, https://arxiv.org/abs/2311.13231.

    Args:
        policy: π, trained in place.
        reference: π_ref.
        beta: β > 0.
        clip_range: ε ∈ (0, 1).

    Raises:
        ValueError: an argument outside its range.
    """

    out_keys = ["loss_policy", "accuracy", "clip_fraction"]

    def __init__(
        self,
        policy: DenoisingPolicy,
        *,
        reference: DenoisingPolicy,
        beta: float = 0.1,
        clip_range: float = 0.1,
    ) -> None:
        super().__init__()
        require_number("beta", beta, 0, ends="()")
        require_number("clip_range", clip_range, 0, 1, "()")
        self.policy, self.beta, self.clip_range = policy, beta, clip_range
        self.__dict__["reference"] = reference  # not a part of what is trained or saved

    @property
    def in_keys(self) -> list[NestedKey]:
        """Entries of the rollout that the loss reads; cond where present."""
        read = [keys.X_T, keys.INDEX, keys.GROUP, keys.ACTION, keys.ACTION_LOG_PROB, keys.TRAINABLE]
        return [*read, keys.ADVANTAGE]

    @dispatch
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """The loss of steps whose rows 2p and 2p+1 are the two members of a group, at the same step.

        Args:
            tensordict: steps of a rollout, batch size [2P] or [2P, K].

        Raises:
            ValueError: rows 2p and 2p+1 are not of one group.
        """
        B, steps = tensordict.shape[0], tensordict.reshape(-1)
        group = steps.get(keys.GROUP).view(B, -1)
        if B % 2 or bool((group[0::2] != group[1::2]).any()):
            raise InputError("rows 2p and 2p+1 must be one group: set rollouts.group_size=2")
        _, log_p, mask = trainable_law(self.policy, steps)
        log_ratio = log_p - reference_log_prob(self.__dict__["reference"], steps, mask)
        clipped = log_ratio.clamp(
            math.log1p(-self.clip_range), math.log1p(self.clip_range)
        )  # the exp may overflow
        kept = mask.view(B, -1)
        rho = log_p.new_zeros(kept.shape).masked_scatter(kept, clipped)
        adv = steps.get(keys.ADVANTAGE).view(B, -1)
        sign = (adv[0::2] - adv[1::2]).sign()
        margin = sign * self.beta * (rho[0::2] - rho[1::2])
        counted = (kept[0::2] & kept[1::2] & (sign != 0)).to(margin)
        loss = -(counted * nn.functional.logsigmoid(margin)).sum() / counted.sum().clamp(min=1)
        stopped = (log_ratio.detach().expm1().abs() > self.clip_range).float().mean()
        accuracy = _share(margin.detach() > 0, counted)
        return TensorDict({"loss_policy": loss, "accuracy": accuracy, "clip_fraction": stopped})


def _share(true: Tensor, counted: Tensor) -> Tensor:
    return (true.to(counted) * counted).sum() / counted.sum().clamp(min=1)


@SURROGATES.register("stepwise_preference")
@dataclass(frozen=True)
class D3PO(Surrogate):
    """The better of two trajectories is preferred at every step: D3PO. See `D3POLoss`.

    Args:
        beta: β.
        clip_range: ε.
    """

    whole_groups: ClassVar[bool] = True
    beta: float = 0.1
    clip_range: float = 0.1

    def __post_init__(self) -> None:
        require_number("surrogate.beta", self.beta, 0, ends="()")
        require_number("surrogate.clip_range", self.clip_range, 0, 1, "()")

    def loss(self, setting: Setting) -> D3POLoss:
        """`D3POLoss`; the reference is the policy before tuning."""
        return D3POLoss(
            setting.policy,
            reference=setting.reference("frozen"),
            beta=self.beta,
            clip_range=self.clip_range,
        )

    def conflict(self, recipe: Recipe) -> str | None:
        """Refuse groups that are not pairs."""
        if recipe.rollouts.rows_of_a_group != 2:
            return "D3PO compares the two trajectories of a group: set rollouts.group_size=2"
        return super().conflict(recipe)


@METHODS.register("d3po", label="D3PO")
def d3po(**pieces: Any) -> Recipe:
    """D3PO: two trajectories for each condition, compared at all stochastic steps.

    Source: Using Human Feedback to Fine-tune Diffusion Models without Any Reward Model (Yang et al., 2024) and its
    code, https://arxiv.org/abs/2311.13231.

    Args:
        **pieces: of `Recipe`, in place of the published ones.
    """
    published = {
        "rollouts": Rollouts(group_size=2),
        "placement": Terminal(),
        "credit": GroupRelative(std="none"),
        "updates": Updates(order="step"),
        "surrogate": D3PO(),
    }
    return Recipe(**{**published, **pieces})
