"""Gaussian mixtures: data whose law is known, and with it the exact denoiser."""

from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from diffrl.errors import InputError

__all__ = ["Mixture"]


@dataclass(frozen=True, eq=False)
class Mixture:
    """Mixture of isotropic Gaussians, p(x) = Σ_c w_c N(x; μ_c, s_c² I), held in float64.

    Args:
        means: μ_c, shape [C, D].
        stds: s_c ≥ 0, shape [C]; 0 is a point mass.
        weights: w_c ≥ 0 with sum 1, shape [C].

    Raises:
        ValueError: shapes or values do not fit.
    """

    means: Tensor
    stds: Tensor
    weights: Tensor

    def __post_init__(self) -> None:
        for field in ("means", "stds", "weights"):
            object.__setattr__(self, field, getattr(self, field).detach().double())
        C = self.means.shape[0]
        if self.means.ndim != 2 or self.stds.shape != (C,) or self.weights.shape != (C,):
            shapes = [tuple(a.shape) for a in (self.means, self.stds, self.weights)]
            raise InputError(f"a mixture needs means [C, D], stds [C] and weights [C], not {shapes}")
        whole = bool(self.means.isfinite().all() and self.stds.isfinite().all())
        positive = bool((self.stds >= 0).all() and (self.weights >= 0).all())
        if not (whole and positive and abs(float(self.weights.sum()) - 1) <= 1e-6):
            raise InputError("a mixture needs finite means, stds >= 0, and weights >= 0 that sum to 1")

    @property
    def sigma_data(self) -> float:
        """Standard deviation of a coordinate picked at random: √(E|x|²/D - (E Σx/D)²)."""
        second = self.weights @ (self.means.square().mean(1) + self.stds.square())
        return float((second - (self.weights @ self.means.mean(1)) ** 2).clamp(min=0).sqrt())

    def sample(self, n: int, generator: Generator | None = None) -> Tensor:
        """Draw n points, float64 [n, D]."""
        c = torch.multinomial(self.weights, n, replacement=True, generator=generator)
        noise = torch.randn(n, self.means.shape[1], dtype=torch.float64, generator=generator)
        return self.means[c] + self.stds[c, None] * noise
