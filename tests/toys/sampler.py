"""A sampler in one file: the midpoint rule."""

from dataclasses import dataclass

import torch
from torch import Tensor

from diffrl.diffusion.samplers.base import Model, NoiseFn, Sampler
from diffrl.diffusion.samplers.registry import SAMPLERS
from diffrl.shapes import column


@SAMPLERS.register("toy_sampler")
@dataclass(frozen=True)
class Midpoint(Sampler):
    """x_s = x_t + (s - t) v(x_m, m), with x_m one Euler step away at m = t + place (s - t).

    Args:
        place: of the midpoint, in (0, 1].

    Raises:
        ValueError: place outside (0, 1].
    """

    place: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.place <= 1:
            raise ValueError(f"sampler.place is {self.place}: it lies in (0, 1]")

    def step(self, model: Model, x: Tensor, t: Tensor, s: Tensor, noise: NoiseFn) -> Tensor:
        """Two evaluations; the last step, onto clean data, takes one."""
        h, slope = column(s - t, x), model.velocity(x, t)
        if bool(torch.isclose(s, torch.as_tensor(model.process.t_clean).to(s))):
            return x + h * slope
        m = t + self.place * (s - t)
        return x + h * model.velocity(x + column(m - t, x) * slope, m)
