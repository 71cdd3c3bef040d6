"""How often a sampler evaluates the denoiser: on a grid, and the grid for a number of evaluations."""

from bisect import bisect_left
from collections import deque
from functools import partial

import torch
from torch import Tensor

from diffrl.diffusion.samplers.base import Model, Noise, Sampler
from diffrl.diffusion.samplers.loop import trajectory
from diffrl.diffusion.schedules.base import Schedule
from diffrl.errors import InputError

__all__ = ["evaluations", "grid_for"]


class _Same:
    """A stand-in for a denoiser that does nothing, for samplers of one time, of two, and of a learned variance."""

    second_time = True

    def __call__(self, x: Tensor, t: Tensor, cond: Tensor | None = None, r: Tensor | None = None) -> Tensor:
        return x

    def with_variance(self, x_t: Tensor, t: Tensor, cond: Tensor | None) -> tuple[Tensor, Tensor]:
        return x_t, x_t


def evaluations(sampler: Sampler, process: Schedule, levels: int) -> int:
    """How often a sampler calls the denoiser for a sample on a grid of so many levels."""
    model = Model(_Same(), process, num_steps=levels)
    deque(trajectory(model, sampler, torch.zeros(1, 1), Noise(torch.Generator())), maxlen=0)
    return model.nfe


def grid_for(sampler: Sampler, process: Schedule, nfe: int) -> int:
    """Levels of the grid on which a sampler evaluates the denoiser `nfe` times.

    Raises:
        ValueError: there is no such grid.
    """
    count = partial(evaluations, sampler, process)
    levels = 1 + bisect_left(range(1, nfe + 1), nfe, key=count)  # a step evaluates at least once
    if count(levels) != nfe:
        others = " or ".join(str(count(n)) for n in (levels - 1, levels) if n > 0)
        raise InputError(f"{type(sampler).__name__} cannot sample with {nfe} evaluations, but {others}")
    return levels
