"""One chain in plain numbers, for the Gymnasium environments of one sample on the CPU.

A step of a point in the plane is a dozen operations on two numbers. As tensors, each costs a microsecond or two, and
each look-up in a table as much again. Here tables are arrays, made once, and rows are taken from them by position.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Generator, Tensor

from diffrl import keys
from diffrl.envs.decision_process import DecisionProcess
from diffrl.envs.reward_process import RewardProcess

__all__ = ["OneDecisionChain", "OneRewardChain"]

Array = NDArray[Any]
PROBES, SMALL, LARGE = 32, 0.1, 100.0  # steps on which a law is probed, and the numbers it is probed with


class OneRewardChain:
    """A chain of `RewardProcess` that steps as that does, number for number.

        x_s = A x0 + κ x + std z,    r_i = μ_i - μ_{i+k},    μ_i = A_i x0 + κ_i x_i

    with the coefficients of the step in the first formula, of the value in the last.

    Source: Temporal Difference Learning for Diffusion Models (2026), https://arxiv.org/abs/2606.15048.

    Args:
        process: the reward process, whose tables are taken in its dtype.
    """

    index: int
    """Position in [0, K]."""
    x: Array
    """The state, shape [1, *E]."""
    x0: Array
    """The datum, shape [1, *E]."""
    cond: Array | None
    """Its label, shape [1]."""

    def __init__(self, process: RewardProcess) -> None:
        chain, dtype = process.chain, process.dtype
        self.num_transitions, self.last = chain.num_transitions, process.last
        self._steps = torch.stack(tuple(chain.step_coefficients), 1).to(dtype).numpy()
        self._t, self._A, self._kappa = (
            c.to(dtype)[:, None].numpy() for c in (chain.t, *chain.value_coefficients)
        )
        self._times_x = torch.from_numpy(self._kappa).view(-1, *[1] * len(process.event_shape))

    def take(self, index: Tensor, x: Tensor, x0: Tensor, cond: Tensor | None) -> None:
        """Be at position [1] and state [1, *E] of a chain with this datum [1, *E] and label [1]."""
        self.index, self.x, self.x0 = int(index), x.numpy(), x0.numpy()
        self.cond = None if cond is None else cond.numpy()
        self._mean = self._posterior_mean()

    def step(self, noise: Array) -> tuple[Array, bool, bool]:
        """Go one step.

        Args:
            noise: z, of x's shape.

        Returns:
            Reward [1, *E], and the flags terminated and truncated.
        """
        A, kappa, std = self._steps[self.index]
        self.x = A * self.x0 + kappa * self.x + std * noise
        self.index += 1
        before, self._mean = self._mean, self._posterior_mean()
        terminated = self.index == self.num_transitions
        return before - self._mean, terminated, self.index >= self.last and not terminated

    def seen(self) -> tuple[dict[str, Array], dict[str, Any]]:
        """Observation and info, as copies."""
        i = self.index
        observation = {keys.X_T: self.x[0].copy(), keys.T: self._t[i].copy()}
        info: dict[str, Any] = {
            keys.X0: self.x0[0].copy(),
            keys.INDEX: np.int64(i),
            keys.A: self._A[i].copy(),
            keys.KAPPA: self._kappa[i].copy(),
        }
        if self.cond is not None:
            info[keys.COND] = self.cond[0]
        return observation, info

    def _posterior_mean(self) -> Array:
        """μ_i, rounded as tensors are: torch multiplies and adds at once."""
        mean = torch.from_numpy(self._A[self.index] * self.x0)
        array: Array = mean.addcmul_(self._times_x[self.index], torch.from_numpy(self.x)).numpy()
        return array


class OneDecisionChain:
    """A chain of `DecisionProcess` that steps as that does, without dense rewards of the action "next_latent".

        x_{i+1} = c_i a                          action "next_latent"
        x_{i+1} = A c_i a + κ x_i + std z        action "x0_hat"

    where A, κ and std make the sampler's step, if its mean is linear in latent and estimate: `serves` tells.

    Source: Training Diffusion Models with Reinforcement Learning (Black et al., 2024), section 4.2,
    https://arxiv.org/abs/2305.13301.

    Args:
        process: the decision process, whose tables are taken in its dtype.
        normalise: whether latents are shown in units of b_i, and time as the share of the chain that is left.
    """

    index: int
    """Position in [0, K]."""
    x: Array
    """The latent, shape [1, *E]."""
    cond: Tensor | None
    """Its condition, shape [1, ...]."""

    def __init__(self, process: DecisionProcess, normalise: bool) -> None:
        self.process, K, dtype = process, process.num_steps, process.dtype
        units = torch.ones(K) if process.units is None else process.units
        self._units, boxes = units.to(dtype).numpy(), process.boxes.to(dtype).numpy()
        share = 1 - torch.arange(K + 1).to(dtype) / K
        self._t = (share if normalise else process.grid.to(dtype))[:, None].numpy()
        self._boxes = boxes if normalise else None
        self._law: Array | None = None
        if process.action == "x0_hat" and process.linear_law is not None:
            self._law = torch.stack(process.linear_law, 1).to(dtype).numpy()
        self._scalar = process.num_classes > 0

    @staticmethod
    def serves(process: DecisionProcess) -> bool:
        """Whether the mean of the sampler's step is linear, as far as probes of small and large numbers tell."""
        d = process
        if d.action == "next_latent":
            return True
        assert d.sampler is not None and d.linear_law is not None
        i = torch.linspace(0, d.num_steps - 1, min(PROBES, d.num_steps)).long()
        g = Generator().manual_seed(0)
        kappa, A, std = (c[i].view(-1, *[1] * len(d.event_shape)) for c in d.linear_law)
        for size in (SMALL, LARGE):
            x, D = size * torch.randn(2, len(i), *d.event_shape, generator=g, dtype=torch.float64)
            law = d.sampler.law(d.process, x, D, d.grid[i], d.grid[i + 1])
            alike = torch.isclose(law.std.expand(len(i)), std.flatten()).all()
            error, scale = (law.mean - (A * D + kappa * x)).abs(), (A * D).abs() + (kappa * x).abs()
            if not (bool(alike) and bool((error <= 1e-9 * scale).all())):
                return False
        return True

    def take(self, index: Tensor, x: Tensor, cond: Tensor | None) -> None:
        """Be at position [1] and latent [1, *E] of a chain with this condition [1, ...]."""
        self.index, self.x, self.cond = int(index), x.numpy(), cond

    def step(self, action: Array, noise: Callable[[], Tensor]) -> tuple[Any, bool, bool]:
        """Go one step.

        Args:
            action: a, of x's shape and dtype.
            noise: gives z, of x's shape; only the action "x0_hat" asks for it.

        Returns:
            Reward, and the flags terminated and truncated.
        """
        d, i = self.process, self.index
        x = chosen = self._units[i] * action
        if self._law is not None:
            kappa, A, std = self._law[i]
            x = A * chosen + kappa * self.x + std * noise().numpy()
        terminated, dense = i + 1 == d.num_steps, d.reward_placement == "dense"
        reward: Any = np.float32(0)
        if terminated or dense:
            reward = d.reward(torch.from_numpy(chosen if dense else x), self.cond).numpy()[0]
        self.index, self.x = i + 1, x
        return reward, terminated, i + 1 >= d.last and not terminated

    def seen(self) -> tuple[dict[str, Array], dict[str, Any]]:
        """Observation and info, as copies."""
        i, x = self.index, self.x[0]
        shown = x.copy() if self._boxes is None else x / self._boxes[i]
        observation = {keys.X_T: shown, keys.T: self._t[i].copy()}
        if self.cond is not None:
            cond = self.cond.numpy()
            observation[keys.COND] = cond[0] if self._scalar else cond[0, ...].copy()
        return observation, {keys.INDEX: np.int64(i)}
