"""DDPO: policy gradient on the denoising chain, by score function or by clipped importance ratios."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import dispatch
from tensordict.utils import NestedKey
from torch import Tensor
from torchrl.objectives.common import LossModule

from diffrl import keys
from diffrl.diffusion.laws import Gaussian
from diffrl.errors import InputError
from diffrl.finetuning.credit.standardised import Standardised
from diffrl.finetuning.methods.registry import METHODS
from diffrl.finetuning.piece import Setting
from diffrl.finetuning.placement.terminal import Terminal
from diffrl.finetuning.policy import DenoisingPolicy
from diffrl.finetuning.recipe import Recipe
from diffrl.finetuning.rollouts.chains import Rollouts
from diffrl.finetuning.surrogate import (
    SURROGATES,
    Surrogate,
    policy_figures,
    reference_kl,
    scaled_clip_range,
    step_lengths,
    trainable_law,
)
from diffrl.finetuning.updates.steps import Updates
from diffrl.ranges import require_number

__all__ = ["DDPOLoss", "PPOClip", "Reinforce", "ddpo_is", "ddpo_sf"]


class DDPOLoss(LossModule):
    """Surrogate of DDPO on rollout steps with advantages.

        score function (SF):      L = -mean adv log π(a|x)
        importance sampling (IS): r = π/π_old,  L = mean max(-adv r, -adv clip(r, 1-ε, 1+ε))
        plus kl_coef · mean KL(π ‖ π_ref) where a reference is given, or kl_coef · mean Δt KL (`Regulariser`)

    The mean runs over the stochastic steps. SF is on-policy: one update per rollout. One ratio per step, not their
    product over the chain.

    Source: Training Diffusion Models with Reinforcement Learning (Black et al., 2024), eqs. 5-6,
    https://arxiv.org/abs/2305.13301; clipping: Proximal Policy Optimization Algorithms (Schulman et al., 2017), eq. 7.

    Args:
        policy: π, trained in place; its reduction is the one that clip_range refers to.
        surrogate: "sf" or "is".
        clip_range: ε in units of the policy's reduction; the published 1e-4 belongs to "mean" and 16,384 dims,
            about 0.0128/√dim(E) elsewhere.
        advantage_clip: advantages are clipped to ± this.
        reference: π_ref, frozen; None: no KL term.
        kl_coef: its weight.
        kl_by_time: whether each step's KL is multiplied by Δt, its length in time; the figure `kl` never is.

    Raises:
        ValueError: an argument outside its range, kl_coef without a reference, or policies of different grids.
    """

    @dataclass
    class _AcceptedKeys:
        advantage: NestedKey = keys.ADVANTAGE

    default_keys = _AcceptedKeys
    tensor_keys: _AcceptedKeys
    out_keys = ["loss_policy", "loss_kl", "kl", "ratio", "clip_fraction", "approx_kl"]

    def __init__(
        self,
        policy: DenoisingPolicy,
        *,
        surrogate: Literal["sf", "is"] = "is",
        clip_range: float = 1e-4,
        advantage_clip: float = 5.0,
        reference: DenoisingPolicy | None = None,
        kl_coef: float = 0.0,
        kl_by_time: bool = False,
    ) -> None:
        super().__init__()
        if surrogate not in ("sf", "is"):
            raise InputError(f"surrogate is {surrogate!r}: give 'sf' or 'is'")
        require_number("clip_range", clip_range, 0, ends="()")
        require_number("advantage_clip", advantage_clip, 0, ends="()")
        require_number("kl_coef", kl_coef, 0)
        if kl_coef > 0 and reference is None:
            raise InputError("kl_coef needs a reference policy: give reference, or kl_coef=0")
        self.policy, self.surrogate = policy, surrogate
        self.clip_range, self.advantage_clip = clip_range, advantage_clip
        self.kl_coef, self.kl_by_time = kl_coef, kl_by_time
        self.__dict__["reference"] = reference  # not a part of what is trained or saved

    @property
    def in_keys(self) -> list[NestedKey]:
        """Entries of the rollout that the loss reads; cond where present."""
        read = [keys.X_T, keys.INDEX, keys.ACTION, keys.ACTION_LOG_PROB, keys.TRAINABLE]
        return [*read, self.tensor_keys.advantage]

    def weighed(self, values: Tensor, law: Gaussian) -> Tensor:
        """Log-ratios or divergences [n] of the steps of that law, as the loss takes them: as they are."""
        return values

    @dispatch
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """The loss of steps [N] or [B, K] of a rollout, with its figures."""
        steps = tensordict.reshape(-1)
        law, log_p, mask = trainable_law(self.policy, steps)
        adv = (
            steps.get(self.tensor_keys.advantage)
            .flatten()[mask]
            .clamp(-self.advantage_clip, self.advantage_clip)
        )
        log_ratio = self.weighed(log_p - steps.get(keys.ACTION_LOG_PROB)[mask], law)
        eps = self.clip_range
        if self.surrogate == "sf":
            loss = -adv * log_p
        else:
            r = log_ratio.exp()
            loss = torch.maximum(-adv * r, -adv * r.clamp(1 - eps, 1 + eps))
        clipped = log_ratio.detach().expm1().abs() > eps
        out = {"loss_policy": loss.mean(), **policy_figures(log_ratio, clipped)}
        if self.__dict__["reference"] is not None:
            kl = self.weighed(reference_kl(self.__dict__["reference"], law, steps, mask), law)
            weighted = kl * step_lengths(self.policy, steps, mask) if self.kl_by_time else kl
            out |= {"loss_kl": self.kl_coef * weighted.mean(), "kl": kl.detach().mean()}
        return TensorDict(out)


@SURROGATES.register("reinforce")
@dataclass(frozen=True)
class Reinforce(Surrogate):
    """The score function, -adv log π: DDPO-SF. See `DDPOLoss`.

    Args:
        advantage_clip: advantages are clipped to ± this.

    Raises:
        ValueError: an argument outside its range.
    """

    shared: ClassVar[bool] = True
    on_policy: ClassVar[bool] = True
    takes_kl: ClassVar[bool] = True
    advantage_clip: float = 5.0

    def __post_init__(self) -> None:
        require_number("surrogate.advantage_clip", self.advantage_clip, 0, ends="()")

    def loss(self, setting: Setting) -> DDPOLoss:
        """`DDPOLoss` by score function."""
        eps = scaled_clip_range(setting.dim, setting.policy.reduction)  # of its figures only
        return _ddpo_loss(setting, "sf", eps, self.advantage_clip)


@SURROGATES.register("ppo_clip")
@dataclass(frozen=True)
class PPOClip(Surrogate):
    """The clipped importance ratio of every step: DDPO-IS. See `DDPOLoss`.

    Args:
        clip_range: ε, in units of the policy's reduction; None: `scaled_clip_range`.
        advantage_clip: advantages are clipped to ± this.

    Raises:
        ValueError: an argument outside its range.
    """

    shared: ClassVar[bool] = True
    takes_kl: ClassVar[bool] = True
    clip_range: float | None = None
    advantage_clip: float = 5.0

    def __post_init__(self) -> None:
        if self.clip_range is not None:
            require_number("surrogate.clip_range", self.clip_range, 0, ends="()")
        require_number("surrogate.advantage_clip", self.advantage_clip, 0, ends="()")

    def loss(self, setting: Setting) -> DDPOLoss:
        """`DDPOLoss` by importance sampling."""
        scaled = scaled_clip_range(setting.dim, setting.policy.reduction)
        return _ddpo_loss(
            setting, "is", scaled if self.clip_range is None else self.clip_range, self.advantage_clip
        )


def _ddpo_loss(
    setting: Setting, surrogate: Literal["sf", "is"], clip_range: float, advantage_clip: float
) -> DDPOLoss:
    return DDPOLoss(
        setting.policy,
        surrogate=surrogate,
        clip_range=clip_range,
        advantage_clip=advantage_clip,
        reference=setting.kl_reference,
        kl_coef=setting.kl_coef,
        kl_by_time=setting.kl_by_time,
    )


@METHODS.register("ddpo_sf", label="DDPO-SF")
def ddpo_sf(**pieces: Any) -> Recipe:
    """DDPO by score function: one on-policy update a rollout.

    Source: Training Diffusion Models with Reinforcement Learning (Black et al., 2024), eq. 5,
    https://arxiv.org/abs/2305.13301.

    Args:
        **pieces: of `Recipe`, in place of the published ones.
    """
    return Recipe(**{**_ddpo(Updates(minibatches=1)), "surrogate": Reinforce(), **pieces})


@METHODS.register("ddpo_is", label="DDPO-IS")
def ddpo_is(**pieces: Any) -> Recipe:
    """DDPO by clipped importance sampling: two updates a rollout, as its code's aesthetic run has.

    Source: Training Diffusion Models with Reinforcement Learning (Black et al., 2024), eq. 6 and its code,
    https://arxiv.org/abs/2305.13301.

    Args:
        **pieces: of `Recipe`, in place of the published ones.
    """
    return Recipe(**{**_ddpo(Updates()), "surrogate": PPOClip(), **pieces})


def _ddpo(updates: Updates) -> dict[str, Any]:
    return {"rollouts": Rollouts(), "placement": Terminal(), "credit": Standardised(), "updates": updates}
