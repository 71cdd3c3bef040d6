"""Weights on the squared TD error δ², one function per name, all of the same few quantities."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["WEIGHTS", "WeightTerms", "weight_function"]


class WeightTerms(NamedTuple):
    """What a weight may depend on, each of shape [*b, 1]."""

    A: Tensor
    """A_t, coefficient of x0 in the value of the state left."""
    A_next: Tensor
    """A_t' of the state reached; 0 if it is clean."""
    c_out: Tensor
    """Scale of the network's output at the state left."""
    c_out_next: Tensor
    """The same at the state reached; anything finite if it is clean."""


def pairwise(w: WeightTerms) -> Tensor:
    """1/(A_t² c_out(t)² + A_t'² c_out(t')²): the variance of δ in units of network output (the paper's text)."""
    return 1 / ((w.A * w.c_out) ** 2 + (w.A_next * w.c_out_next) ** 2)


def edm(w: WeightTerms) -> Tensor:
    """1/max(A_t² c_out(t)², 1e-8): δ in units of network output (the released EDM code)."""
    return 1 / ((w.A * w.c_out) ** 2).clamp(min=1e-8)


def sum_sq(w: WeightTerms) -> Tensor:
    """1/max(A_t² + A_t'², 0.01) (the released consistency code, torch)."""
    return 1 / (w.A**2 + w.A_next**2).clamp(min=0.01)


def sum_(w: WeightTerms) -> Tensor:
    """1/max(A_t + A_t', 0.01) (the released consistency code, jax)."""
    return 1 / (w.A + w.A_next).clamp(min=0.01)


def none(w: WeightTerms) -> Tensor:
    """1: an ablation."""
    return torch.ones_like(w.A)


WEIGHTS: dict[str, Callable[[WeightTerms], Tensor]] = {
    "pairwise": pairwise,
    "edm": edm,
    "sum_sq": sum_sq,
    "sum": sum_,
    "none": none,
}
"""Source: Temporal Difference Learning for Diffusion Models (2026), eq. of the TD loss and its released code,
https://arxiv.org/abs/2606.15048."""


def weight_function(name: str) -> Callable[[WeightTerms], Tensor]:
    """The weight of that name.

    Raises:
        ValueError: there is none.
    """
    if name not in WEIGHTS:
        raise ValueError(f"weight is {name!r}: give one of {', '.join(WEIGHTS)}")
    return WEIGHTS[name]
