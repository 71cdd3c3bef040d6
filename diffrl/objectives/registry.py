"""The objectives that have a name, for configurations: those of the library, of plugins and of the user."""

from diffrl.registry import Registry

__all__ = ["OBJECTIVES"]

OBJECTIVES = Registry(
    "objective",
    "diffrl.objectives",
    omit=(
        *("denoiser", "process", "sampler", "data"),
        *("x0", "cond", "sigma", "noise", "fresh_noise", "generator"),
    ),
)
"""name → function or class that makes the loss of a denoiser.

Where an objective is not fed with chains, `also` draws its states: a function (process, x0, *, cond, generator,
...) → TensorDict, or a class whose constructor takes (process, ...) and whose instances take the rest. The class may
ask for more by name: `sampler`, which draws the chains of the configuration, `data`, and the `denoiser` in training.

`place` is a `diffrl.objectives.place.Place`, coordinates on the map; an objective that gives none is listed beside it.
"""
