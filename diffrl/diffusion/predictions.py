"""What a network's output F means: the coefficients of the clean estimate D = c_skip x_t + c_out F.

`to_x0` and `from_x0` convert x0, eps, v, velocity and score into each other by these coefficients.
"""

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from diffrl.diffusion.schedules.base import Schedule
from diffrl.diffusion.schedules.edm import EDM
from diffrl.errors import InputError
from diffrl.shapes import expand_like

__all__ = ["PredictionType", "Scalings", "boundary_scalings", "from_x0", "scalings", "to_x0"]

PredictionType = Literal["x0", "eps", "v", "velocity", "score", "edm"]


class Scalings(NamedTuple):
    """D(x_t, t) = c_skip x_t + c_out F(c_in x_t, c_noise)."""

    c_skip: Tensor
    c_out: Tensor
    c_in: Tensor


def scalings(process: Schedule, t: Tensor, prediction_type: PredictionType, sigma_data: float) -> Scalings:
    """The coefficients that turn a network's output F into the clean estimate D.

        x0        D = F
        eps       D = (x - σ F)/α
        v         D = (α x - σ F)/(α² + σ²),           F = α ε - σ x0
        velocity  D = (σ' x - σ F)/(σ' α - σ α'),      F = dx/dt = α' x0 + σ' ε
        score     D = (x + σ² F)/α,                    F = ∇ log p(x_t) = -ε/σ
        edm       D = (α σd² x + σ σd √s F)/s,         s = σ² + α² σd²
        c_in = 1/√(σ² + α² σd²): the input has unit variance

    With α = 1, `edm` gives EDM's own c_skip and c_out.

    Sources: v: Progressive Distillation for Fast Sampling of Diffusion Models (Salimans & Ho, 2022),
    appendix D, https://arxiv.org/abs/2202.00512; edm: Elucidating the Design Space of Diffusion-Based
    Generative Models (Karras et al., 2022), Table 1, https://arxiv.org/abs/2206.00364.

    Args:
        process: noise schedule.
        t: times, any shape, not clean. Where α = 0, eps and score do not determine x0: c_skip is infinite.
        prediction_type: what F is.
        sigma_data: σd, the standard deviation of the data.

    Returns:
        c_skip, c_out, c_in, of t's shape and dtype.

    Raises:
        ValueError: an unknown prediction type, or a velocity in discrete time.
    """
    alpha, sigma = process.alpha(t), process.sigma(t)
    s = sigma**2 + (alpha * sigma_data) ** 2
    c_in = s.rsqrt()
    if prediction_type == "x0":
        return Scalings(torch.zeros_like(c_in), torch.ones_like(c_in), c_in)
    if prediction_type == "eps":
        return Scalings(1 / alpha, -sigma / alpha, c_in)
    if prediction_type == "v":
        norm = alpha**2 + sigma**2
        return Scalings(alpha / norm, -sigma / norm, c_in)
    if prediction_type == "velocity":
        alpha_dot, sigma_dot = process.alpha_dot(t), process.sigma_dot(t)
        wronskian = sigma_dot * alpha - sigma * alpha_dot
        return Scalings(sigma_dot / wronskian, -sigma / wronskian, c_in)
    if prediction_type == "score":
        return Scalings(1 / alpha, sigma**2 / alpha, c_in)
    if prediction_type == "edm":
        return Scalings(alpha * sigma_data**2 / s, sigma * sigma_data * c_in, c_in)
    raise InputError(
        f"prediction_type is {prediction_type!r}: give one of {', '.join(get_args(PredictionType))}"
    )


def boundary_scalings(process: Schedule, t: Tensor, sigma_data: float) -> Scalings:
    """The coefficients of a consistency model: EDM's, shifted so that D(x, σ_min) = x exactly.

        c_skip = σd²/((σ - σ_min)² + σd²),    c_out = (σ - σ_min) σd/√(σ² + σd²),    c_in = 1/√(σ² + σd²)

    F cannot be recovered from D at σ_min, where D does not depend on it.

    Source: Consistency Models (Song et al., 2023), appendix C, https://arxiv.org/abs/2303.01469; c_in:
    Elucidating the Design Space of Diffusion-Based Generative Models (Karras et al., 2022), Table 1,
    https://arxiv.org/abs/2206.00364.

    Args:
        process: EDM.
        t: noise levels σ ≥ σ_min, any shape.
        sigma_data: σd, the standard deviation of the data.

    Returns:
        c_skip, c_out, c_in, of t's shape and dtype.

    Raises:
        ValueError: another process.
    """
    if not isinstance(process, EDM):
        name = type(process).__name__
        raise InputError(f"the boundary form of consistency models is defined on EDM, not on {name}")
    excess = t - process.sigma_min
    c_in = (t**2 + sigma_data**2).rsqrt()
    return Scalings(sigma_data**2 / (excess**2 + sigma_data**2), excess * sigma_data * c_in, c_in)


def to_x0(
    process: Schedule,
    F_x: Tensor,
    x_t: Tensor,
    t: Tensor,
    prediction_type: PredictionType,
    *,
    sigma_data: float | None = None,
) -> Tensor:
    """Clean estimate from a prediction: D = c_skip x_t + c_out F.

    Args:
        process: noise schedule.
        F_x: prediction, shape [*b, *E].
        x_t: states, shape [*b, *E].
        t: times, shape [*b] or [*b, 1].
        prediction_type: what F is.
        sigma_data: σd, needed for "edm" only.

    Raises:
        ValueError: an unknown prediction type, or "edm" without sigma_data.
    """
    c_skip, c_out = _affine(process, x_t, t, prediction_type, sigma_data)
    return c_skip * x_t + c_out * F_x


def from_x0(
    process: Schedule,
    x0: Tensor,
    x_t: Tensor,
    t: Tensor,
    prediction_type: PredictionType,
    *,
    sigma_data: float | None = None,
) -> Tensor:
    """The prediction that a clean estimate amounts to: F = (D - c_skip x_t)/c_out; inverse of `to_x0`.

    Args and errors are those of `to_x0`, with the clean estimate D as `x0`.
    """
    c_skip, c_out = _affine(process, x_t, t, prediction_type, sigma_data)
    return (x0 - c_skip * x_t) / c_out


def _affine(
    process: Schedule, x_t: Tensor, t: Tensor, prediction_type: PredictionType, sigma_data: float | None
) -> tuple[Tensor, Tensor]:
    """c_skip and c_out, broadcast against x_t."""
    if prediction_type == "edm" and sigma_data is None:
        raise InputError("prediction_type 'edm' is relative to the scale of the data: give sigma_data")
    scale = 1.0 if sigma_data is None else sigma_data  # enters no other type's c_skip and c_out
    c_skip, c_out, _ = scalings(process, t, prediction_type, scale)
    return expand_like(c_skip.to(x_t.dtype), x_t), expand_like(c_out.to(x_t.dtype), x_t)
