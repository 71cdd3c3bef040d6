"""The Markov decision process of a denoising chain, on tensors; the TorchRL and Gymnasium environments wrap it."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Generator, Tensor

from diffrl.diffusion.laws import NoiseFn
from diffrl.diffusion.samplers.base import GaussianSampler
from diffrl.diffusion.schedules.base import Schedule
from diffrl.errors import InputError, InputTypeError
from diffrl.rewards.calls import Reward
from diffrl.rewards.weighted_sum import as_reward
from diffrl.shapes import column

__all__ = ["ActionKind", "DecisionProcess", "Decision", "Latents", "RewardPlacement"]

ActionKind = Literal["next_latent", "x0_hat"]
RewardPlacement = Literal["terminal", "dense"]
LARGEST_NOISE = 9.0  # torch's standard normal numbers are smaller: √(2·53 ln 2) = 8.6


@dataclass
class Latents:
    """The present latents of a batch of chains."""

    index: Tensor
    """Position, int64, shape [*b]; K is clean data."""
    x: Tensor
    """The latent, shape [*b, *E]."""
    t: Tensor
    """Diffusion time, shape [*b]."""


class Decision(NamedTuple):
    """The outcome of one step."""

    latents: Latents
    reward: Tensor
    """Shape [*b]."""
    terminated: Tensor
    """Clean data reached, bool, shape [*b]."""
    truncated: Tensor
    """Cut before clean data, bool, shape [*b]."""


class DecisionProcess:
    """Chains from noise to data: an agent chooses each next latent, and is rewarded for the clean sample.

        x_{i+1} = a_i                            action "next_latent"
        x_{i+1} ~ sampler's law at x_i with x̂_0 = a_i    action "x0_hat"
        r_i = R(x_K, c) where x_{i+1} is clean, else 0      placement "terminal"
        r_i = R(x̂_0 of step i, c)                            placement "dense"

    It holds no state: latents, conditions and noise are arguments.

    Source: Training Diffusion Models with Reinforcement Learning (Black et al., 2024), section 4.2,
    https://arxiv.org/abs/2305.13301; dense: Aligning Few-Step Diffusion Models with Dense Reward Difference
    Learning (Zhang et al., 2024), https://arxiv.org/abs/2411.11727.

    Args:
        process: noise schedule.
        reward: R, called in batches without gradients. A plain function is wrapped in a `BlackBox`, which refuses NaN
            and wrong shapes, counts queries and remembers rewards.
        event_shape: *E of a latent.
        num_steps: K = N ≥ 1, the steps of a chain.
        sampler: gives the grid, and the law of the next latent for the action "x0_hat"; None: the process's grid.
        action: "next_latent" or "x0_hat".
        reward_placement: "terminal" or "dense".
        conditions: the M conditions that c is drawn from, [M, ...]; None: no condition.
        max_steps: cut chains at this position, > 0; None lets them run to clean data.

    Raises:
        TypeError: process is no schedule, or the sampler's step is not one Gaussian.
        ValueError: an argument is outside its range, or the action "x0_hat" without a sampler.
    """

    dtype = torch.float32  # of latents and rewards

    def __init__(
        self,
        process: Schedule,
        reward: Reward,
        *,
        event_shape: Sequence[int],
        num_steps: int,
        sampler: GaussianSampler | None,
        action: ActionKind,
        reward_placement: RewardPlacement,
        conditions: Tensor | None,
        max_steps: int | None,
    ) -> None:
        if not isinstance(process, Schedule):
            raise InputTypeError(f"process is {process!r}: give a schedule such as diffrl.Flow()")
        if action not in ("next_latent", "x0_hat"):
            raise InputError(f"action is {action!r}: give 'next_latent' or 'x0_hat'")
        if reward_placement not in ("terminal", "dense"):
            raise InputError(f"reward_placement is {reward_placement!r}: give 'terminal' or 'dense'")
        if sampler is not None and not isinstance(sampler, GaussianSampler):
            raise InputTypeError(
                f"{sampler!r} has steps without a law: give a sampler such as diffrl.Ancestral()"
            )
        if action == "x0_hat" and sampler is None:
            raise InputError(
                "action 'x0_hat' needs a sampler that makes the next latent of it: give sampler=diffrl.Ancestral()"
            )
        if max_steps is not None and max_steps < 1:
            raise InputError(f"max_steps is {max_steps}: a chain makes at least one step; None for no cut")
        if conditions is not None and (conditions.ndim == 0 or len(conditions) == 0):
            raise InputError(f"conditions have shape {tuple(conditions.shape)}: give [M, ...], one a row")
        self.process, self.reward, self.sampler = process, as_reward(reward), sampler
        self.event_shape, self.num_steps = torch.Size(event_shape), num_steps
        self.action, self.reward_placement, self.conditions = action, reward_placement, conditions
        self.grid = process.time_grid(num_steps) if sampler is None else sampler.grid(process, num_steps)
        """Times of the latents, the clean one last: float64, shape [K+1]."""
        self.last = min(num_steps, max_steps or num_steps)
        """Position at which a chain ends."""

    @property
    def num_classes(self) -> int:
        """C if the conditions are labels 0..C-1; 0 for other conditions, or none."""
        c = self.conditions
        if c is None or c.ndim != 1 or c.is_floating_point() or int(c.min()) < 0:
            return 0
        return int(c.max()) + 1

    def largest_latent(self, largest_action: float) -> float:
        """A bound on the numbers of a latent, if the numbers of actions lie within ± `largest_action`."""
        largest = bound = LARGEST_NOISE * float(self.process.sigma(self.grid[0]))
        if self.action == "next_latent":
            return max(largest, largest_action)
        assert self.sampler is not None
        unit, zero = torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)
        for t, s in itertools.pairwise(self.grid):  # the mean is linear in latent and estimate
            on_x, std = self.sampler.law(self.process, unit, zero, t, s)
            on_D = self.sampler.law(self.process, zero, unit, t, s).mean
            bound = abs(float(on_x)) * bound + abs(float(on_D)) * largest_action + LARGEST_NOISE * float(std)
            largest = max(largest, bound)
        return largest

    def draw_conditions(self, n: int, generator: Generator | None) -> Tensor | None:
        """Draw n conditions [n, ...] uniformly, with a generator of the CPU; None if there are none."""
        if self.conditions is None:
            return None
        rows = torch.randint(len(self.conditions), (n,), generator=generator)
        return self.conditions[rows.to(self.conditions.device)]

    def start(self, noise: Tensor) -> Latents:
        """The noisiest latents σ_0 ε, for standard normal numbers ε [*b, *E]."""
        b = noise.shape[: noise.ndim - len(self.event_shape)]
        x = self.process.sigma(self.grid[0]) * noise
        return self.latents(torch.zeros(b, dtype=torch.int64, device=noise.device), x)

    def latents(self, index: Tensor, x: Tensor) -> Latents:
        """The latents x [*b, *E] at positions [*b]."""
        return Latents(index, x, self.grid.to(x)[index])

    def step(
        self,
        latents: Latents,
        action: Tensor,
        *,
        cond: Tensor | None,
        x0_hat: Tensor | None,
        noise: NoiseFn,
    ) -> Decision:
        """One transition of each chain; a clean latent stays as it is, at reward 0.

        Args:
            latents: the present ones.
            action: the agent's, shape [*b, *E].
            cond: c of each chain, shape [*b, ...], or None.
            x0_hat: the clean estimates that the actions were made from, shape [*b, *E]. Only a dense reward of the
                action "next_latent" uses them.
            noise: gives standard normal numbers of a tensor's shape; only the action "x0_hat" uses it.

        Raises:
            ValueError: dense rewards without x0_hat.
        """
        K, E = self.num_steps, self.event_shape
        left = latents.index
        running = left < K
        chosen = action.to(latents.x)
        reached = chosen if self.action == "next_latent" else self.denoise(latents, chosen, noise)
        x = torch.where(running.view(*left.shape, *[1] * len(E)), reached, latents.x)
        after = self.latents((left + 1).clamp(max=K), x)
        terminated = after.index == K
        if self.reward_placement == "terminal":
            scored, paid = x, running & terminated
        else:
            estimate = chosen if self.action == "x0_hat" else x0_hat
            if estimate is None:
                raise InputError(
                    "dense rewards are of x0_hat, which the step lacks: let a DenoisingPolicy act"
                )
            scored, paid = estimate, running
        flat = None if cond is None else cond.reshape(-1, *cond.shape[left.ndim :])
        reward = self._rewards(scored.reshape(-1, *E), flat, paid.reshape(-1)).view(left.shape)
        return Decision(after, reward, terminated, (after.index >= self.last) & ~terminated)

    def denoise(self, latents: Latents, x0_hat: Tensor, noise: NoiseFn) -> Tensor:
        """Draw next latents [*b, *E] by the sampler, for clean estimates [*b, *E].

        Deterministic steps take noise too, so that the numbers of one chain do not depend on the positions of the
        others.
        """
        assert self.sampler is not None
        E, x = self.event_shape, latents.x
        i = latents.index.reshape(-1).cpu().clamp(max=self.num_steps - 1)
        flat, D_x = x.reshape(-1, *E), x0_hat.reshape(-1, *E)
        mean, std = self.sampler.law(self.process, flat, D_x, self.grid[i], self.grid[i + 1])
        return mean.view(x.shape) + (column(std, mean) * noise(x).view(mean.shape)).view(x.shape)

    def _rewards(self, x0: Tensor, cond: Tensor | None, paid: Tensor) -> Tensor:
        """R of the rows in `paid`, 0 for the others, float32 [N]."""
        rewards = torch.zeros(len(x0), dtype=self.dtype, device=x0.device)
        if bool(paid.any()):
            c = None if cond is None else cond[paid]
            rewards[paid] = self.reward(x0[paid], c).to(rewards)
        return rewards
