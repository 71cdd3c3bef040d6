"""TD-EDM, as published: pairs of noise levels, a target network, and plain denoising where no pair fits the grid."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from tensordict import TensorDict
from torch import Tensor

from diffrl import keys
from diffrl.diffusion.denoisers import Denoiser
from diffrl.diffusion.posterior import coupling_eta
from diffrl.diffusion.schedules.edm import EDM
from diffrl.errors import InputError
from diffrl.objectives.one_step import cut_pairs
from diffrl.objectives.place import Place
from diffrl.objectives.registry import OBJECTIVES
from diffrl.objectives.value import ValueLoss
from diffrl.ranges import MAX_STEPS, require_int, require_number
from diffrl.registry import options_of
from diffrl.shapes import expand_like, require_data, require_finite

__all__ = ["Pairs", "draw_pairs", "sample_td_edm_pairs", "td_edm_loss"]


def sample_td_edm_pairs(
    process: EDM,
    x0: Tensor,
    *,
    coupling: float | str = "markov",
    num_steps: int = 18,
    span: float = 3.0,
    stride: float = 0.2,
    P_mean: float = -1.2,
    P_std: float = 1.2,
    cond: Tensor | None = None,
    sigma: Tensor | None = None,
    noise: Tensor | None = None,
    fresh_noise: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> TensorDict:
    """Pairs of states of one datum: at a log-normal noise level, and `span` index units below it.

        ln σ_t ~ N(P_mean, P_std²),    i = index of σ_t on the ρ-grid,    σ_t' = σ_{i+k}
        Markov:  x_t' = x0 + σ_t' ε,   x_t = x_t' + √max(σ_t² - σ_t'², 0) ε_add
        shared:  x_t = x0 + σ_t ε,     x_t' = x0 + σ_t' ε
        valid:   σ_min ≤ σ_t ≤ σ_max and i ≤ (N-1) - (k+Δ)

    Indices are clamped to the grid, so the clean state is never reached. The defaults are the released
    command's; the paper's text has k = 1, Δ = 0.25.

    Sources: Temporal Difference Learning for Diffusion Models (2026), https://arxiv.org/abs/2606.15048; the
    log-normal law: Elucidating the Design Space of Diffusion-Based Generative Models (Karras et al., 2022),
    Table 1, https://arxiv.org/abs/2206.00364.

    Args:
        process: EDM.
        x0: clean data, shape [B, *E].
        coupling: "markov" or "shared"; the paper has no other.
        num_steps: N ≥ 2 of the ρ-grid.
        span: k > 0, in index units.
        stride: Δ > 0, in index units.
        P_mean: mean of ln σ_t, in [-15, 15].
        P_std: standard deviation of ln σ_t, in [0, 5].
        cond: condition, shape [B, ...].
        sigma: σ_t to use, shape [B].
        noise: ε to use, of x0's shape.
        fresh_noise: ε_add to use, of x0's shape (Markov only).
        generator: source of randomness; drawn in the order σ_t, ε, ε_add.

    Returns:
        TensorDict of batch size [B, 1], with the entry ``valid`` beside those of a chain.

    Raises:
        TypeError: x0 is no tensor, or holds integers.
        ValueError: another process or coupling, a number outside its range, x0 that is empty or holds NaN, or a tensor
            of another shape.
    """
    require_data(x0, cond)
    require_finite("x0", x0)
    given = {
        "sigma": (sigma, x0.shape[:1]),
        "noise": (noise, x0.shape),
        "fresh_noise": (fresh_noise, x0.shape),
    }
    _check(process, coupling, given)
    require_int("num_steps", num_steps, 2, MAX_STEPS)
    require_number("span", span, 0, ends="()")
    require_number("stride", stride, 0, ends="()")
    require_number("P_mean", P_mean, -15, 15)
    require_number("P_std", P_std, 0, 5)
    x_t, t, A, x_next, t_next, A_next, valid = draw_pairs(
        process,
        x0,
        coupling=coupling,
        num_steps=num_steps,
        span=span,
        stride=stride,
        P_mean=P_mean,
        P_std=P_std,
        sigma=sigma,
        noise=noise,
        fresh_noise=fresh_noise,
        generator=generator,
    )
    left = {keys.X_T: x_t, keys.T: t, keys.A: A, keys.KAPPA: 1 - A}
    reached = {keys.X_T: x_next, keys.T: t_next, keys.A: A_next, keys.KAPPA: 1 - A_next}
    return cut_pairs(x0.unsqueeze(1), left, reached, valid=valid, cond=cond)


class Pairs(NamedTuple):
    """Pairs of states x [B, 1, *E] and x_next, of one datum each; the rest is [B, 1, 1]."""

    x: Tensor
    t: Tensor
    A: Tensor
    x_next: Tensor
    t_next: Tensor
    A_next: Tensor
    valid: Tensor


def draw_pairs(
    process: EDM,
    x0: Tensor,
    *,
    coupling: float | str,
    num_steps: int,
    span: float,
    stride: float,
    P_mean: float,
    P_std: float,
    sigma: Tensor | None,
    noise: Tensor | None,
    fresh_noise: Tensor | None,
    generator: torch.Generator | None,
) -> Pairs:
    """As `sample_td_edm_pairs`, without its checks, and in no TensorDict."""
    eta = coupling_eta(coupling)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=x0.dtype, device=x0.device)

    if sigma is None:
        sigma = (P_mean + P_std * randn(len(x0))).exp()
    levels, valid = _levels(process, sigma.double(), num_steps, eta, span, stride)
    t, t_next, added, A, A_next = levels.to(x0.dtype).view(5, -1, 1, 1).unbind()
    noise = randn(*x0.shape) if noise is None else noise
    datum, noise = x0.unsqueeze(1), noise.unsqueeze(1)
    x_next = datum + expand_like(t_next, datum) * noise
    if eta == 1:
        fresh_noise = randn(*x0.shape) if fresh_noise is None else fresh_noise
        x_t = x_next + expand_like(added, datum) * fresh_noise.unsqueeze(1)
    else:
        x_t = datum + expand_like(t, datum) * noise
    return Pairs(x_t, t, A, x_next, t_next, A_next, valid)


@OBJECTIVES.register(
    "td_edm",
    also=sample_td_edm_pairs,
    label="TD-EDM",
    place=Place(
        "denoiser",
        "pairs",
        "markov",
        "one_step",
        "target",
        "forward",
        note="objective.coupling=shared leads to the other fixed point",
    ),
)
@options_of(ValueLoss, drop=("lmbda", "n_steps", "lookahead", "gamma", "bootstrap"), denoising_coef=0.5)
def td_edm_loss(denoiser: Denoiser, **options: Any) -> ValueLoss:
    """TD(0) on pairs of states with a target network, plus denoising; to be fed with `sample_td_edm_pairs`.

        L = mean( valid ? w ‖δ‖² + c L_den : (1 + c) L_den ),    δ = A_t (x0 - D(x_t)) - A_t' (x0 - D⁻(x_t'))

    It is `ValueLoss` with n = 1 and a target network, which the caller moves: the released command uses
    ``SoftUpdate(loss, tau=0.001)`` after every step. (A hard copy every 100 steps is the default of an inner function
    only, which that command never leaves as it is.)

    Source: Temporal Difference Learning for Diffusion Models (2026) and its released command,
    https://arxiv.org/abs/2606.15048.

    Args:
        denoiser: D, on an EDM process; trained in place.
        options: those of `ValueLoss` that do not choose a target: w by its name (weight "edm" is the released
            code's, "pairwise" the text's) with its numbers, and c (denoising_coef).
    """
    loss = ValueLoss(denoiser, n_steps=1, bootstrap="target", **options)
    loss.target_decay = 0.999  # as published
    return loss


def _check(
    process: object,
    coupling: float | str,
    given: Mapping[str, tuple[Tensor | None, torch.Size]],
) -> None:
    """Refuse what TD-EDM is not defined for; `given` are tensors, each with the shape that it must have."""
    if not isinstance(process, EDM):
        raise InputError(f"the process is {type(process).__name__}: TD-EDM is defined for EDM")
    if coupling_eta(coupling) not in (0.0, 1.0):
        raise InputError(f"coupling is {coupling!r}: TD-EDM is defined for 'markov' and 'shared'")
    for name, (tensor, shape) in given.items():
        if tensor is not None and tensor.shape != shape:
            raise InputError(f"{name} has shape {tuple(tensor.shape)}, expected {tuple(shape)}")


def _levels(
    process: EDM, sigma_t: Tensor, num_steps: int, eta: float, span: float, stride: float
) -> tuple[Tensor, Tensor]:
    """σ_t, σ_t', √max(σ_t² - σ_t'², 0), A_t and A_t', float64 [5, B]; validity [B, 1, 1].

    A of a step from σ to σ_s is 1 - (σ_s/σ)², and 1 - σ_s/σ under shared noise: `posterior`'s, where α = 1.
    """
    low, high, last = process.sigma_min, process.sigma_max, num_steps - 1
    i = process.index(sigma_t.clamp(low, high), num_steps)
    i_next = i + span
    levels = process.time(torch.stack([i_next, i + stride, i_next + stride]), num_steps).clamp(low, high)
    sigma_next = levels[0]
    valid = (sigma_t >= low) & (sigma_t <= high) & (i <= last - (span + stride))
    added = (sigma_t**2 - sigma_next**2).clamp(min=0).sqrt()
    A = 1 - (levels[1:] / torch.stack([sigma_t, sigma_next])) ** (1 + eta)
    A.masked_fill_(~valid, 1.0)  # not used elsewhere, but must be finite
    return torch.stack([sigma_t, sigma_next, added, *A]), valid.view(-1, 1, 1)
