"""Flow-CPS: Flow-GRPO on steps that keep the marginal's coefficients, scored by plain squared distances."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from diffrl.diffusion.laws import Gaussian
from diffrl.diffusion.samplers.sde import CPS
from diffrl.finetuning.methods.ddpo import DDPOLoss, PPOClip
from diffrl.finetuning.methods.flow_grpo import flow_grpo
from diffrl.finetuning.methods.registry import METHODS
from diffrl.finetuning.piece import Setting
from diffrl.finetuning.policy import DenoisingPolicy
from diffrl.finetuning.recipe import Recipe, Regulariser
from diffrl.finetuning.surrogate import SURROGATES, scaled_clip_range
from diffrl.finetuning.updates.steps import Updates

__all__ = ["DistanceClip", "DistanceLoss", "flow_cps"]


class DistanceLoss(DDPOLoss):
    """`DDPOLoss` by importance sampling, with squared distances to the mean in place of log-probabilities.

        log r = |a - mean_old|² - |a - mean|²,    instead of KL: |mean - mean_ref|²

    without the 1/(2 std²) of a Gaussian: log-ratios and divergences are 2 std² times those of `DDPOLoss`, so that steps
    with more noise count for more. r is no ratio of probabilities.

    Source: Coefficients-Preserving Sampling for Reinforcement Learning with Flow Matching (Wang & Yu, 2025) and its
    code, https://arxiv.org/abs/2509.05952.
    """

    def weighed(self, values: Tensor, law: Gaussian) -> Tensor:
        """2 std² times the values [n]."""
        return 2 * law.std**2 * values


@SURROGATES.register("distance_clip")
@dataclass(frozen=True)
class DistanceClip(PPOClip):
    """PPO's clip on squared distances instead of log-probabilities: Flow-CPS. See `DistanceLoss`.

    Args:
        clip_range: ε, in units of the policy's reduction; None: `scaled_clip_range`.
        advantage_clip: advantages are clipped to ± this.
    """

    def loss(self, setting: Setting) -> DistanceLoss:
        """`DistanceLoss`."""
        scaled = scaled_clip_range(setting.dim, setting.policy.reduction)
        return DistanceLoss(
            setting.policy,
            clip_range=scaled if self.clip_range is None else self.clip_range,
            advantage_clip=self.advantage_clip,
            reference=setting.kl_reference,
            kl_coef=setting.kl_coef,
            kl_by_time=setting.kl_by_time,
        )

    def refuses(self, policy: DenoisingPolicy) -> str | None:
        """Refuse steps of another sampler, whose noise this score was not made for."""
        if not isinstance(policy.sampler, CPS):
            return f"Flow-CPS scores steps of CPS, not of {policy.sampler!r}: set sampler=cps, or recipe=flow_grpo"
        return None


@METHODS.register("flow_cps", label="Flow-CPS")
def flow_cps(**pieces: Any) -> Recipe:
    """Flow-CPS: groups of 24, two updates a rollout, all steps but the last, which has no noise.

    Give the policy the sampler `CPS`, whose η is 0.7 in the authors' code. In later settings of Flow-GRPO's code η is
    0.8, ε 1e-5, there is no KL term, and only three steps in the first half have noise, others in each rollout:
    ``policy.noise_steps`` can hold three that stay the same.

    Source: Coefficients-Preserving Sampling for Reinforcement Learning with Flow Matching (Wang & Yu, 2025) and its
    code, https://arxiv.org/abs/2509.05952.

    Args:
        **pieces: of `Recipe`, in place of the published ones.
    """
    published = {
        "updates": Updates(minibatches=2),
        "surrogate": DistanceClip(),
        "regulariser": Regulariser(kl_coef=0.04),
    }
    return flow_grpo(**{**published, **pieces})
