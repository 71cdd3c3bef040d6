"""DMD2: a generator of few steps, each of which predicts clean data that the next step noises afresh."""

from typing import Any

from diffrl.finetuning.credit.standardised import Standardised
from diffrl.finetuning.methods.registry import METHODS
from diffrl.finetuning.methods.tdm import TrajectoryMatching
from diffrl.finetuning.placement.unpaid import Unpaid
from diffrl.finetuning.recipe import Recipe
from diffrl.finetuning.rollouts.chains import Rollouts
from diffrl.finetuning.updates.boundaries import BoundaryUpdates

__all__ = ["dmd2"]


@METHODS.register("dmd2", label="DMD2")
def dmd2(**pieces: Any) -> Recipe:
    """DMD2 without its discriminator: the fake score has five updates for each of the generator. No reward is asked.

    It differs from TDM in what is noised: the clean estimate of a step, over the whole range of times, and not the
    state that the step reaches. Give the policy the sampler `CPS(1.0)`, or `Multistep` on EDM: all noise is fresh.

    The fake score's numbers are those of the code's runs on SDXL, whose generator has the same learning rate, 5e-7, and
    whose teacher has the guidance 8.

    Source: Improved Distribution Matching Distillation for Fast Image Synthesis (Yin et al., 2024), sections 4.1-4.4,
    https://arxiv.org/abs/2405.14867.

    Args:
        **pieces: of `Recipe`, in place of the published ones.
    """
    published = {
        "rollouts": Rollouts(),
        "placement": Unpaid(),
        "credit": Standardised(),
        "updates": BoundaryUpdates(of="estimate", passes=5),
        "surrogate": TrajectoryMatching(fake_updates=5, fake_lr=5e-7, betas=(0.9, 0.999)),
    }
    return Recipe(**{**published, **pieces})
