"""TD(λ) whose λ depends on the noise level of the state."""

from collections.abc import Mapping
from typing import Any

from diffrl.diffusion.denoisers import Denoiser
from diffrl.objectives.lambda_schedule import LambdaSchedule
from diffrl.objectives.registry import OBJECTIVES
from diffrl.objectives.value import ValueLoss
from diffrl.registry import options_of

__all__ = ["td_lambda_schedule_loss"]


def _label(options: Mapping[str, Any]) -> str:
    return f"TD(λ={options['low_noise']:g}…{options['high_noise']:g})"


@OBJECTIVES.register("td_lambda_schedule", label=_label)
@options_of(ValueLoss, drop=("lmbda", "n_steps"))
def td_lambda_schedule_loss(
    denoiser: Denoiser,
    *,
    low_noise: float = 0.0,
    high_noise: float = 1.0,
    nsr_low: float = LambdaSchedule.nsr_low,
    nsr_high: float = LambdaSchedule.nsr_high,
    **options: Any,
) -> ValueLoss:
    """TD(λ) with one λ for each noise level: linear in ln(σ/α) between two ends, see `LambdaSchedule`.

    Args:
        denoiser: D, trained in place.
        low_noise: λ at and below nsr_low.
        high_noise: λ at and above nsr_high.
        nsr_low: ratio σ/α of noise to signal.
        nsr_high: another, higher one.
        options: the other ones of `ValueLoss`.
    """
    return ValueLoss(denoiser, lmbda=LambdaSchedule(low_noise, high_noise, nsr_low, nsr_high), **options)
