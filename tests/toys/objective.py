"""An objective in one file: TD(λ) that bootstraps by half at the most."""

from typing import Any

from diffrl.diffusion.denoisers import Denoiser
from diffrl.objectives.registry import OBJECTIVES
from diffrl.objectives.value import ValueLoss
from diffrl.registry import options_of


@OBJECTIVES.register("toy_objective", label=lambda options: f"Toy(λ={options['mix']:g})")
@options_of(ValueLoss, drop=("lmbda", "n_steps", "bootstrap"))
def toy_loss(denoiser: Denoiser, *, mix: float = 0.7, **options: Any) -> ValueLoss:
    """TD(λ) with λ = mix.

        G = (1-mix) V' + mix G'

    Args:
        denoiser: D.
        mix: λ ∈ [0.5, 1].

    Raises:
        ValueError: mix below 0.5.
    """
    if mix < 0.5:
        raise ValueError(f"objective.mix is {mix}: the toy bootstraps by half at the most")
    return ValueLoss(denoiser, lmbda=mix, **options)
