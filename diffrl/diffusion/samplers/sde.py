"""Stochastic samplers made for fine-tuning: the flow SDE, and coefficient-preserving sampling."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from diffrl.diffusion.laws import Gaussian
from diffrl.diffusion.samplers.base import GaussianSampler
from diffrl.diffusion.samplers.registry import SAMPLERS
from diffrl.diffusion.schedules.base import Schedule
from diffrl.diffusion.schedules.flow import Flow
from diffrl.errors import InputError
from diffrl.ranges import require_number
from diffrl.shapes import column

__all__ = ["CPS", "FlowSDE"]


@SAMPLERS.register("flow_sde")
@dataclass(frozen=True)
class FlowSDE(GaussianSampler):
    """One Euler-Maruyama step of an SDE with the flow's marginals, for rectified flow.

        sd = a √(t/(1-t)),    h = s - t < 0,    v = (x - D)/t
        mean = x (1 + sd² h/(2t)) + v (1 + sd² (1-t)/(2t)) h,    std = sd √(-h)

    At pure noise, t = 1, sd would be infinite: there sd = a √(t/(1-s)), so that std = a. The last step, onto clean
    data, has std > 0 too. States have the exact coefficient of x0, but more noise than the time s stands for.

    Source: Flow-GRPO: Training Flow Matching Models via Online RL (Liu et al., 2025), eq. 9 and its code,
    https://arxiv.org/abs/2505.05470.

    Args:
        a: amount of noise, in [0, 100]; 0 is `Euler`.

    Raises:
        ValueError: a outside its range.
    """

    a: float = 0.7

    def __post_init__(self) -> None:
        require_number("a", self.a, 0, 100)

    def law(self, process: Schedule, x: Tensor, D_x: Tensor, t: Tensor, s: Tensor) -> Gaussian:
        """N(mean, std²).

        Raises:
            ValueError: the process is not Flow.
        """
        if not isinstance(process, Flow):
            raise InputError(
                f"FlowSDE works on the Flow process, not on {type(process).__name__}: use DDIM(eta)"
            )
        t, s = t.double(), s.double()
        pure = 1 - t < 1e-9  # rounding may leave a shifted grid just beside 1
        sd, h = self.a * (t / (1 - torch.where(pure, s, t))).sqrt(), s - t
        on_x, on_v = 1 + sd**2 * h / (2 * t), (1 + sd**2 * (1 - t) / (2 * t)) * h
        v = (x - D_x) / column(t, x)
        return Gaussian(column(on_x, x) * x + column(on_v, x) * v, sd * (-h).sqrt())


@SAMPLERS.register("cps")
@dataclass(frozen=True)
class CPS(GaussianSampler):
    """Coefficient-preserving sampling: part of the noise is drawn afresh, and the marginal's coefficients stay exact.

        std = σ_s sin(½π η_s),    mean = α_s D + √(σ_s² - std²) ε̂,    ε̂ = (x - α_t D)/σ_t

    η_s = 0 is DDIM(0). It works for every process. The coefficients are exact, but the law is not: however short the
    step, a fixed share of its noise is fresh, so that samples spread less than the data do. A Gaussian loses 28 % of
    its variance at η_s = 0.7, even in 150 steps, and less at a smaller η_s. The published objective scores actions by
    -|x' - mean|² without the factor 1/(2 std²); `Gaussian.log_prob` gives the true log-density.

    Source: Coefficients-Preserving Sampling for Reinforcement Learning with Flow Matching (2025), and its code,
    https://arxiv.org/abs/2509.05952.

    Args:
        eta: η_s ∈ [0, 1].

    Raises:
        ValueError: eta outside [0, 1].
    """

    eta: float = 0.7

    def __post_init__(self) -> None:
        require_number("eta", self.eta, 0, 1)

    def law(self, process: Schedule, x: Tensor, D_x: Tensor, t: Tensor, s: Tensor) -> Gaussian:
        """N(mean, std²)."""
        t, s = t.double(), s.double()
        alpha_t, sigma_t, alpha_s, sigma_s = (
            process.alpha(t),
            process.sigma(t),
            process.alpha(s),
            process.sigma(s),
        )
        std = sigma_s * math.sin(math.pi * self.eta / 2)
        kept = (sigma_s**2 - std**2).clamp(min=0).sqrt()
        eps = (x - column(alpha_t, x) * D_x) / column(sigma_t, x)
        return Gaussian(column(alpha_s, x) * D_x + column(kept, x) * eps, std)
