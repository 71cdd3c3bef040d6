"""A noise process in one file: a circle."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from diffrl.diffusion.schedules.base import Schedule
from diffrl.diffusion.schedules.registry import PROCESSES


@PROCESSES.register("toy_process")
@dataclass(frozen=True)
class Circle(Schedule):
    """α = cos(½π t), σ = sin(½π t) for t ∈ [0, t_max], t_max < 1."""

    t_max: float = 0.98

    def alpha(self, t: Tensor) -> Tensor:
        return (math.pi / 2 * t).cos()

    def sigma(self, t: Tensor) -> Tensor:
        return (math.pi / 2 * t).sin()

    def alpha_dot(self, t: Tensor) -> Tensor:
        return -math.pi / 2 * self.sigma(t)

    def sigma_dot(self, t: Tensor) -> Tensor:
        return math.pi / 2 * self.alpha(t)

    def t_from_log_snr(self, log_snr: Tensor) -> Tensor:
        return torch.atan((-log_snr / 2).exp()) * 2 / math.pi

    def _level(self, index: Tensor, num_steps: int) -> Tensor:
        return self.t_max * (1 - index.clamp(min=0) / num_steps)

    def index(self, t: Tensor, num_steps: int) -> Tensor:
        return num_steps * (1 - t.double() / self.t_max)
