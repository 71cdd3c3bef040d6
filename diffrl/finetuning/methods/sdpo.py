"""SDPO: regression of a pair's difference in log-ratio on the difference of its stepwise advantages."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import dispatch
from tensordict.utils import NestedKey
from torch import Tensor
from torchrl.objectives.common import LossModule

from diffrl import keys
from diffrl.errors import InputError
from diffrl.finetuning.credit.standardised import RewardsToGo
from diffrl.finetuning.methods.registry import METHODS
from diffrl.finetuning.piece import Setting
from diffrl.finetuning.placement.dense import Dense
from diffrl.finetuning.policy import DenoisingPolicy
from diffrl.finetuning.recipe import Recipe
from diffrl.finetuning.rollouts.chains import Rollouts
from diffrl.finetuning.surrogate import (
    SURROGATES,
    Surrogate,
    policy_figures,
    scaled_clip_range,
    trainable_law,
)
from diffrl.finetuning.updates.steps import Updates
from diffrl.ranges import require_number

__all__ = ["RewardDifference", "SDPOLoss", "sdpo"]


class SDPOLoss(LossModule):
    """Dense reward difference loss on pairs of trajectories that share prompt and initial noise.

        w_i = q^i/s,    r_j = log π(a_j|x_j) - log π_old (j = a, b),    Δadv = adv_a - adv_b
        L = mean max( (w (r_a - r_b) - Δadv)², (w (clip(r_a, ±ε) - clip(r_b, ±ε)) - Δadv)² )

    q is the temporal weight, largest for the first, noisiest steps (the paper's λ), and s the log scale (its η).
    With published numbers |r| stays near 1e-4 and |Δadv| near 1: the target is never reached, and the gradient is that
    of a clipped policy gradient whose baseline is the other member of the pair. The value of the loss says nothing.
    The figure clip_fraction is its code's: the share of pairs whose clipped square is the larger one, where the
    clip holds the gradient back. (Of DDPO it is the share of steps whose ratio is further than ε from 1.)

    Source: Aligning Few-Step Diffusion Models with Dense Reward Difference Learning (Zhang et al., 2024) and its code,
    https://arxiv.org/abs/2411.11727. Not to be mistaken for self-distillation policy optimisation.

    Args:
        policy: π, trained in place; its reduction is the one that clip_range refers to.
        temporal_weight: q ∈ (0, 1].
        log_scale: s > 0.
        clip_range: ε, in units of the policy's reduction; ≤ 0 does not clip. See `DDPOLoss`.
        advantage_clip: each member's advantage is clipped to ± this before the difference.

    Raises:
        ValueError: an argument outside its range.
    """

    @dataclass
    class _AcceptedKeys:
        advantage: NestedKey = keys.ADVANTAGE

    default_keys = _AcceptedKeys
    tensor_keys: _AcceptedKeys
    out_keys = ["loss_policy", "ratio", "clip_fraction", "approx_kl"]

    def __init__(
        self,
        policy: DenoisingPolicy,
        *,
        temporal_weight: float = 0.99,
        log_scale: float = 1.0,
        clip_range: float = 1e-4,
        advantage_clip: float = 5.0,
    ) -> None:
        super().__init__()
        require_number("temporal_weight", temporal_weight, 0, 1, "(]")
        require_number("log_scale", log_scale, 0, ends="()")
        require_number("clip_range", clip_range)
        require_number("advantage_clip", advantage_clip, 0, ends="()")
        self.policy, self.temporal_weight, self.log_scale = policy, temporal_weight, log_scale
        self.clip_range, self.advantage_clip = clip_range, advantage_clip

    @property
    def in_keys(self) -> list[NestedKey]:
        """Entries of the rollout that the loss reads; cond where present."""
        read = [keys.X_T, keys.INDEX, keys.GROUP, keys.ACTION, keys.ACTION_LOG_PROB, keys.TRAINABLE]
        return [*read, self.tensor_keys.advantage]

    @dispatch
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """The loss of steps whose rows 2p and 2p+1 are the two members of a pair, at the same step.

        Args:
            tensordict: steps of a rollout, batch size [2P] or [2P, K].

        Raises:
            ValueError: rows 2p and 2p+1 are not of one pair and one step.
        """
        B = tensordict.shape[0]
        steps = tensordict.reshape(-1)
        # [2P, ...] → a and b side by side
        pair = steps.get(keys.GROUP).view(B, -1), steps.get(keys.INDEX).view(B, -1)
        if B % 2 or any(bool((of[0::2] != of[1::2]).any()) for of in pair):
            raise InputError(
                "rows 2p and 2p+1 must be one pair (group) at one step (index): never shuffle them apart"
            )
        _, log_p, mask = trainable_law(self.policy, steps)
        log_ratio = log_p - steps.get(keys.ACTION_LOG_PROB)[mask]
        kept = mask.view(B, -1)
        r = log_p.new_zeros(kept.shape).masked_scatter(kept, log_ratio)  # 0 where a step is deterministic
        clip = self.advantage_clip
        adv = steps.get(self.tensor_keys.advantage).view(B, -1).clamp(-clip, clip)
        w = self.temporal_weight ** steps.get(keys.INDEX).view(B, -1)[0::2].to(log_p) / self.log_scale

        def squared_error(r: Tensor) -> Tensor:  # (w Δr - Δadv)²
            return (w * (r[0::2] - r[1::2]) - (adv[0::2] - adv[1::2])) ** 2

        eps, trained = self.clip_range, kept[0::2]
        loss = squared_error(r)
        clipped = squared_error(r.clamp(-eps, eps)) if eps > 0 else loss
        figures = policy_figures(log_ratio, (clipped > loss)[trained])
        return TensorDict({"loss_policy": torch.maximum(loss, clipped)[trained].mean(), **figures})


@SURROGATES.register("reward_difference")
@dataclass(frozen=True)
class RewardDifference(Surrogate):
    """Regression of a pair's log-ratios on its advantages: SDPO. See `SDPOLoss`.

    Args:
        temporal_weight: q ∈ (0, 1].
        log_scale: s > 0.
        clip_range: ε, in units of the policy's reduction; None: `scaled_clip_range`; ≤ 0 does not clip.
        advantage_clip: each member's advantage is clipped to ± this.

    Raises:
        ValueError: an argument outside its range.
    """

    shared: ClassVar[bool] = True
    needs_pairs: ClassVar[bool] = True
    temporal_weight: float = 0.99
    log_scale: float = 1.0
    clip_range: float | None = None
    advantage_clip: float = 5.0

    def __post_init__(self) -> None:
        require_number("surrogate.temporal_weight", self.temporal_weight, 0, 1, "(]")
        require_number("surrogate.log_scale", self.log_scale, 0, ends="()")
        if self.clip_range is not None:
            require_number("surrogate.clip_range", self.clip_range)
        require_number("surrogate.advantage_clip", self.advantage_clip, 0, ends="()")

    def loss(self, setting: Setting) -> SDPOLoss:
        """`SDPOLoss`; it has no KL term."""
        scaled = scaled_clip_range(setting.dim, setting.policy.reduction)
        return SDPOLoss(
            setting.policy,
            temporal_weight=self.temporal_weight,
            log_scale=self.log_scale,
            clip_range=scaled if self.clip_range is None else self.clip_range,
            advantage_clip=self.advantage_clip,
        )


@METHODS.register("sdpo", label="SDPO")
def sdpo(**pieces: Any) -> Recipe:
    """SDPO: pairs, dense rewards from three queries, stepwise advantages, step-shuffled reward differences.

    Source: Aligning Few-Step Diffusion Models with Dense Reward Difference Learning (Zhang et al., 2024) and its code,
    https://arxiv.org/abs/2411.11727; ours are the guard of the similarities and the anchor among inner steps.

    Args:
        **pieces: of `Recipe`, in place of the published ones.
    """
    published = {
        "rollouts": Rollouts(pairs=True),
        "placement": Dense(),
        "credit": RewardsToGo(),
        "updates": Updates(order="step"),
        "surrogate": RewardDifference(),
    }
    return Recipe(**{**published, **pieces})
