"""DDPO: policy gradient on the denoising chain, by score function or with importance-sampled, clipped updates."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import dispatch
from tensordict.utils import NestedKey
from torch import Tensor
from torchrl.objectives.common import LossModule

from diffrl import keys
from diffrl.finetuning.policy import DenoisingPolicy, Law
from diffrl.shapes import expand_like

__all__ = ["DDPOLoss", "kl_to_reference", "policy_figures", "trainable_law"]


def trainable_law(policy: DenoisingPolicy, steps: TensorDictBase) -> tuple[Law, Tensor, Tensor]:
    """The policy's law at the steps [N] that have a log-probability, log π of the actions taken, and their mask.

    Deterministic steps are not forwarded at all.

    Raises:
        ValueError: no step is stochastic.
    """
    mask = steps.get(keys.TRAINABLE).squeeze(-1)
    if not bool(mask.any()):
        raise ValueError(
            "no step of this batch is stochastic, so none has a log-probability: leave such batches out"
        )
    cond = steps.get(keys.COND, None)
    law = policy.law(
        steps.get(keys.X_T)[mask],
        steps.get(keys.INDEX).squeeze(-1)[mask],
        None if cond is None else cond[mask],
    )
    return law, policy.log_prob(law, steps.get(keys.ACTION)[mask]), mask


def kl_to_reference(law: Law, reference: Law, reduction: Literal["mean", "sum"]) -> Tensor:
    """KL(π ‖ π_ref) of one step in closed form, std shared: |mean - mean_ref|²/(2 std²), shape [N].

    Source: the KL of two normals with one covariance; Flow-GRPO (Liu et al., 2025), eq. 12,
    https://arxiv.org/abs/2505.05470.

    Args:
        law: of the policy.
        reference: of the reference, at the same states.
        reduction: over event dims; "sum" is the divergence itself.
    """
    squares = (law.mean - reference.mean) ** 2 / (2 * expand_like(law.std, law.mean) ** 2)
    return squares.flatten(1).sum(1) if reduction == "sum" else squares.flatten(1).mean(1)


def policy_figures(log_ratio: Tensor, clip_range: float) -> dict[str, Tensor]:
    """What to watch of an update: mean ratio, share of |ratio - 1| > ε (0 without a clip), ½ mean (log ratio)²."""
    ratio = log_ratio.detach().exp()
    clipped = (ratio - 1).abs() > (clip_range if clip_range > 0 else math.inf)
    return {
        "ratio": ratio.mean(),
        "clip_fraction": clipped.float().mean(),
        "approx_kl": 0.5 * log_ratio.detach().square().mean(),
    }


class DDPOLoss(LossModule):
    """Surrogate of DDPO on rollout steps with advantages.

        score function (SF):      L = -mean A log π(a|x)
        importance sampling (IS): r = π/π_old,  L = mean max(-A r, -A clip(r, 1-ε, 1+ε))
        plus kl_coef · mean KL(π ‖ π_ref) where a reference is given

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
    ) -> None:
        super().__init__()
        if surrogate not in ("sf", "is"):
            raise ValueError(f"surrogate is {surrogate!r}: give 'sf' or 'is'")
        if not (clip_range > 0 and advantage_clip > 0 and kl_coef >= 0):
            raise ValueError("clip_range and advantage_clip must be > 0, and kl_coef >= 0")
        if kl_coef > 0 and reference is None:
            raise ValueError("kl_coef needs a reference policy: give reference, or kl_coef=0")
        self.policy, self.surrogate = policy, surrogate
        self.clip_range, self.advantage_clip, self.kl_coef = clip_range, advantage_clip, kl_coef
        self.__dict__["reference"] = reference  # not a part of what is trained or saved

    @property
    def in_keys(self) -> list[NestedKey]:
        """Entries of the rollout that the loss reads; cond where present."""
        read = [keys.X_T, keys.INDEX, keys.ACTION, keys.ACTION_LOG_PROB, keys.TRAINABLE]
        return [*read, self.tensor_keys.advantage]

    @dispatch
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """The loss of steps [N] or [B, K] of a rollout, with its figures."""
        steps = tensordict.reshape(-1)
        law, log_p, mask = trainable_law(self.policy, steps)
        A = (
            steps.get(self.tensor_keys.advantage)
            .flatten()[mask]
            .clamp(-self.advantage_clip, self.advantage_clip)
        )
        log_ratio = log_p - steps.get(keys.ACTION_LOG_PROB)[mask]
        eps = self.clip_range
        if self.surrogate == "sf":
            loss = -A * log_p
        else:
            r = log_ratio.exp()
            loss = torch.maximum(-A * r, -A * r.clamp(1 - eps, 1 + eps))
        out = {"loss_policy": loss.mean(), **policy_figures(log_ratio, eps)}
        if self.__dict__["reference"] is not None:
            kl = _reference_kl(self.__dict__["reference"], law, steps, mask, self.policy.reduction)
            out |= {"loss_kl": self.kl_coef * kl, "kl": kl.detach()}
        return TensorDict(out)


def _reference_kl(
    reference: DenoisingPolicy,
    law: Law,
    steps: TensorDictBase,
    mask: Tensor,
    reduction: Literal["mean", "sum"],
) -> Tensor:
    """Mean KL of the steps to the reference, which gets no gradient."""
    cond = steps.get(keys.COND, None)
    with torch.no_grad():
        other = reference.law(
            steps.get(keys.X_T)[mask],
            steps.get(keys.INDEX).squeeze(-1)[mask],
            None if cond is None else cond[mask],
        )
    return kl_to_reference(law, other, reduction).mean()
