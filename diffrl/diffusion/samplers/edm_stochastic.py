"""EDM's stochastic sampler: Heun steps, with fresh noise before each."""

import math
from dataclasses import dataclass

from torch import Tensor

from diffrl.diffusion.laws import NoiseFn
from diffrl.diffusion.samplers.base import Model, Sampler
from diffrl.diffusion.samplers.ode import Heun
from diffrl.diffusion.samplers.registry import SAMPLERS
from diffrl.diffusion.schedules.edm import EDM
from diffrl.errors import InputError
from diffrl.ranges import require_number

__all__ = ["EDMStochastic"]


@SAMPLERS.register("edm_stochastic")
@dataclass(frozen=True)
class EDMStochastic(Sampler):
    """EDM's stochastic sampler: fresh noise before each Heun step; the paper writes γ for the churn.

        churn = min(S_churn/N, √2 - 1) where S_min ≤ t ≤ S_max, else 0
        t̂ = t + churn t,    x̂ = x + √(t̂² - t²) S_noise z,    then Heun from t̂ to s

    S_churn = 0 is `Heun`.

    Source: Elucidating the Design Space of Diffusion-Based Generative Models (Karras et al., 2022),
    Algorithm 2 and Table 5 (ImageNet-64), https://arxiv.org/abs/2206.00364.

    Args:
        S_churn: amount of fresh noise over the whole chain of N steps, ≥ 0.
        S_min: lowest noise level at which it is added, ≥ 0.
        S_max: highest such level; infinity is every level above S_min.
        S_noise: factor on the added noise, in [0, 10], slightly above 1 to make up for what the denoiser removes too
            much.

    Raises:
        ValueError: an argument outside its range.
    """

    S_churn: float = 40.0
    S_min: float = 0.05
    S_max: float = 50.0
    S_noise: float = 1.003

    def __post_init__(self) -> None:
        require_number("S_churn", self.S_churn, 0)
        require_number("S_min", self.S_min, 0)
        if self.S_max != math.inf:
            require_number("S_max", self.S_max, 0)
        require_number("S_noise", self.S_noise, 0, 10)

    def step(self, model: Model, x: Tensor, t: Tensor, s: Tensor, noise: NoiseFn) -> Tensor:
        """Add noise from t up to t̂, then take a Heun step down to s.

        Raises:
            ValueError: the process is not EDM.
        """
        if not isinstance(model.process, EDM):
            name = type(model.process).__name__
            raise InputError(f"EDMStochastic works on the EDM process, not on {name}: use DDIM(eta)")
        churn = min(self.S_churn / model.num_steps, 2**0.5 - 1) if self.S_min <= t <= self.S_max else 0.0
        t_hat = t + churn * t
        if churn > 0:
            x = x + (t_hat**2 - t**2).sqrt() * self.S_noise * noise(x)
        return Heun().step(model, x, t_hat, s, noise)
