"""Laws of one reverse step: each draws the next state, scores one, and measures how far it is from another law."""

import math
from collections.abc import Callable
from typing import Literal, NamedTuple, Protocol, Self

import torch
from torch import Tensor

from diffrl.errors import InputError
from diffrl.shapes import column

__all__ = ["Gaussian", "Law", "NoiseFn", "Reduction"]

# standard normal numbers for a tensor, of its shape, dtype and device
NoiseFn = Callable[[Tensor], Tensor]
Reduction = Literal["sum", "mean"]


class Law(Protocol):
    """The law of the next state of N chains: what a policy is made of.

    Reductions run over the event dims. "sum" gives the log-density or the divergence itself. "mean" divides it by
    the number of dims, which is what DDPO's clip range was published for.
    """

    @property
    def stochastic(self) -> Tensor:
        """Which of the N steps are random, and so have a density: bool, shape [N]."""
        ...

    def sample(self, noise: NoiseFn) -> Tensor:
        """Draw the next states, shape [N, *E]."""
        ...

    def log_prob(self, x: Tensor, reduction: Reduction) -> Tensor:
        """Log-density of the states x [N, *E], shape [N]; 0 for steps that are not stochastic."""
        ...

    def kl(self, other: Self, reduction: Reduction) -> Tensor:
        """KL divergence from this law to the other, shape [N]; 0 for steps that are not stochastic."""
        ...


class Gaussian(NamedTuple):
    """The law N(mean, std² I) of the next state; where std is 0 the next state is the mean itself.

    Args:
        mean: shape [N, *E].
        std: standard deviation ≥ 0, one number for all states, or one for each, shape [N].
    """

    mean: Tensor
    std: Tensor

    @property
    def stochastic(self) -> Tensor:
        """Where std > 0: bool, shape [N], on the device of the mean."""
        return (self.std > 0).to(self.mean.device).expand(len(self.mean))

    def sample(self, noise: NoiseFn) -> Tensor:
        """Draw mean + std z; `noise` is not called if every step is deterministic.

        Args:
            noise: gives z, standard normal numbers of the mean's shape.
        """
        if not bool((self.std > 0).any()):
            return self.mean
        return self.mean + column(self.std, self.mean) * noise(self.mean)

    def log_prob(self, x: Tensor, reduction: Reduction) -> Tensor:
        """Log-density of x, summed or averaged over the event dims.

            log p = Σ_E [ -(x - mean)²/(2 std²) - log std - ½ log 2π ]

        The mean over dims is not a log-density: it is the log-density divided by dim(E).

        Args:
            x: states, shape [N, *E].
            reduction: "sum" (the log-density) or "mean".

        Returns:
            Shape [N], of x's dtype; 0 in the rows whose own std is 0.

        Raises:
            ValueError: std is a single number and 0, as the law of a deterministic step has it at a scalar
                time: such a step has no density.
        """
        if self.std.ndim == 0 and not bool(self.std > 0):
            raise InputError(
                "std is 0: a deterministic step has no log-probability; use eta > 0 or a floor on std"
            )
        std = column(self._positive_std, x)
        log_p = -((x - self.mean) ** 2) / (2 * std**2) - std.log() - 0.5 * math.log(2 * math.pi)
        return torch.where(self.stochastic, _reduced(log_p, reduction), 0.0)

    def kl(self, other: "Gaussian", reduction: Reduction) -> Tensor:
        """KL divergence to another law with the same std, in closed form.

            KL = |mean - mean'|²/(2 std²)

        Two policies that share a sampler have the same std at the same step, whatever their networks.

        Source: the KL of two normals with one covariance; Flow-GRPO (Liu et al., 2025), eq. 12,
        https://arxiv.org/abs/2505.05470.

        Args:
            other: the law to compare with, of the same states.
            reduction: "sum" (the divergence itself) or "mean" over the event dims.

        Returns:
            Shape [N], ≥ 0; 0 in the rows whose std is 0.

        Raises:
            ValueError: the two laws differ in std.
        """
        if not torch.equal(self.std, other.std):
            raise InputError(
                "the two laws differ in std: compare policies of the same sampler, grid and std floor"
            )
        std = column(self._positive_std, self.mean)
        squares = (self.mean - other.mean) ** 2 / (2 * std**2)
        return torch.where(self.stochastic, _reduced(squares, reduction), 0.0)

    @property
    def _positive_std(self) -> Tensor:
        """Std, with 1 in place of 0: no infinity enters a gradient through a row that is left out anyway."""
        return torch.where(self.std > 0, self.std, 1.0)


def _reduced(values: Tensor, reduction: Reduction) -> Tensor:
    """The sum or mean over the event dims: [N, *E] → [N]."""
    flat = values.flatten(1) if values.ndim > 1 else values.unsqueeze(-1)
    return flat.sum(-1) if reduction == "sum" else flat.mean(-1)
