"""Training steps in plain torch, as a loop of one's own would have them: what diffrl is measured against.

The arithmetic is diffrl's: EDM process, Markov chains, weight "edm". Whatever is the same in all steps is computed
once: on a fixed grid all that follows from its levels.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Generator, Tensor, nn

__all__ = [
    "Chains",
    "Denoise",
    "Pairs",
    "denoise",
    "draw_pairs",
    "follow",
    "levels",
    "monte_carlo",
    "td_edm",
    "td_lambda",
]

Denoise = Callable[[nn.Module, Tensor, Tensor], Tensor]
"""(network, states [N, *E], noise levels [N]) → clean estimates [N, *E]."""

SIGMA_MIN, SIGMA_MAX, RHO, SIGMA_DATA = 0.002, 80.0, 7.0, 0.5
HIGH, LOW = SIGMA_MAX ** (1 / RHO), SIGMA_MIN ** (1 / RHO)


def denoise(network: nn.Module, x: Tensor, sigma: Tensor, cond: Tensor | None = None) -> Tensor:
    """D(x, σ) with EDM's preconditioning."""
    s = sigma.view(-1, *[1] * (x.ndim - 1))
    norm = s**2 + SIGMA_DATA**2
    c_in = norm.rsqrt()
    F_x = network(c_in * x, sigma.log() / 4, cond)
    return SIGMA_DATA**2 / norm * x + s * SIGMA_DATA * c_in * F_x


def grid(i: Tensor, num_steps: int) -> Tensor:
    """σ of real-valued indices on the ρ-grid, not past its end."""
    return (HIGH + i.clamp(max=num_steps - 1) / (num_steps - 1) * (LOW - HIGH)) ** RHO


class Chains:
    """Markov chains x_i = x0 + σ_i² Σ_{j≤i} c_j z_j, where c_j² = 1/σ_j² - 1/σ_{j-1}² and 1/σ_{-1} = 0."""

    def __init__(self, batch: int, sigma: Tensor, event_dims: int) -> None:
        """On levels sigma [N], float64, for that many data of so many dims."""
        c = (sigma**-2).diff(prepend=sigma.new_zeros(1)).sqrt()
        A = 1 - (torch.cat([sigma[1:], sigma.new_zeros(1)]) / sigma) ** 2
        c_out2 = (sigma * SIGMA_DATA) ** 2 / (sigma**2 + SIGMA_DATA**2)

        def row(a: Tensor) -> Tensor:
            return a.float().view(1, -1, *[1] * event_dims)

        self.num_steps = len(sigma)
        self.c, self.variance, self.A = row(c), row(sigma**2), row(A)
        self.weight_td, self.weight_denoising = row(1 / (A**2 * c_out2)), row(1 / c_out2)
        self.sigma = sigma.float().repeat(batch, 1)

    def draw(self, x0: Tensor, generator: Generator) -> Tensor:
        """States [B, N, *E]."""
        z = torch.randn(len(x0), self.num_steps, *x0.shape[1:], generator=generator)
        return x0.unsqueeze(1) + self.variance * (self.c * z).cumsum(1)


def levels(num_steps: int, offset: float = 0.0) -> Tensor:
    """σ of a grid that is shifted by a share of a step; a positive one makes the last level clean."""
    return grid(torch.arange(num_steps - (offset > 0), dtype=torch.float64) + offset, num_steps)


def monte_carlo(network: nn.Module, denoise: Denoise, chains: Chains, x: Tensor, x0: Tensor) -> Tensor:
    """EDM's denoising loss on the states of chains."""
    D_x = denoise(network, x.flatten(0, 1), chains.sigma.flatten()).view_as(x)
    return (chains.weight_denoising * (x0.unsqueeze(1) - D_x).square()).mean()


def td_lambda(
    network: nn.Module,
    target: nn.Module | None,
    denoise: Denoise,
    chains: Chains,
    lmbda: float,
    x: Tensor,
    x0: Tensor,
) -> Tensor:
    """TD(λ) on the errors e_i = A_i (x0 - D_i), bootstrapped from the same D or, if there is one, the target's."""
    datum, later = x0.unsqueeze(1), None
    if target is not None:
        x_next = x[:, 1:]
        with torch.no_grad():
            D_next = denoise(target, x_next.flatten(0, 1), chains.sigma[:, 1:].flatten()).view_as(x_next)
            later = chains.A[:, 1:] * (datum - D_next)
    e = chains.A * (datum - denoise(network, x.flatten(0, 1), chains.sigma.flatten()).view_as(x))
    with torch.no_grad():
        later = e[:, 1:] if later is None else later
        returns = torch.zeros_like(e)  # 0 at the clean state
        rows, errors = returns.unbind(1), later.unbind(1)
        G = rows[-1]
        for i in reversed(range(chains.num_steps - 1)):
            G = torch.lerp(errors[i], G, lmbda, out=rows[i])
    return (chains.weight_td * (e - returns).square()).mean()


class Pairs(NamedTuple):
    """What TD-EDM trains on; x of shape [B, *E], all else [B]."""

    x: Tensor
    sigma: Tensor
    A: Tensor
    x_next: Tensor
    sigma_next: Tensor
    A_next: Tensor
    valid: Tensor


def draw_pairs(
    x0: Tensor, generator: Generator, *, num_steps: int = 18, span: float = 3.0, stride: float = 0.2
) -> Pairs:
    """Markov pairs of TD-EDM."""
    last = num_steps - 1
    sigma = (-1.2 + 1.2 * torch.randn(len(x0), generator=generator)).exp().double()
    i = (sigma.clamp(SIGMA_MIN, SIGMA_MAX) ** (1 / RHO) - HIGH) / (LOW - HIGH) * last
    valid = (sigma >= SIGMA_MIN) & (sigma <= SIGMA_MAX) & (i <= last - (span + stride))
    sigma_next = grid(i + span, num_steps)
    A = 1 - (grid(i + stride, num_steps) / sigma) ** 2
    A_next = 1 - (grid(i + span + stride, num_steps) / sigma_next) ** 2
    added = (sigma**2 - sigma_next**2).clamp(min=0).sqrt()
    x_next = x0 + _column(sigma_next, x0) * torch.randn(x0.shape, generator=generator)
    x = x_next + _column(added, x0) * torch.randn(x0.shape, generator=generator)
    return Pairs(x, sigma.float(), A.float(), x_next, sigma_next.float(), A_next.float(), valid)


def td_edm(
    network: nn.Module,
    target: nn.Module,
    denoise: Denoise,
    pairs: Pairs,
    x0: Tensor,
    denoising_coef: float = 0.5,
) -> Tensor:
    """TD-EDM; denoising alone where a pair leaves the grid."""
    x, sigma, A, x_next, sigma_next, A_next, valid = pairs
    c_out2 = (sigma * SIGMA_DATA) ** 2 / (sigma**2 + SIGMA_DATA**2)
    w = torch.where(valid, 1 / (A**2 * c_out2).clamp(min=1e-8), 0.0)
    c = torch.where(valid, denoising_coef, 1 + denoising_coef) / c_out2
    with torch.no_grad():
        e_next = _column(A_next, x0) * (x0 - denoise(target, x_next, sigma_next))
    e = x0 - denoise(network, x, sigma)
    delta = _column(A, x0) * e - e_next
    return (_column(w, x0) * delta.square() + _column(c, x0) * e.square()).mean()


def _column(a: Tensor, x: Tensor) -> Tensor:
    return a.to(x.dtype).view(-1, *[1] * (x.ndim - 1))


def follow(followers: list[Tensor], leaders: list[Tensor], decay: float) -> None:
    """θ̄ ← decay θ̄ + (1 - decay) θ."""
    with torch.no_grad():
        torch._foreach_lerp_(followers, leaders, 1 - decay)
