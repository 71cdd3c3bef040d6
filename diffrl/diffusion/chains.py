"""A chain: the noise levels that it visits, and the step from each level to the next.

`sample_chain`, the environments and the tests all work from one `Chain`.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from diffrl.diffusion.posterior import Posterior, coupling_eta, posterior, posterior_of_scales
from diffrl.diffusion.schedules.base import Schedule
from diffrl.errors import InputError
from diffrl.ranges import MAX_STEPS, require_int, require_number
from diffrl.shapes import expand_like

__all__ = ["Chain"]


@dataclass(frozen=True)
class Chain:
    """States at index 0, k, 2k, … of a grid of N noise levels, then the clean state: K = ⌈N/k⌉ transitions.

    The value of state i is V(x_i) = A_i E[x0 | x_i] + κ_i x_i with A_i, κ_i of the step i → i+Δ. Past N-1
    that step lands on the clean state: A = 1, κ = 0. The clean state itself has value 0: A = κ = 0.

    Source: Temporal Difference Learning for Diffusion Models (2026), https://arxiv.org/abs/2606.15048;
    couplings between 0 and 1 and the 'clean' value are ours.

    Args:
        process: the noise schedule.
        num_steps: N, the number of noise levels, a whole number in [1, 1,000,000].
        coupling: η ∈ [0, 1], or "markov" (1), "shared" (0): how successive states share their noise.
        span: k ≥ 1, index units between successive states.
        stride: Δ > 0, index units of the step whose posterior mean is the value; may be a fraction where the
            process has continuous times.
        value: "posterior_mean", or "clean": V = E[x0 | x] itself (A = 1, κ = 0 everywhere), which is Δ = ∞.
        offset: shift of the whole grid in index units, in (-1, 1). A positive one moves the last level past
            N-1, so that it is the clean state already.
        t_max: levels with a time above this are left out; None keeps all.

    Raises:
        ValueError: an argument outside its range.
    """

    process: Schedule
    num_steps: int
    coupling: float | str
    span: int = 1
    stride: float = 1.0
    value: Literal["posterior_mean", "clean"] = "posterior_mean"
    offset: float = 0.0
    t_max: float | None = None

    def __post_init__(self) -> None:
        coupling_eta(self.coupling)
        require_int("num_steps", self.num_steps, most=MAX_STEPS)
        require_int("span", self.span, most=MAX_STEPS)
        if self.stride != math.inf:  # which is the value "clean"
            require_number("stride", self.stride, 0, ends="()")
        if self.value not in ("posterior_mean", "clean"):
            raise InputError(f"value is {self.value!r}: give 'posterior_mean' or 'clean'")
        require_number("offset", self.offset, -1, 1, "()")
        if self.t_max is not None:
            require_number("t_max", self.t_max, self.process.t_clean, ends="()")
        if len(self.t) < 2:
            given = [f"{name} = {getattr(self, name)}" for name in ("t_max", "offset") if getattr(self, name)]
            without = f" with {' and '.join(given)}" if given else ""
            raise InputError(
                f"no noise level is left of num_steps = {self.num_steps}{without}: give more levels"
            )

    @property
    def eta(self) -> float:
        """The coupling as a number."""
        return coupling_eta(self.coupling)

    @cached_property
    def indices(self) -> Tensor:
        """Real-valued grid index of each state, the clean one last: float64, shape [K+1]."""
        N, k = self.num_steps, self.span
        last = k * ((N - 1) // k)
        if last + self.offset > N - 1:
            last -= k
        i = torch.arange(0, last + k + 1, k, dtype=torch.float64) + self.offset
        i[-1] = N
        if self.t_max is not None:
            kept = self.process.time(i, N) <= self.t_max
            i = i[kept]  # clean data are never above
        return i

    @cached_property
    def t(self) -> Tensor:
        """Times of the states, the clean one last: float64, shape [K+1]."""
        return self.process.time(self.indices, self.num_steps)

    @property
    def num_transitions(self) -> int:
        """K."""
        return len(self.t) - 1

    @cached_property
    def value_coefficients(self) -> tuple[Tensor, Tensor]:
        """A_i and κ_i of each state's value, 0 at the clean one: float64, shape [K+1] each."""
        stride = float("inf") if self.value == "clean" else self.stride
        if stride == self.span:
            A, kappa, _ = self.step_coefficients
        else:
            s = self.process.time(self.indices[:-1] + stride, self.num_steps)
            A, kappa, _ = posterior(self.process, self.t[:-1], s, self.eta)
        A, kappa = pad(torch.stack([A, kappa]), (0, 1)).unbind()
        return A, kappa

    @cached_property
    def scales(self) -> tuple[Tensor, Tensor]:
        """α and σ of each state: float64, shape [K+1] each."""
        return self.process.alpha(self.t), self.process.sigma(self.t)

    @cached_property
    def noise_mixing(self) -> tuple[Tensor, Tensor]:
        """How the noise of each state is mixed, n_s = c n_t + √(1-c²) z: c and √(1-c²), float64, shape [K+1] each.

            c = κ σ_t/σ_s,    √(1-c²) = std/σ_s

        The noise of the first state is all fresh: (0, 1). The clean state has none: (0, 0).
        """
        _, kappa, std = self.step_coefficients
        sigma = self.scales[1]
        mixing = torch.stack([kappa * sigma[:-1], std]) / sigma[1:]  # not of the last step, onto clean data
        kept, fresh = pad(mixing[:, :-1], (1, 1)).unbind()
        fresh[0] = 1
        return kept, fresh

    @cached_property
    def noise_sums(self) -> tuple[Tensor, Tensor]:
        """The same mixing as running sums, n_i = P_i Σ_{j≤i} g_j z_j: P and g, float64, shape [K+1] each.

            P_i = Π_{1≤j≤i} c_j,    g_j = √(1-c_j²)/P_j

        A step that keeps no noise keeps 1e-20 of it here, which leaves no trace and can be divided by.
        """
        kept, fresh = self.noise_mixing
        P = kept.clamp(min=1e-20)
        P[0] = 1
        P = P.cumprod(0)
        return P, fresh / P

    @cached_property
    def table(self) -> Tensor:
        """Rows t, A, κ, α, σ, `noise_mixing` and `noise_sums`, one column for each state: float64, shape [9, K+1]."""
        return torch.stack(
            [self.t, *self.value_coefficients, *self.scales, *self.noise_mixing, *self.noise_sums]
        )

    def step(self, index: Tensor, x0: Tensor, x: Tensor, noise: Tensor) -> Tensor:
        """The state reached from state `index`: x_s = A x0 + κ x_t + std z of the step i → i+k.

        This is the core that every environment runs.

        Args:
            index: position along the chain, integers in [0, K-1], shape [*b].
            x0: the datum, shape [*b, *E].
            x: state left, of x0's shape.
            noise: z, of x0's shape; unused where the step is deterministic.
        """
        A, kappa, std = (expand_like(c.to(x)[index], x) for c in self.step_coefficients)
        return A * x0 + kappa * x + std * noise

    @cached_property
    def step_coefficients(self) -> Posterior:
        """A, κ and std of each transition i → i+k: float64, shape [K] each."""
        alpha, sigma = self.scales
        return posterior_of_scales(alpha[:-1], sigma[:-1], alpha[1:], sigma[1:], self.eta)
