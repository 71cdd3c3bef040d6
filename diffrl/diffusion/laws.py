"""Laws of one reverse step: what a sampler draws from, and what a policy is compared by."""

import math
from collections.abc import Callable
from typing import Literal, NamedTuple, Protocol, Self

from torch import Tensor

from diffrl.shapes import expand_like

__all__ = ["Gaussian", "Law", "NoiseFn", "Reduction", "column"]

# standard normal numbers for a tensor, of its shape, dtype and device
NoiseFn = Callable[[Tensor], Tensor]
Reduction = Literal["sum", "mean"]


def column(c: Tensor, x: Tensor) -> Tensor:
    """A float64 number, or one per state, such that it multiplies states x [N, *E] of another dtype."""
    return expand_like(c.to(x), x)


class Law(Protocol):
    """A law over the next states x_s [N, *E]."""

    @property
    def stochastic(self) -> Tensor:
        """Which of the states have noise, so that they have a log-probability: bool [N], or one for all."""
        ...

    def sample(self, noise: NoiseFn) -> Tensor:
        """A draw, shape [N, *E]."""
        ...

    def log_prob(self, x: Tensor, reduction: Reduction) -> Tensor:
        """Log-probability of x, summed or averaged over the event dims: shape [N]."""
        ...

    def kl(self, other: Self, reduction: Reduction) -> Tensor:
        """KL(self ‖ other), summed or averaged over the event dims: shape [N]."""
        ...


class Gaussian(NamedTuple):
    """x_s ~ N(mean, std² I); where std is 0, as in an ODE's step, x_s is the mean.

    Args:
        mean: shape [N, *E].
        std: one number, or one per state [N].
    """

    mean: Tensor
    std: Tensor

    @property
    def stochastic(self) -> Tensor:
        """Std > 0, of std's shape."""
        return self.std > 0

    def sample(self, noise: NoiseFn) -> Tensor:
        """A draw, mean + std z; no noise is asked for where every std is 0."""
        if not bool(self.stochastic.any()):
            return self.mean
        return self.mean + column(self.std, self.mean) * noise(self.mean)

    def log_prob(self, x: Tensor, reduction: Reduction) -> Tensor:
        """Log-density, summed or averaged over the event dims.

            log p = Σ_E [ -(x - mean)²/(2 std²) - log std - ½ log 2π ]

        The mean over dims is not a log-density but is what DDPO's clip range was published for; they differ by
        the factor dim(E).

        Args:
            x: values, shape [N, *E].
            reduction: "sum" (a density) or "mean".

        Returns:
            Shape [N], of x's dtype.

        Raises:
            ValueError: std is 0 somewhere: a deterministic step has no density.
        """
        if not bool(self.stochastic.all()):
            raise ValueError(
                "std is 0: a deterministic step has no log-probability; use eta > 0 or a floor on std"
            )
        std = column(self.std, x)
        log_p = -((x - self.mean) ** 2) / (2 * std**2) - std.log() - 0.5 * math.log(2 * math.pi)
        flat = log_p.flatten(1) if x.ndim > 1 else log_p.unsqueeze(-1)
        return flat.sum(-1) if reduction == "sum" else flat.mean(-1)

    def kl(self, other: Self, reduction: Reduction) -> Tensor:
        """KL(self ‖ other) of laws that share std: |mean - mean'|²/(2 std²), shape [N].

        Source: the KL of two normals with one covariance; as a regulariser: Flow-GRPO (Liu et al., 2025), eq. 12,
        https://arxiv.org/abs/2505.05470.

        Args:
            other: at the same states, with the same std > 0; elsewhere the result is NaN or infinite.
            reduction: "sum" is the divergence itself.
        """
        squares = (self.mean - other.mean) ** 2 / (2 * expand_like(self.std, self.mean) ** 2)
        return squares.flatten(1).sum(1) if reduction == "sum" else squares.flatten(1).mean(1)
