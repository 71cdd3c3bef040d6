"""Schemes by name: the loss of a training method, and what draws its states where a chain does not."""

from collections.abc import Callable
from dataclasses import dataclass

from tensordict import TensorDict

from diffrl.denoisers import Denoiser
from diffrl.objectives.td_edm import sample_td_edm_pairs, td_edm_loss
from diffrl.objectives.value import ValueLoss

__all__ = ["OBJECTIVES", "Scheme", "monte_carlo_loss"]


def monte_carlo_loss(denoiser: Denoiser, *, weight: str = "edm") -> ValueLoss:
    """Standard denoising on chains: the Monte Carlo target, δ = A (x0 - D); with weight "edm" it is EDM's loss.

    Args:
        denoiser: D.
        weight: name in `diffrl.objectives.weights.WEIGHTS`.
    """
    return ValueLoss(denoiser, weight=weight).make_value_estimator("monte_carlo")


@dataclass(frozen=True)
class Scheme:
    """How to train.

    Args:
        loss: makes the loss of a denoiser.
        draw: (process, x0, *, cond, generator, ...) → states to train on; None: chains.
    """

    loss: Callable[..., ValueLoss]
    draw: Callable[..., TensorDict] | None = None


OBJECTIVES: dict[str, Scheme] = {
    "td": Scheme(ValueLoss),
    "monte_carlo": Scheme(monte_carlo_loss),
    "td_edm": Scheme(td_edm_loss, sample_td_edm_pairs),
}
