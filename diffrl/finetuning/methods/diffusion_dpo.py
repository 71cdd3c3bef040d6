"""Diffusion-DPO: pairs of samples of which one was preferred, recorded or drawn."""

from dataclasses import dataclass
from typing import Any

from diffrl.finetuning.credit.preference import Preference
from diffrl.finetuning.methods.dgpo import GroupPreference
from diffrl.finetuning.methods.registry import METHODS
from diffrl.finetuning.placement.recorded import Recorded
from diffrl.finetuning.recipe import Recipe
from diffrl.finetuning.rollouts.recorded_pairs import RecordedPairs
from diffrl.finetuning.surrogate import SURROGATES
from diffrl.finetuning.updates.preferences import PreferenceUpdates

__all__ = ["DiffusionDPO", "diffusion_dpo"]


@SURROGATES.register("pair_preference")
@dataclass(frozen=True)
class DiffusionDPO(GroupPreference):
    """The preferred of two samples becomes likelier than under the frozen policy, and the other one less likely.

        L = -log σ(-β/2 [ (l_w - l_w,ref) - (l_l - l_l,ref) ]),    l = mean ‖(D(x_t) - x0)/c_out‖²

    w is the preferred one, l the other, both at one time and with one noise. It is β times the loss of DGPO for groups
    of two with advantages ±1, of which it takes the gradient: see `GroupPreferenceLoss`. The figure `loss_preference`
    is not L, and `preference` is 1 minus the probability that L gives to what was preferred.

    Source: Diffusion Model Alignment Using Direct Preference Optimization (Wallace et al., 2024), eq. 14 and its code,
    https://arxiv.org/abs/2311.12908.

    Args:
        reference: "frozen", the policy before tuning, or "ema", its moving average.
        beta: β; it belongs to means over the event dims.
        clip_range: of a trust region, which is not in the source; 0 does not clip.
        anchor_coef: of the distance to the policy before tuning, which is not in the source; it counts β times.
        runaway: see `GroupPreference`.
    """

    beta: float = 5000.0
    clip_range: float = 0.0

    @property
    def coef(self) -> float:
        """β: the gradient has the published size, which Adam's ε and the clipping of gradients are made for."""
        return self.beta


@METHODS.register("diffusion_dpo", label="Diffusion-DPO")
def diffusion_dpo(**pieces: Any) -> Recipe:
    """Diffusion-DPO: 2,048 recorded pairs an update, each at a time of its own; no reward is asked.

    With ``rollouts=Rollouts(4096, group_size=2)`` it is online: the policy draws the pairs, and the reward says which
    one is better. A tie teaches nothing. β is 5000, as the code has it for both SD 1.5 and SDXL; its learning rate,
    1e-8 times the pairs of an update with a linear warm-up, belongs to the run.

    Source: Diffusion Model Alignment Using Direct Preference Optimization (Wallace et al., 2024) and its code,
    https://arxiv.org/abs/2311.12908.

    Args:
        **pieces: of `Recipe`, in place of the published ones.
    """
    published = {
        "rollouts": RecordedPairs(),
        "placement": Recorded(),
        "credit": Preference(),
        "updates": PreferenceUpdates(
            of="estimate", compared="clean", times="group", draws=1, margin=1e-3, preference_t_min=0.0
        ),
        "surrogate": DiffusionDPO(),
    }
    return Recipe(**{**published, **pieces})
