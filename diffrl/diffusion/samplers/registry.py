"""Samplers by name."""

import inspect

from diffrl.registry import Registry

__all__ = ["SAMPLERS", "samplers_with_law"]

SAMPLERS = Registry("sampler", "diffrl.diffusion.samplers")


def samplers_with_law() -> list[str]:
    """Names of the samplers whose step is a Gaussian of one evaluation, so that they make a policy."""
    from diffrl.diffusion.samplers.base import GaussianSampler

    made = {
        entry.name: entry.make
        if inspect.isclass(entry.make)
        else inspect.signature(entry.make).return_annotation
        for entry in SAMPLERS.entries()
    }
    return [
        name for name, kind in made.items() if inspect.isclass(kind) and issubclass(kind, GaussianSampler)
    ]
