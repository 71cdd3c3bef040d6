"""What an update maximises, by name: score function, clipped ratio, or difference of rewards; and the pull back."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

from diffrl.finetuning.methods.ddpo import DDPOLoss
from diffrl.finetuning.methods.sdpo import SDPOLoss
from diffrl.finetuning.policy import DenoisingPolicy

__all__ = [
    "SURROGATES",
    "PPOClip",
    "Regulariser",
    "Reinforce",
    "RewardDifference",
    "Surrogate",
    "scaled_clip_range",
]


def scaled_clip_range(dim: int, reduction: Literal["mean", "sum"]) -> float:
    """The published clip range ε = 1e-4 (mean, 16,384 dims) carried over to latents of another size.

        ε_mean = 0.0128/√dim,    ε_sum = 0.0128 √dim

    A shift of the mean by δ standard deviations moves the mean log-ratio by about δ/√dim, so that this keeps the
    δ at which clipping sets in, 1.3 %.

    Source: the numbers of Training Diffusion Models with Reinforcement Learning (Black et al., 2024) and its code,
    https://arxiv.org/abs/2305.13301; the scaling is ours.

    Args:
        dim: numbers of a latent.
        reduction: the policy's.
    """
    return 0.0128 * (dim**0.5 if reduction == "sum" else dim**-0.5)


@dataclass(frozen=True)
class Regulariser:
    """KL(π ‖ π_ref) of every step, in closed form, times a weight.

    Args:
        kl_coef: the weight; 0 leaves the term out.
        reference: "frozen", the policy as it was at the start, or "ema", its moving average.
        decay: of that average, a rollout: θ_ref ← decay θ_ref + (1 - decay) θ.

    Raises:
        ValueError: an argument outside its range.
    """

    kl_coef: float = 0.0
    reference: Literal["frozen", "ema"] = "frozen"
    decay: float = 0.9

    def __post_init__(self) -> None:
        if not self.kl_coef >= 0:
            raise ValueError(f"regulariser.kl_coef is {self.kl_coef}: it is a weight >= 0")
        if self.reference not in ("frozen", "ema"):
            raise ValueError(f"regulariser.reference is {self.reference!r}: give 'frozen' or 'ema'")
        if not 0 <= self.decay <= 1:
            raise ValueError(f"regulariser.decay is {self.decay}: it lies in [0, 1]")


class Surrogate(Protocol):
    """Makes the loss of a policy."""

    @property
    def on_policy(self) -> bool:
        """Whether only the first update of a rollout is valid."""
        ...

    @property
    def needs_pairs(self) -> bool:
        """Whether it compares trajectories that share their first latent."""
        ...

    @property
    def takes_reference(self) -> bool:
        """Whether it has a KL term."""
        ...

    def loss(
        self, policy: DenoisingPolicy, dim: int, reference: DenoisingPolicy | None, kl_coef: float
    ) -> DDPOLoss | SDPOLoss:
        """The loss.

        Args:
            policy: what is trained.
            dim: numbers of a latent.
            reference: π_ref; None: no KL term.
            kl_coef: its weight.
        """
        ...


@dataclass(frozen=True)
class Reinforce:
    """The score function, -A log π: DDPO-SF. See `DDPOLoss`.

    Args:
        advantage_clip: advantages are clipped to ± this.
    """

    on_policy: ClassVar[bool] = True
    needs_pairs: ClassVar[bool] = False
    takes_reference: ClassVar[bool] = True
    advantage_clip: float = 5.0

    def loss(
        self, policy: DenoisingPolicy, dim: int, reference: DenoisingPolicy | None, kl_coef: float
    ) -> DDPOLoss:
        """`DDPOLoss` by score function."""
        clip_range = scaled_clip_range(dim, policy.reduction)  # of its figures only
        return DDPOLoss(
            policy,
            surrogate="sf",
            clip_range=clip_range,
            advantage_clip=self.advantage_clip,
            reference=reference,
            kl_coef=kl_coef,
        )


@dataclass(frozen=True)
class PPOClip:
    """The clipped importance ratio of every step: DDPO-IS. See `DDPOLoss`.

    Args:
        clip_range: ε, in units of the policy's reduction; None: `scaled_clip_range`.
        advantage_clip: advantages are clipped to ± this.
    """

    on_policy: ClassVar[bool] = False
    needs_pairs: ClassVar[bool] = False
    takes_reference: ClassVar[bool] = True
    clip_range: float | None = None
    advantage_clip: float = 5.0

    def loss(
        self, policy: DenoisingPolicy, dim: int, reference: DenoisingPolicy | None, kl_coef: float
    ) -> DDPOLoss:
        """`DDPOLoss` by importance sampling."""
        eps = scaled_clip_range(dim, policy.reduction) if self.clip_range is None else self.clip_range
        return DDPOLoss(
            policy,
            surrogate="is",
            clip_range=eps,
            advantage_clip=self.advantage_clip,
            reference=reference,
            kl_coef=kl_coef,
        )


@dataclass(frozen=True)
class RewardDifference:
    """Regression of a pair's log-ratios on its advantages: SDPO. See `SDPOLoss`.

    Args:
        temporal_weight: λ of the paper, ∈ (0, 1].
        log_scale: η > 0.
        clip_range: ε, in units of the policy's reduction; None: `scaled_clip_range`; ≤ 0 does not clip.
        advantage_clip: each member's advantage is clipped to ± this.
    """

    on_policy: ClassVar[bool] = False
    needs_pairs: ClassVar[bool] = True
    takes_reference: ClassVar[bool] = False
    temporal_weight: float = 0.99
    log_scale: float = 1.0
    clip_range: float | None = None
    advantage_clip: float = 5.0

    def loss(
        self, policy: DenoisingPolicy, dim: int, reference: DenoisingPolicy | None, kl_coef: float
    ) -> SDPOLoss:
        """`SDPOLoss`; it has no KL term."""
        eps = scaled_clip_range(dim, policy.reduction) if self.clip_range is None else self.clip_range
        return SDPOLoss(
            policy,
            temporal_weight=self.temporal_weight,
            log_scale=self.log_scale,
            clip_range=eps,
            advantage_clip=self.advantage_clip,
        )


SURROGATES: dict[str, Callable[..., Surrogate]] = {
    "reinforce": Reinforce,
    "ppo_clip": PPOClip,
    "reward_difference": RewardDifference,
}
