"""Temporal-difference learning by configuration: `ValueLoss` with the library's default target."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, cast

from diffrl.diffusion.denoisers import Denoiser
from diffrl.objectives.place import Place
from diffrl.objectives.registry import OBJECTIVES
from diffrl.objectives.target_choice import chosen_bootstrap, target_label
from diffrl.objectives.value import ValueLoss
from diffrl.registry import options_of

__all__ = ["td_loss"]


@OBJECTIVES.register(
    "td",
    label=target_label,
    place=Place(
        "denoiser",
        "chains",
        "any",
        "n_steps",
        "target",
        "forward",
        note="own predictions where λ or n is given",
    ),
)
@options_of(ValueLoss)
def td_loss(
    denoiser: Denoiser,
    *,
    lmbda: float | None = None,
    n_steps: int | None = None,
    bootstrap: Literal["own", "target", "residual"] | None = None,
    anneal: Mapping[str, Sequence[float]] | None = None,
    **options: Any,
) -> ValueLoss:
    """TD(λ) on chains. Without a word it looks an eighth of the chain ahead, and bootstraps from a target network.

    At equal gradient steps that default hurt on none of eight grounds, `results/grounds`. It costs a second evaluation
    of each state: at equal evaluations it was behind Monte Carlo on five of them. Those who choose λ or n choose a
    scheme of their own: it bootstraps from the network's own predictions unless told otherwise.

    Args:
        denoiser: D, trained in place.
        lmbda: as in `ValueLoss`.
        n_steps: as in `ValueLoss`.
        bootstrap: as in `ValueLoss`; None is "own" where lmbda or n_steps is given or annealed, else "target".
        anneal: as in `ValueLoss`.
        options: the other ones of `ValueLoss`.
    """
    if bootstrap is None:
        chosen = chosen_bootstrap({"lmbda": lmbda, "n_steps": n_steps, "anneal": anneal})
        bootstrap = cast(Literal["own", "target"], chosen)
    return ValueLoss(denoiser, lmbda=lmbda, n_steps=n_steps, bootstrap=bootstrap, anneal=anneal, **options)
