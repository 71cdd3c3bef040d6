"""Monte Carlo on chains: every state learns from the datum at the end of its chain."""

from typing import Any

from diffrl.diffusion.denoisers import Denoiser
from diffrl.objectives.place import Place
from diffrl.objectives.registry import OBJECTIVES
from diffrl.objectives.value import ValueLoss
from diffrl.registry import options_of

__all__ = ["is_monte_carlo", "monte_carlo_loss"]


@OBJECTIVES.register(
    "monte_carlo", label="Monte Carlo", place=Place("denoiser", "chains", "any", "end", "nothing", "none")
)
@options_of(
    ValueLoss,
    drop=(
        *("lmbda", "n_steps", "lookahead", "gamma"),
        *("bootstrap", "denoising_coef", "bootstrap_share", "anneal"),
    ),
)
def monte_carlo_loss(denoiser: Denoiser, **options: Any) -> ValueLoss:
    """The loss of standard denoising: the target of every state is the datum, so nothing is bootstrapped.

        loss = mean_i w_i ‖δ_i‖²/dim(E),    δ_i = A_i (x0 - D(x_i))

    With weight "edm" it is EDM's loss, but for the floor of that weight on very fine grids.

    Args:
        denoiser: D, trained in place.
        options: those of `ValueLoss` that do not choose a target.
    """
    return ValueLoss(denoiser, **options).make_value_estimator("monte_carlo")


def is_monte_carlo(name: str) -> bool:
    """Whether the objective of that name has the Monte Carlo loss, on whatever states.

    Raises:
        ValueError: there is no objective of that name.
    """
    return OBJECTIVES.entry(name).make is monte_carlo_loss
