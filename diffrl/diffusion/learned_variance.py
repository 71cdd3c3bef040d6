"""A variance for each coordinate of a reverse step, between two bounds: what a network's second output v means."""

import math

import torch
from torch import Tensor

from diffrl.diffusion.posterior import posterior, transition
from diffrl.diffusion.schedules.base import Schedule
from diffrl.shapes import column

__all__ = ["learned_log_variance", "step_kl"]

LAST = 0.5  # β̃/β of the step onto clean data, whose β̃ is 0


def learned_log_variance(process: Schedule, t: Tensor, s: Tensor, v: Tensor) -> Tensor:
    """Log-variance log Σ of the reverse step from t to s, by the output v of a network.

        log Σ = u log β + (1-u) log β̃,    u = (v+1)/2
        β = σ_t² - α_ts² σ_s²,    β̃ = β σ_s²/σ_t²

    β is the variance of the noise that the step takes away, β̃ that of x_s given x_t and x0. In a variance-preserving
    process with data of unit variance, and in EDM with any data, the variance of x_s given x_t lies between them. In
    others it need not; v is not held to [-1, 1]. An output of 0 is their geometric mean.

    The step onto clean data has β̃ = 0; β/2 stands for it. Published is the β̃ of the step before, which is about that
    where successive β are equal, but which a step does not know of itself.

    Source: Improved Denoising Diffusion Probabilistic Models (Nichol & Dhariwal, 2021), eq. 15, and its released code,
    https://arxiv.org/abs/2102.09672.

    Args:
        process: noise schedule.
        t: times of x_t, a scalar or shape [N].
        s: times to reach, less noisy, of t's shape.
        v: second output of the network, shape [N, *E].

    Returns:
        log Σ, of v's shape and dtype.
    """
    beta = transition(process, s, t)[1] ** 2
    beta_tilde = posterior(process, t, s, 1.0).std ** 2
    beta_tilde = torch.where(s == process.t_clean, LAST * beta, beta_tilde)
    u = (v + 1) / 2
    return u * column(beta.log(), v) + (1 - u) * column(beta_tilde.log(), v)


def step_kl(process: Schedule, t: Tensor, s: Tensor, x0: Tensor, D_x: Tensor, log_variance: Tensor) -> Tensor:
    """A term of the variational bound, coordinate by coordinate, in nats.

        L = KL( N(m̃, β̃) ‖ N(m, Σ) ) = ½ (log Σ - log β̃ + (β̃ + A² (x0 - D)²)/Σ - 1)
        s clean:    L = -log N(x0; D, Σ) = ½ (log 2πΣ + (x0 - D)²/Σ)

    with m̃ = A x0 + κ x_t and m = A D + κ x_t, A of the Markov coupling. At the exact D its minimum over Σ is
    Σ* = β̃ + A² Var(x0 | x_t). The last term is that of continuous data; it has no least value where data lie on a
    point, and published is the probability of an 8-bit pixel in its place.

    Source: Denoising Diffusion Probabilistic Models (Ho et al., 2020), eq. 5, https://arxiv.org/abs/2006.11239.

    Args:
        process: noise schedule.
        t: times of x_t, shape [N].
        s: times to reach, less noisy, shape [N].
        x0: clean data, shape [N, *E].
        D_x: clean estimates, shape [N, *E].
        log_variance: log Σ, shape [N, *E].

    Returns:
        L, shape [N, *E].
    """
    A, _, std = posterior(process, t, s, 1.0)
    clean = s == process.t_clean
    log_beta_tilde = torch.where(clean, -math.log(2 * math.pi), 2 * std.log())
    known = (~clean).double()  # 1 where β̃ is there to be subtracted
    square = (column(std**2, x0) + column(A, x0) ** 2 * (x0 - D_x) ** 2) / log_variance.exp()
    return 0.5 * (log_variance - column(log_beta_tilde, x0) + square - column(known, x0))
