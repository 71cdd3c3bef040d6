"""The Markov reward process of a denoising chain, on tensors; the TorchRL and Gymnasium environments wrap it."""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from numpy.typing import NDArray
from torch import Generator, Tensor

from diffrl.data.dataset import Data
from diffrl.diffusion.chains import Chain
from diffrl.diffusion.schedules.base import Schedule
from diffrl.envs.arguments import as_data, as_dtype, require_states
from diffrl.errors import InputError, InputTypeError
from diffrl.ranges import require_int
from diffrl.shapes import expand_like

__all__ = ["RewardProcess", "States", "Transition"]


@dataclass
class States:
    """The present states of a batch of chains, with the coefficients of their values A E[x0 | x] + κ x."""

    index: Tensor
    """Position, int64, shape [*b]."""
    x: Tensor
    """State, shape [*b, *E]."""
    t: Tensor
    """Diffusion time, shape [*b]."""
    A: Tensor
    """Shape [*b]."""
    kappa: Tensor
    """κ, shape [*b]."""

    def posterior_mean(self, x0: Tensor) -> Tensor:
        """μ = A x0 + κ x, shape [*b, *E]."""
        return (expand_like(self.A, self.x) * x0).addcmul(expand_like(self.kappa, self.x), self.x)


class Transition(NamedTuple):
    """The outcome of one step."""

    states: States
    reward: Tensor
    """μ_i - μ_{i+k}, shape [*b, *E]."""
    terminated: Tensor
    """Clean data reached, bool, shape [*b]."""
    truncated: Tensor
    """Cut before clean data, bool, shape [*b]."""


class RewardProcess:
    """Chains from noise to data: every step pays how far the posterior mean moved, the last step pays the rest.

        r_i = μ_i - μ_{i+k},    μ_i = A_i x0 + κ_i x_i,    μ = 0 at clean data

    so that the rewards of a whole chain sum to μ_0. It holds no state: data and states are arguments.

    Source: Temporal Difference Learning for Diffusion Models (2026), https://arxiv.org/abs/2606.15048.

    Args:
        process: noise schedule.
        data: a data set, or points of a floating dtype, a tensor or array [M, *E], drawn uniformly with replacement.
        num_steps, coupling, span, stride, value: of `diffrl.diffusion.chains.Chain`.
        max_steps: cut chains at this position, > 0; None lets them run to clean data.
        dtype: of states and rewards, float32 or float64; None: that of the data.

    Raises:
        TypeError: process is no schedule, or data holds integers or is something else.
        ValueError: an argument is outside its range.
        DataError: data holds NaN or infinity.
    """

    def __init__(
        self,
        process: Schedule,
        data: Data | Tensor | NDArray[Any],
        *,
        num_steps: int,
        coupling: float | str,
        span: int,
        stride: float,
        value: Literal["posterior_mean", "clean"],
        max_steps: int | None,
        dtype: torch.dtype | str | None = None,
    ) -> None:
        if not isinstance(process, Schedule):
            raise InputTypeError(f"process is {process!r}: give a schedule such as diffrl.EDM()")
        data = as_data(data)
        points = data if isinstance(data, Tensor) else data.test
        num_steps = require_int("num_steps", num_steps)
        cut = num_steps if max_steps is None else require_int("max_steps", max_steps)
        self.chain = Chain(process, num_steps, coupling, span, stride, value)
        self.data = data
        self.event_shape, self.dtype = points.shape[1:], points.dtype if dtype is None else as_dtype(dtype)
        self.num_classes = data.num_classes if isinstance(data, Data) else 0
        self.last = min(self.chain.num_transitions, cut)
        """Position at which a chain ends."""
        self._tables: dict[tuple[torch.dtype, torch.device], Tensor] = {}

    def draw(self, n: int, generator: Generator | None) -> tuple[Tensor, Tensor | None]:
        """Draw the data of n chains with a generator of the CPU: x0 [n, *E], and labels [n] or None."""
        if isinstance(self.data, Data):
            x0, labels = self.data.batch(n, generator)
            return x0.to(self.dtype), labels
        rows = torch.randint(len(self.data), (n,), generator=generator)
        return self.data[rows.to(self.data.device)].to(self.dtype), None

    def start(self, index: Tensor, x0: Tensor, noise: Tensor) -> States:
        """The states x = α x0 + σ ε at given positions.

        Args:
            index: position in [0, K], int64, shape [*b].
            x0: the datum, shape [*b, *E].
            noise: ε, of x0's shape.
        """
        _, _, _, alpha, sigma = (expand_like(c, x0) for c in self._look_up(index, x0))
        return self.states(index, alpha * x0 + sigma * noise)

    def states(self, index: Tensor, x: Tensor) -> States:
        """The states x [*b, *E] at positions [*b]."""
        t, A, kappa, _, _ = self._look_up(index, x)
        return States(index, x, t, A, kappa)

    def step(self, states: States, x0: Tensor, noise: Tensor) -> Transition:
        """One transition of each chain; a clean state stays as it is, at reward 0.

        Args:
            states: the present ones.
            x0: the datum, shape [*b, *E].
            noise: standard normal numbers of x0's shape; deterministic steps, such as the last, ignore them.
        """
        K = self.chain.num_transitions
        x_s = self.chain.step(states.index.clamp(max=K - 1), x0, states.x, noise)
        reached = self.states((states.index + 1).clamp(max=K), x_s)
        reward = states.posterior_mean(x0) - reached.posterior_mean(x0)
        terminated = reached.index == K
        return Transition(reached, reward, terminated, (reached.index >= self.last) & ~terminated)

    def given(self, x0: Tensor, cond: Tensor | None, batch: tuple[int, ...]) -> tuple[Tensor, Tensor | None]:
        """Check data that the caller gives instead of drawing them: x0 [*batch, *E] and its labels [*batch].

        Raises:
            TypeError: x0 holds integers.
            ValueError: shapes or labels do not fit.
            DataError: x0 holds NaN or infinity.
        """
        require_states("x0", x0, batch, self.event_shape)
        if (cond is None) != (self.num_classes == 0):
            raise InputError(
                f"the data have {self.num_classes} classes: "
                + ("give cond beside x0" if cond is None else "leave cond out")
            )
        if cond is not None and not (
            cond.shape == batch and bool(((cond >= 0) & (cond < self.num_classes)).all())
        ):
            raise InputError(f"cond: give labels of shape {tuple(batch)} in 0..{self.num_classes - 1}")
        return x0.to(self.dtype), None if cond is None else cond.long()

    def _look_up(self, index: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        """t, A, κ, α and σ at positions [*b], each [*b]."""
        place = (x.dtype, x.device)
        if place not in self._tables:
            columns = [self.chain.t, *self.chain.value_coefficients, *self.chain.scales]
            self._tables[place] = torch.stack(columns).to(x)
        return self._tables[place][:, index].unbind(0)
