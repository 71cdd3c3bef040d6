"""Noise added to a state that is noisy already, and what a denoiser of the noisier state has to learn."""

import torch
from torch import Tensor

from diffrl.diffusion.posterior import transition
from diffrl.diffusion.schedules.base import Schedule
from diffrl.errors import InputError
from diffrl.shapes import column

__all__ = ["FINE", "between", "marginal_target", "renoise", "target_noise"]

FINE = 1000
"""Levels of the grid on which times between two states are drawn."""


def between(process: Schedule, t: Tensor, s: Tensor, u: Tensor, *, margin: float = 0.02) -> Tensor:
    """Times between s and the noisier t, uniform in the process's own index: for u ~ U[0, 1).

        i = i_t + u (i_s - margin N - i_t),    N = 1000 levels

    The margin keeps the noise that is added away from 0, where the target of `marginal_target` has no bound. In a flow
    i is the time before its shift.

    Args:
        process: noise schedule.
        t: times, float64, any shape.
        s: less noisy times of that shape; the clean one is allowed.
        u: numbers in [0, 1) of that shape.
        margin: share of the whole grid that is left out next to s.

    Returns:
        Times, float64, of that shape. Where the two are closer than the margin it is t itself.
    """
    i_t = process.index(t.double(), FINE)
    clean = torch.full_like(i_t, float(FINE))
    i_s = torch.where(
        s == process.t_clean, clean, process.index(torch.where(s == process.t_clean, t, s), FINE)
    )
    i = i_t + u.double() * (i_s - margin * FINE - i_t).clamp(min=0)
    return process.time(i if process.continuous else i.round(), FINE)


def renoise(process: Schedule, x_s: Tensor, s: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """x_t = a x_s + b ε with a = α_t/α_s and b² = σ_t² - a² σ_s².

    Args:
        process: noise schedule.
        x_s: states, shape [N, *E].
        s: their times, shape [N].
        t: times to reach, not less noisy, shape [N].
        noise: ε, of x_s's shape.
    """
    a, b = transition(process, s, t)
    return column(a, x_s) * x_s + column(b, x_s) * noise


def marginal_target(process: Schedule, x_s: Tensor, s: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """D*, whose mean given x_t is the clean estimate that has the score of x_t's own law, whatever law x_s has.

        D* = (x_s - (a σ_s²/b) ε)/α_s,    E[D* | x_t] = (x_t + σ_t² ∇ log p_t(x_t))/α_t

    It is denoising score matching given x_s. At clean s it is x_s; else its noise grows as 1/b.

    Sources: A Connection Between Score Matching and Denoising Autoencoders (Vincent, 2011); with x_s a state of a
    few-step generator: Learning Few-Step Diffusion Models by Trajectory Distribution Matching (Luo et al., 2025),
    https://arxiv.org/abs/2503.06674. The form without a division by α_t is ours.

    Args:
        process: noise schedule.
        x_s: states, shape [N, *E]; s is not pure noise.
        s: their times, shape [N].
        t: times of x_t, noisier, shape [N].
        noise: the ε that `renoise` was given.

    Raises:
        ValueError: a state of pure noise.
    """
    if bool((process.alpha(s) == 0).any()):
        raise InputError("x_s is pure noise, which says nothing of the data: start from a later state")
    c = _noise_share(process, s, t)
    return (x_s - column(c, x_s) * noise) / column(process.alpha(s.double()), x_s)


def target_noise(process: Schedule, s: Tensor, t: Tensor, c_skip: Tensor) -> Tensor:
    """How much less noise the target of a network's output has from clean data than from x_s: w ∈ (0, 1], 1 at clean s.

        w = (c_skip σ_t / (c_skip b + a σ_s²/(α_s b)))²

    As a weight it gives every target unit noise, relative to that from clean data. In a flow with velocities it is
    (b/(t + s² a/(1-s)))².

    Args:
        process: noise schedule.
        s: times of the states, shape [N].
        t: times of x_t, noisier, shape [N].
        c_skip: of the network at t, shape [N], see `diffrl.diffusion.predictions.scalings`.
    """
    _, b = transition(process, s, t)
    c_skip = c_skip.double()
    noise = c_skip * b + _noise_share(process, s, t) / process.alpha(s.double())
    return (c_skip * process.sigma(t.double()) / noise) ** 2


def _noise_share(process: Schedule, s: Tensor, t: Tensor) -> Tensor:
    """A σ_s²/b; 0 at clean s."""
    a, b = transition(process, s, t)
    sigma_s = process.sigma(s.double())
    return torch.where(sigma_s == 0, 0.0, a * sigma_s**2 / b)
