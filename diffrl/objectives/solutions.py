"""What a network is once an objective is minimal: a denoiser, or a map of the probability-flow ODE."""

from inspect import isclass
from typing import Literal

from diffrl.objectives.maps.loss import MapLoss
from diffrl.objectives.registry import OBJECTIVES

__all__ = ["Solution", "solution_of"]

Solution = Literal["denoiser", "to_clean", "to_next", "map"]
"""D(x, t) = E[x0 | x_t];  X_{t→0}, a consistency function;  X_{t→s} for the next level s of a grid;  X_{t→r}."""

ONE_TIME: dict[str, Solution] = {
    **dict.fromkeys(("ct", "td_ct", "ect", "stable_ct", "continuous_ct", "cd"), "to_clean"),
    "progressive": "to_next",
}


def solution_of(name: str) -> Solution:
    """What the network of a registered objective is at its fixed point.

    It decides what a trained network is compared with: of a denoiser the distance to D* is its value error; X_{t→0} is
    another function than D*, and the distance to the exact map is its map error. A map X_{t→r} holds the denoiser at
    r = t, and has both. X_{t→s} tells neither at the noise levels of an evaluation. Those that the library does not
    know are taken to be denoisers, as are chains whose options make TD(0) a consistency function (`chain.value=clean`
    under shared noise).

    Args:
        name: of the objective.

    Raises:
        ValueError: there is no objective of that name.
    """
    made = OBJECTIVES.entry(name).make
    if isclass(made) and issubclass(made, MapLoss):
        return "map"
    return ONE_TIME.get(name, "denoiser")
