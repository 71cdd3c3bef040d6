"""What a network is once an objective is minimal: a denoiser, or a map of the probability-flow ODE."""

from diffrl.objectives.place import Place, Solution
from diffrl.objectives.registry import OBJECTIVES

__all__ = ["solution_of"]


def solution_of(name: str) -> Solution:
    """What the network of a registered objective is at its fixed point, as its place on the map says.

    It decides what a trained network is compared with: of a denoiser the distance to D* is its value error; X_{t→0} is
    another function than D*, and the distance to the exact map is its map error. A map X_{t→r} holds the denoiser at
    r = t, and has both. X_{t→s} tells neither at the noise levels of an evaluation. Those that were registered without
    a place are taken to be denoisers, as are chains whose options make TD(0) a consistency function
    (`chain.value=clean` under shared noise).

    Args:
        name: of the objective.

    Raises:
        ValueError: there is no objective of that name.
    """
    place = OBJECTIVES.entry(name).place
    return place.learns if isinstance(place, Place) else "denoiser"
