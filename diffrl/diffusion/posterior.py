"""The process x_t = α_t x0 + σ_t ε: its marginals, its transitions, and its one-step posteriors.

A coupling η ∈ [0, 1] says how successive states share their noise: η = 1 is the Markov (ancestral) process,
η = 0 the deterministic one, whose states share one noise. The marginals are the same for every η, the joint law
of several states is not.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from diffrl.diffusion.schedules.base import Schedule
from diffrl.errors import InputError
from diffrl.ranges import require_number
from diffrl.shapes import expand_like

__all__ = [
    "Posterior",
    "coupling_eta",
    "marginal",
    "posterior",
    "posterior_of_scales",
    "transition",
]


class Posterior(NamedTuple):
    """x_s | x_t, x0 ~ N(A x0 + κ x_t, std² I)."""

    A: Tensor
    kappa: Tensor
    std: Tensor


def coupling_eta(coupling: float | str) -> float:
    """η of a coupling given by name or number: "markov" is 1, "shared" is 0.

    Raises:
        ValueError: another name, or a number outside [0, 1].
    """
    eta = {"markov": 1.0, "shared": 0.0}.get(coupling) if isinstance(coupling, str) else coupling
    if eta is None:
        raise InputError(f"coupling is {coupling!r}: give 'markov', 'shared' or a number in [0, 1]")
    return require_number("coupling", eta, 0, 1)


def posterior(process: Schedule, t: Tensor, s: Tensor, eta: float) -> Posterior:
    """Law of the less noisy state x_s given x_t and the clean x0, under coupling η.

        κ = (σ_s/σ_t) √((1-η²) + η² α_ts² σ_s²/σ_t²),    α_ts = α_t/α_s
        A = α_s - α_t κ
        std = η (σ_s/σ_t) √(σ_t² - α_ts² σ_s²)

    A step onto clean data has κ = 0 and A = 1; a step with s = t has κ = 1 and A = 0. The usual form,
    κ² = (σ_s² - std²)/σ_t², subtracts numbers that are nearly equal; this one does not. It is evaluated in float64.

    Source: Denoising Diffusion Implicit Models (Song et al., 2021), eq. 7 (our std is their σ),
    https://arxiv.org/abs/2010.02502; η = 1 for EDM: Temporal Difference Learning for Diffusion Models (2026),
    https://arxiv.org/abs/2606.15048.

    Args:
        process: noise schedule.
        t: times of x_t, not clean, any shape.
        s: times of x_s, not noisier than t, broadcastable against t.
        eta: coupling η ∈ [0, 1].

    Returns:
        A, κ and std, float64.
    """
    t, s = t.double(), s.double()
    return posterior_of_scales(process.alpha(t), process.sigma(t), process.alpha(s), process.sigma(s), eta)


def posterior_of_scales(
    alpha_t: Tensor, sigma_t: Tensor, alpha_s: Tensor, sigma_s: Tensor, eta: float
) -> Posterior:
    """As `posterior`, by the scales of both states, float64."""
    alpha_ts, ratio = _alpha_ratio(alpha_t, alpha_s), sigma_s / sigma_t
    kappa = ratio * ((1 - eta**2) + eta**2 * (alpha_ts * ratio) ** 2).sqrt()
    A = alpha_s - alpha_t * kappa
    std = eta * ratio * (sigma_t**2 - (alpha_ts * sigma_s) ** 2).clamp(min=0).sqrt()
    return Posterior(A, kappa, std)


def _alpha_ratio(alpha_t: Tensor, alpha_s: Tensor) -> Tensor:
    """α_ts = α_t/α_s; 1 where both are pure noise."""
    return torch.where(alpha_s == 0, 1.0, alpha_t / alpha_s)


def transition(process: Schedule, s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Adding noise to a state, Markov coupling: x_t | x_s ~ N(α_ts x_s, std² I), std² = σ_t² - α_ts² σ_s².

    Args:
        process: noise schedule.
        s: times of x_s, any shape.
        t: times of x_t, not less noisy than s, broadcastable against s.

    Returns:
        α_ts and std, float64.
    """
    t, s = t.double(), s.double()
    alpha_ts = _alpha_ratio(process.alpha(t), process.alpha(s))
    return alpha_ts, (process.sigma(t) ** 2 - (alpha_ts * process.sigma(s)) ** 2).clamp(min=0).sqrt()


def marginal(process: Schedule, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """x_t = α_t x0 + σ_t ε.

    Args:
        process: noise schedule.
        x0: clean data, shape [*b, *E].
        t: times, shape [*b] or [*b, 1].
        noise: ε, of x0's shape.
    """
    alpha, sigma = process.alpha(t).to(x0.dtype), process.sigma(t).to(x0.dtype)
    return expand_like(alpha, x0) * x0 + expand_like(sigma, x0) * noise
