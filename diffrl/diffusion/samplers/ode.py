"""Deterministic samplers: steps along the probability-flow ODE, of first and of second order."""

from dataclasses import dataclass

import torch
from torch import Tensor

from diffrl.diffusion.laws import Gaussian, NoiseFn
from diffrl.diffusion.samplers.base import GaussianSampler, Model, Sampler, velocity
from diffrl.diffusion.samplers.registry import SAMPLERS
from diffrl.diffusion.schedules.base import Schedule
from diffrl.shapes import column

__all__ = ["Euler", "Heun"]


@SAMPLERS.register("euler")
@dataclass(frozen=True)
class Euler(GaussianSampler):
    """x_s = x_t + (s - t) dx/dt: a step along the ODE, first order in the process's own time.

    Its law has std 0, so that it makes a policy too, one without log-probabilities.

    Source: Score-Based Generative Modeling through Stochastic Differential Equations (Song et al., 2021), section 4.3,
    https://arxiv.org/abs/2011.13456.
    """

    def law(self, process: Schedule, x: Tensor, D_x: Tensor, t: Tensor, s: Tensor) -> Gaussian:
        """The deterministic law, std = 0, at the end of the step."""
        return Gaussian(x + column(s - t, x) * velocity(process, x, D_x, t), torch.zeros_like(t))


@SAMPLERS.register("heun")
@dataclass(frozen=True)
class Heun(Sampler):
    """An Euler step, corrected with the slope at its end: second order, two evaluations a step, one in the last.

    Source: Elucidating the Design Space of Diffusion-Based Generative Models (Karras et al., 2022),
    Algorithm 1, https://arxiv.org/abs/2206.00364.
    """

    def step(self, model: Model, x: Tensor, t: Tensor, s: Tensor, noise: NoiseFn) -> Tensor:
        """The corrected Euler step; it uses no noise."""
        h, slope = column(s - t, x), model.velocity(x, t)
        x_s = x + h * slope
        if s == model.process.t_clean:  # where the slope is infinite
            return x_s
        return x + h * (slope + model.velocity(x_s, s)) / 2
