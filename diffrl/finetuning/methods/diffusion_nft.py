"""DiffusionNFT: good samples pull the network forward, bad ones push it back, along the line from the old network."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import dispatch
from tensordict.utils import NestedKey
from torchrl.objectives.common import LossModule

from diffrl.finetuning.credit.group import GroupRelative
from diffrl.finetuning.methods.matching import IN_KEYS, Noised, advantages, output_distance
from diffrl.finetuning.methods.registry import METHODS
from diffrl.finetuning.methods.tdm import pull
from diffrl.finetuning.piece import Setting
from diffrl.finetuning.placement.terminal import Terminal
from diffrl.finetuning.policy import DenoisingPolicy
from diffrl.finetuning.recipe import Recipe, Regulariser
from diffrl.finetuning.rollouts.chains import Rollouts
from diffrl.finetuning.surrogate import SURROGATES, Surrogate
from diffrl.finetuning.updates.samples import SampleUpdates
from diffrl.ranges import require_number

__all__ = ["DiffusionNFT", "NFTLoss", "diffusion_nft"]


class NFTLoss(LossModule):
    """Two denoising errors of one sample, on both sides of the old network, weighed by how good the sample is.

        q = ½ + ½ adv/A_max,    D± = D_old ± b (D - D_old)
        L = A_max/b · mean [ q e(D+) + (1-q) e(D-) ] + anchor_coef · mean ‖(D - D_ref)/c_out‖²
        e(D) = mean ‖D - x0‖²/sg(mean |D - x0|)

    Where D = D_old and q = ½ the two pulls cancel; elsewhere q = ½ pulls D back to D_old.

    Source: DiffusionNFT: Online Diffusion Reinforcement with Forward Process (Zheng et al., 2025) and its code,
    https://arxiv.org/abs/2509.16117.

    Args:
        policy: D, trained in place.
        old: D_old.
        reference: D_ref, for the anchor.
        strength: b ∈ (0, 1].
        advantage_clip: A_max; advantages are clipped to ± this.
        anchor_coef: ≥ 0.

    Raises:
        ValueError: an argument outside its range.
    """

    out_keys = ["loss_policy", "moved"]

    def __init__(
        self,
        policy: DenoisingPolicy,
        *,
        old: DenoisingPolicy,
        reference: DenoisingPolicy,
        strength: float = 1.0,
        advantage_clip: float = 5.0,
        anchor_coef: float = 1e-4,
    ) -> None:
        super().__init__()
        require_number("strength", strength, 0, 1, "(]")
        require_number("advantage_clip", advantage_clip, 0, ends="()")
        require_number("anchor_coef", anchor_coef, 0)
        self.policy, self.strength = policy, strength
        self.advantage_clip, self.anchor_coef = advantage_clip, anchor_coef
        self.__dict__["old"], self.__dict__["reference"] = old, reference  # not a part of what is trained

    @property
    def in_keys(self) -> list[NestedKey]:
        """Entries of the samples that the loss reads; cond where present."""
        return [*IN_KEYS]

    @dispatch
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """The loss of samples [N] or [n, m] at fresh times, and the root mean square of D - D_old."""
        b, q = Noised(tensordict), 0.5 + 0.5 * advantages(tensordict, self.advantage_clip)
        D = b.denoised(self.policy)
        with torch.no_grad():
            D_old = b.denoised(self.__dict__["old"])
            D_ref = b.denoised(self.__dict__["reference"]) if self.anchor_coef > 0 else D_old
        step = self.strength * (D - D_old)
        good, bad = (pull(side, b.x0 - side, b.x0) for side in (D_old + step, D_old - step))
        pulls = q * good + (1 - q) * bad
        loss = self.advantage_clip / self.strength * pulls + self.anchor_coef * output_distance(
            self.policy, b.t, D, D_ref
        )
        return TensorDict({"loss_policy": loss.mean(), "moved": (D.detach() - D_old).square().mean().sqrt()})


@SURROGATES.register("forward_nft")
@dataclass(frozen=True)
class DiffusionNFT(Surrogate):
    """Samples pull forward or push back: DiffusionNFT. See `NFTLoss`.

    The old network is the policy's moving average, with the decay min(0.001 n, 0.5) after rollout n; it draws the
    rollouts too.

    Args:
        strength: b.
        advantage_clip: A_max.
        anchor_coef: weight of the distance to the policy before tuning.
    """

    reads: ClassVar[Literal["samples"]] = "samples"
    strength: float = 1.0
    advantage_clip: float = 5.0
    anchor_coef: float = 1e-4

    def __post_init__(self) -> None:
        require_number("surrogate.strength", self.strength, 0, 1, "(]")
        require_number("surrogate.advantage_clip", self.advantage_clip, 0, ends="()")
        require_number("surrogate.anchor_coef", self.anchor_coef, 0)

    def loss(self, setting: Setting) -> NFTLoss:
        """`NFTLoss`."""
        return NFTLoss(
            setting.policy,
            old=setting.reference("ema"),
            reference=setting.reference("frozen"),
            strength=self.strength,
            advantage_clip=self.advantage_clip,
            anchor_coef=self.anchor_coef,
        )

    def actor(self, setting: Setting) -> DenoisingPolicy:
        """The old network."""
        return setting.reference("ema")


@METHODS.register("diffusion_nft", label="DiffusionNFT")
def diffusion_nft(**pieces: Any) -> Recipe:
    """DiffusionNFT: samples of any solver, drawn by the lagging network, groups of 24, without guidance.

    Source: DiffusionNFT: Online Diffusion Reinforcement with Forward Process (Zheng et al., 2025) and its code,
    https://arxiv.org/abs/2509.16117.

    Args:
        **pieces: of `Recipe`, in place of the published ones.
    """
    published = {
        "rollouts": Rollouts(trajectories=48 * 24, group_size=24),
        "placement": Terminal(),
        "credit": GroupRelative(std="global"),
        "updates": SampleUpdates(minibatches=1),
        "surrogate": DiffusionNFT(),
        "regulariser": Regulariser(decay=0.5, decay_ramp=0.001),
    }
    return Recipe(**{**published, **pieces})
