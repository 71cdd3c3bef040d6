"""DGPO: the group preference loss on the policy itself, at its clean samples."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from diffrl.finetuning.credit.group import GroupRelative
from diffrl.finetuning.methods.group_preference import GroupPreferenceLoss
from diffrl.finetuning.methods.registry import METHODS
from diffrl.finetuning.piece import Setting
from diffrl.finetuning.placement.terminal import Terminal
from diffrl.finetuning.recipe import Recipe, Regulariser
from diffrl.finetuning.rollouts.chains import Rollouts
from diffrl.finetuning.surrogate import SURROGATES, Role, Surrogate
from diffrl.finetuning.updates.preferences import PreferenceUpdates
from diffrl.ranges import require_number

__all__ = ["GroupPreference", "dgpo"]


@SURROGATES.register("group_preference")
@dataclass(frozen=True)
class GroupPreference(Surrogate):
    """The policy is the implicit reward: DGPO; pairs with advantages ±1 are Diffusion-DPO. See `GroupPreferenceLoss`.

    Args:
        reference: of z: "frozen", or "ema", the policy's moving average.
        beta: β.
        clip_range: ε of the trust region, whose old policy is the one that collected; 0 does not clip.
        anchor_coef: to the policy before tuning.
        runaway: guard of the policy; None: none.
    """

    reads: ClassVar[Literal["preferences"]] = "preferences"
    whole_groups: ClassVar[bool] = True
    reference: Literal["frozen", "ema"] = "frozen"
    beta: float = 100.0
    clip_range: float = 1e-3
    anchor_coef: float = 0.0
    runaway: float | None = None

    def __post_init__(self) -> None:
        require_number("surrogate.beta", self.beta, 0, ends="()")
        require_number("surrogate.clip_range", self.clip_range, 0)
        require_number("surrogate.anchor_coef", self.anchor_coef, 0)
        if self.runaway is not None:
            require_number("surrogate.runaway", self.runaway, 0)

    @property
    def coef(self) -> float:
        """See `GroupPreferenceLoss`."""
        return 1.0

    @property
    def takes_samples(self) -> bool:
        """Yes: whose samples are compared does not matter."""
        return True

    def loss(self, setting: Setting) -> GroupPreferenceLoss:
        """That of the policy."""
        return GroupPreferenceLoss(
            setting.policy,
            old=setting.reference("frozen" if self.clip_range == 0 else "old"),
            reference=setting.reference(self.reference),
            teacher=setting.reference("frozen"),
            beta=self.beta,
            clip_range=self.clip_range,
            anchor_coef=self.anchor_coef,
            runaway=self.runaway,
            coef=self.coef,
        )

    def roles(self, setting: Setting) -> dict[str, Role]:
        """The policy alone."""
        loss = self.loss(setting)
        return {"policy": Role(setting.policy.denoiser, loss, prepare=loss.prepare)}


@METHODS.register("dgpo", label="DGPO")
def dgpo(**pieces: Any) -> Recipe:
    """DGPO: groups of 24 samples of an ODE are compared at times from 0.3 on, and an anchor holds the policy.

    β, ε and the anchor are those of the code's runs with guided rollouts, whose ε is between 1e-3 and 1e-2. They
    compare at four times an update, ``updates.draws=4``; and 0.3 is a time before the shift of 3 that their model has.

    Source: Reinforcing Diffusion Models by Direct Group Preference Optimization (Luo et al., 2025) and its code,
    https://arxiv.org/abs/2510.08425.

    Args:
        **pieces: of `Recipe`, in place of the published ones.
    """
    published = {
        "rollouts": Rollouts(trajectories=48 * 24, group_size=24),
        "placement": Terminal(),
        "credit": GroupRelative(std="global"),
        "updates": PreferenceUpdates(compared="clean", draws=1, preference_t_min=0.3),
        "surrogate": GroupPreference(anchor_coef=0.02),
        "regulariser": Regulariser(),
    }
    return Recipe(**{**published, **pieces})
