"""Schemes by name: the loss of a training method, and what draws its states where a chain does not."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from diffrl.diffusion.denoisers import Denoiser
from diffrl.objectives.consistency import ct_loss, td_ct_loss
from diffrl.objectives.consistency_pairs import ConsistencyPairs
from diffrl.objectives.denoiser_loss import DenoiserLoss
from diffrl.objectives.denoising import sample_log_normal_states, sample_uniform_states
from diffrl.objectives.lambda_schedule import LambdaSchedule
from diffrl.objectives.td_edm import sample_td_edm_pairs, td_edm_loss
from diffrl.objectives.value import ValueLoss

__all__ = ["OBJECTIVES", "Scheme", "monte_carlo_loss", "td_lambda_schedule_loss"]


def monte_carlo_loss(
    denoiser: Denoiser, *, weight: str = "edm", weight_options: Mapping[str, float] | None = None
) -> ValueLoss:
    """Standard denoising: the Monte Carlo target, δ = A (x0 - D); with weight "edm" it is EDM's loss.

    Args:
        denoiser: D.
        weight: name in `diffrl.objectives.weights.WEIGHTS`.
        weight_options: numbers of that weight.
    """
    loss = ValueLoss(denoiser, weight=weight, weight_options=weight_options)
    return loss.make_value_estimator("monte_carlo")


def td_lambda_schedule_loss(
    denoiser: Denoiser,
    *,
    low_noise: float = 0.0,
    high_noise: float = 1.0,
    nsr_low: float = 0.1,
    nsr_high: float = 10.0,
    gamma: float = 1.0,
    bootstrap: Literal["own", "target", "residual"] = "own",
    weight: str = "edm",
    weight_options: Mapping[str, float] | None = None,
    denoising_coef: float = 0.0,
) -> ValueLoss:
    """TD(λ) with a λ for each noise level.

    Args:
        denoiser: D.
        low_noise: λ at and below nsr_low.
        high_noise: λ at and above nsr_high; in between it is linear in ln(σ/α), see `LambdaSchedule`.
        nsr_low: ratio σ/α of noise to signal.
        nsr_high: another, higher one.
        gamma: discount γ ∈ [0, 1].
        bootstrap: what the target's values come from, see `ValueLoss`.
        weight: name in `diffrl.objectives.weights.WEIGHTS`.
        weight_options: numbers of that weight.
        denoising_coef: c ≥ 0, the added denoising loss.
    """
    return ValueLoss(
        denoiser,
        lmbda=LambdaSchedule(low_noise, high_noise, nsr_low, nsr_high),
        gamma=gamma,
        bootstrap=bootstrap,
        weight=weight,
        weight_options=weight_options,
        denoising_coef=denoising_coef,
    )


@dataclass(frozen=True)
class Scheme:
    """How to train.

    Args:
        loss: makes the loss of a denoiser.
        draw: (process, x0, *, cond, generator, ...) → states to train on; a class with (process, ...) gives a
            function of the rest. None: chains.
    """

    loss: Callable[..., ValueLoss | DenoiserLoss]
    draw: Callable[..., Any] | None = None


OBJECTIVES: dict[str, Scheme] = {
    "td": Scheme(ValueLoss),
    "td_lambda_schedule": Scheme(td_lambda_schedule_loss),
    "monte_carlo": Scheme(monte_carlo_loss),
    "edm": Scheme(monte_carlo_loss, sample_log_normal_states),
    "denoising": Scheme(monte_carlo_loss, sample_uniform_states),
    "td_edm": Scheme(td_edm_loss, sample_td_edm_pairs),
    "ct": Scheme(ct_loss, ConsistencyPairs),
    "td_ct": Scheme(td_ct_loss, ConsistencyPairs),
}
