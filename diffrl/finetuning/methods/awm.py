"""AWM: the denoising error of a sample stands for its log-probability, so that tuning is weighted pretraining."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import dispatch
from tensordict.utils import NestedKey
from torch import Tensor
from torchrl.objectives.common import LossModule

from diffrl.diffusion.schedules.base import Schedule
from diffrl.errors import InputError
from diffrl.finetuning.credit.group import GroupRelative
from diffrl.finetuning.methods.matching import IN_KEYS, Noised, advantages, output_distance
from diffrl.finetuning.methods.registry import METHODS
from diffrl.finetuning.piece import Setting
from diffrl.finetuning.placement.terminal import Terminal
from diffrl.finetuning.policy import DenoisingPolicy
from diffrl.finetuning.recipe import Recipe, Regulariser
from diffrl.finetuning.rollouts.chains import Rollouts
from diffrl.finetuning.surrogate import SURROGATES, Surrogate, policy_figures
from diffrl.finetuning.updates.samples import SampleUpdates
from diffrl.ranges import require_number

__all__ = ["AWMLoss", "AdvantageWeightedMatching", "awm"]

TINY = 1e-6  # e of the generalised Huber weight


class AWMLoss(LossModule):
    """Policy gradient whose log-probability of a sample is minus its denoising error at a fresh time.

        l = mean ‖(D(x_t) - x0)/c_out‖²,    log p = -W(l, t),    r = exp(W_old - W)
        L = mean max(-adv r, -adv clip(r, 1-ε, 1+ε)) + reference_coef l(D, D_ref) + ema_coef l(D, D_ema)

    W is l ("one"), τ l ("t"), τ² l ("t2") or (τ/p)((l + e)^p - e^p) ("ghuber", p = 0.25), with τ = σ/(α + σ), the time
    of a flow. Where nothing was updated yet r = 1, and the gradient is adv ∇W: matching, weighted by advantages.

    Source: Advantage Weighted Matching: Aligning RL with Pretraining in Diffusion Models (Xue et al., 2025) and its
    code, https://arxiv.org/abs/2509.25050; e is ours.

    Args:
        policy: trained in place.
        old: the policy that drew the samples; None: on-policy, r is 1 in value.
        reference: D_ref, the policy before tuning.
        ema: D_ema, its moving average.
        weight: "one", "t", "t2" or "ghuber".
        clip_range: ε > 0.
        advantage_clip: advantages are clipped to ± this and divided by it.
        reference_coef: ≥ 0.
        ema_coef: ≥ 0.

    Raises:
        ValueError: an argument outside its range.
    """

    out_keys = ["loss_policy", "ratio", "clip_fraction", "approx_kl"]

    def __init__(
        self,
        policy: DenoisingPolicy,
        *,
        old: DenoisingPolicy | None = None,
        reference: DenoisingPolicy | None = None,
        ema: DenoisingPolicy | None = None,
        weight: Literal["one", "t", "t2", "ghuber"] = "ghuber",
        clip_range: float = 1e-3,
        advantage_clip: float = 5.0,
        reference_coef: float = 0.0,
        ema_coef: float = 0.0,
    ) -> None:
        super().__init__()
        if weight not in ("one", "t", "t2", "ghuber"):
            raise InputError(f"weight is {weight!r}: give 'one', 't', 't2' or 'ghuber'")
        require_number("clip_range", clip_range, 0, ends="()")
        require_number("advantage_clip", advantage_clip, 0, ends="()")
        for name, coef, other in (("reference", reference_coef, reference), ("ema", ema_coef, ema)):
            require_number(f"{name}_coef", coef, 0)
            if coef > 0 and other is None:
                raise InputError(f"{name}_coef needs a policy to hold on to: give {name}")
        self.policy, self.weight = policy, weight
        self.clip_range, self.advantage_clip = clip_range, advantage_clip
        self.__dict__["old"] = old  # not a part of what is trained or saved
        self.__dict__["held"] = [(reference_coef, reference), (ema_coef, ema)]

    @property
    def in_keys(self) -> list[NestedKey]:
        """Entries of the samples that the loss reads; cond where present."""
        return [*IN_KEYS]

    def W(self, l: Tensor, t: Tensor) -> Tensor:  # noqa: N802
        """Minus the log-probability, for errors l [N] at times t [N]."""
        if self.weight == "one":
            return l
        tau = time_of_a_flow(self.policy.process, t).to(l)
        if self.weight == "ghuber":
            p = 0.25
            return tau / p * ((l + TINY) ** p - TINY**p)
        return tau * l if self.weight == "t" else tau**2 * l

    @dispatch
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """The loss of samples [N] or [n, m] at fresh times."""
        b, adv = Noised(tensordict), advantages(tensordict, self.advantage_clip)
        D = b.denoised(self.policy)
        W = self.W(output_distance(self.policy, b.t, D, b.x0), b.t)
        with torch.no_grad():
            old = self.__dict__["old"]
            W_old = (
                W if old is None else self.W(output_distance(self.policy, b.t, b.denoised(old), b.x0), b.t)
            )
        log_ratio = W_old.detach() - W
        r, eps = log_ratio.exp(), self.clip_range
        loss = torch.maximum(-adv * r, -adv * r.clamp(1 - eps, 1 + eps))
        for coef, other in self.__dict__["held"]:
            if coef > 0:
                with torch.no_grad():
                    D_other = b.denoised(other)
                loss = loss + coef * output_distance(self.policy, b.t, D, D_other)
        clipped = log_ratio.detach().expm1().abs() > eps
        return TensorDict({"loss_policy": loss.mean(), **policy_figures(log_ratio, clipped)})


def time_of_a_flow(process: Schedule, t: Tensor) -> Tensor:
    """τ = σ/(α + σ) ∈ [0, 1]: the time at which a flow has as much noise."""
    alpha, sigma = process.alpha(t), process.sigma(t)
    return sigma / (alpha + sigma)


@SURROGATES.register("advantage_matching")
@dataclass(frozen=True)
class AdvantageWeightedMatching(Surrogate):
    """Denoising errors in place of log-probabilities: AWM. See `AWMLoss`.

    Args:
        weight: of the error, "one", "t", "t2" or "ghuber".
        clip_range: ε.
        advantage_clip: advantages are clipped to ± this and divided by it.
        reference_coef: weight of the distance to the policy before tuning.
        ema_coef: weight of the distance to the moving average, whose decay is `regulariser.decay`.
    """

    reads: ClassVar[Literal["samples"]] = "samples"
    weight: Literal["one", "t", "t2", "ghuber"] = "ghuber"
    clip_range: float = 1e-3
    advantage_clip: float = 5.0
    reference_coef: float = 3e-3
    ema_coef: float = 1.0

    def __post_init__(self) -> None:
        for name in ("clip_range", "advantage_clip"):
            require_number(f"surrogate.{name}", getattr(self, name), 0, ends="()")
        for name in ("reference_coef", "ema_coef"):
            require_number(f"surrogate.{name}", getattr(self, name), 0)

    def loss(self, setting: Setting) -> AWMLoss:
        """`AWMLoss`; the old policy is the one that collected."""
        return AWMLoss(
            setting.policy,
            old=setting.reference("old"),
            reference=setting.reference("frozen") if self.reference_coef > 0 else None,
            ema=setting.reference("ema") if self.ema_coef > 0 else None,
            weight=self.weight,
            clip_range=self.clip_range,
            advantage_clip=self.advantage_clip,
            reference_coef=self.reference_coef,
            ema_coef=self.ema_coef,
        )


@METHODS.register("awm", label="AWM")
def awm(**pieces: Any) -> Recipe:
    """AWM: samples of an ODE, six fresh times each, groups of 24; weighted by the advantage in the group.

    Source: Advantage Weighted Matching: Aligning RL with Pretraining in Diffusion Models (Xue et al., 2025) and its
    code, https://arxiv.org/abs/2509.25050.

    Args:
        **pieces: of `Recipe`, in place of the published ones.
    """
    published = {
        "rollouts": Rollouts(trajectories=48 * 24, group_size=24),
        "placement": Terminal(),
        "credit": GroupRelative(std="global"),
        "updates": SampleUpdates(draws=6, minibatches=1),
        "surrogate": AdvantageWeightedMatching(),
        "regulariser": Regulariser(decay=0.3),
    }
    return Recipe(**{**published, **pieces})
