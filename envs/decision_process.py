"""The Markov decision process of a denoising chain, on tensors; the TorchRL and Gymnasium environments wrap it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from numpy.typing import NDArray
from torch import Generator, Tensor

from diffrl.diffusion.laws import NoiseFn
from diffrl.diffusion.samplers.base import GaussianSampler
from diffrl.diffusion.schedules.base import Schedule
from diffrl.envs.arguments import as_conditions, as_dtype, as_shape
from diffrl.envs.drawing import boxes
from diffrl.errors import InputError, InputTypeError
from diffrl.ranges import require_int, require_number
from diffrl.rewards.calls import Reward
from diffrl.rewards.weighted_sum import as_reward
from diffrl.shapes import column, expand_like

__all__ = ["ActionKind", "ActionScale", "DecisionProcess", "Decision", "Latents", "RewardPlacement"]

ActionKind = Literal["next_latent", "x0_hat"]
ActionScale = float | Literal["level"] | None
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

        x_{i+1} = c_i a_i                                  action "next_latent"
        x_{i+1} ~ sampler's law at x_i with x̂_0 = c_i a_i    action "x0_hat"
        r_i = R(x_K, c) where x_{i+1} is clean, else 0      placement "terminal"
        r_i = R(x̂_0 of step i, c)                            placement "dense"

    The unit c_i of an action is 1, a number, or that of the level: the half-width of a box around the latents there,

        b_i = 2^⌈log₂(s α_i + 4 σ_i)⌉,    c_i = b_{i+1} for the next latent, s for x̂_0

    with s the largest number of clean data; a power of two does not round. The process holds no state: latents,
    conditions and noise are arguments.

    Source: Training Diffusion Models with Reinforcement Learning (Black et al., 2024), section 4.2,
    https://arxiv.org/abs/2305.13301; dense: Aligning Few-Step Diffusion Models with Dense Reward Difference
    Learning (Zhang et al., 2024), https://arxiv.org/abs/2411.11727.

    Args:
        process: noise schedule.
        reward: R, called in batches without gradients. A plain function is wrapped in a `BlackBox`, which refuses NaN
            and wrong shapes and counts queries. It remembers no rewards: no two samples of a chain are equal.
        event_shape: *E of a latent.
        num_steps: K = N ≥ 1, the steps of a chain.
        sampler: gives the grid, and the law of the next latent for the action "x0_hat"; None: the process's grid.
        action: "next_latent" or "x0_hat".
        reward_placement: "terminal" or "dense".
        conditions: the M conditions that c is drawn from, [M, ...]; None: no condition.
        max_steps: cut chains at this position, > 0; None lets them run to clean data.
        action_scale: c_i: a number > 0, "level", or None for 1.
        data_scale: s > 0.
        dtype: of latents, float32 or float64; rewards are float32.

    Raises:
        TypeError: process is no schedule, or the sampler's step is not one Gaussian.
        ValueError: an argument is outside its range, the action "x0_hat" without a sampler, or a sampler that does
            not work on the process.
    """

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
        conditions: Tensor | NDArray[Any] | None,
        max_steps: int | None,
        action_scale: ActionScale,
        data_scale: float,
        dtype: torch.dtype,
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
        num_steps = require_int("num_steps", num_steps)
        cut = num_steps if max_steps is None else require_int("max_steps", max_steps)
        self.process, self.reward, self.sampler = process, as_reward(reward, cache=False), sampler
        self.event_shape, self.num_steps = as_shape("event_shape", event_shape, least_dims=1), num_steps
        self.action, self.reward_placement = action, reward_placement
        self.conditions, self.dtype = as_conditions(conditions), as_dtype(dtype)
        self.grid = process.time_grid(num_steps) if sampler is None else sampler.grid(process, num_steps)
        """Times of the latents, the clean one last: float64, shape [K+1]."""
        self.last = min(num_steps, cut)
        """Position at which a chain ends."""
        s, alpha, sigma = require_number("data_scale", data_scale, 0, ends="()"), process.alpha, process.sigma
        self.boxes = boxes(alpha(self.grid), sigma(self.grid), s)
        """b_i, the half-width of a box around the latents of each level: float64, shape [K+1]."""
        self.units = self._units(action_scale, s)
        """c_i, the unit of the action of each step: float64, shape [K]; None: 1."""
        self.linear_law = None if sampler is None else _linear_law(sampler, process, self.grid)
        """How the mean of the sampler's step depends on latent and on estimate, and its std: float64, [K] each."""

    def _units(self, action_scale: ActionScale, s: float) -> Tensor | None:
        if action_scale is None:
            return None
        if isinstance(action_scale, str) and action_scale != "level":
            raise InputError(f"action_scale is {action_scale!r}: give a number > 0, 'level' or None")
        if action_scale == "level":
            return self.boxes[1:] if self.action == "next_latent" else torch.full_like(self.grid[1:], s)
        return torch.full_like(self.grid[1:], require_number("action_scale", action_scale, 0, ends="()"))

    @property
    def num_classes(self) -> int:
        """C if the conditions are labels 0..C-1; 0 for other conditions, or none."""
        c = self.conditions
        if c is None or c.ndim != 1 or c.is_floating_point() or int(c.min()) < 0:
            return 0
        return int(c.max()) + 1

    def bounds(self) -> Tensor:
        """Bounds on the numbers of the latents of each level for actions within ±1: float64, shape [K+1]."""
        first = LARGEST_NOISE * self.process.sigma(self.grid[:1])
        units = torch.ones_like(self.grid[1:]) if self.units is None else self.units
        if self.action == "next_latent":
            return torch.cat([first, units])
        assert self.linear_law is not None
        bounds = [first[0]]
        for on_x, on_D, std, unit in zip(*self.linear_law, units, strict=True):
            bounds.append(on_x.abs() * bounds[-1] + on_D.abs() * unit + LARGEST_NOISE * std)
        return torch.stack(bounds)

    def in_units(self, action: Tensor, index: Tensor, *, inverse: bool = False) -> Tensor:
        """Actions [*b, *E] at positions [*b] as the latents or estimates that they mean; `inverse`: the way back."""
        if self.units is None:
            return action
        c = self.units.to(action)[index.clamp(max=self.num_steps - 1)]
        c = expand_like(c, action)
        return action / c if inverse else action * c

    def draw_conditions(self, n: int, generator: Generator | None) -> Tensor | None:
        """Draw n conditions [n, ...] uniformly, with a generator of the CPU; None if there are none."""
        if self.conditions is None:
            return None
        rows = torch.randint(len(self.conditions), (n,), generator=generator)
        return self.conditions[rows.to(self.conditions.device)]

    def given_condition(self, cond: Tensor, batch: Sequence[int]) -> Tensor:
        """Check conditions that the caller gives instead of drawing them, and return them, [*batch, ...].

        Raises:
            ValueError: the process has none, or they are of another kind.
        """
        c = self.conditions
        if c is None:
            raise InputError("there is a 'cond', but the environment has no conditions")
        if cond.shape != (*batch, *c.shape[1:]) or cond.is_floating_point() != c.is_floating_point():
            raise InputError(
                f"cond is {cond.dtype} {tuple(cond.shape)}: give {c.dtype} {(*batch, *c.shape[1:])}, like the "
                "conditions drawn from"
            )
        if self.num_classes and bool(((cond < 0) | (cond >= self.num_classes)).any()):
            raise InputError(f"cond is outside the labels 0..{self.num_classes - 1} of the conditions")
        return cond.to(c.dtype)

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
            action: the agent's, shape [*b, *E], in units of c_i.
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
        chosen = self.in_units(action.to(latents.x), left)
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
        if self.sampler is None:
            raise InputError("sampler is None: give one such as diffrl.Ancestral() to draw the next latent")
        E, x = self.event_shape, latents.x
        i = latents.index.reshape(-1).cpu().clamp(max=self.num_steps - 1)
        flat, D_x = x.reshape(-1, *E), x0_hat.reshape(-1, *E)
        mean, std = self.sampler.law(self.process, flat, D_x, self.grid[i], self.grid[i + 1])
        return mean.view(x.shape) + (column(std, mean) * noise(x).view(mean.shape)).view(x.shape)

    def _rewards(self, x0: Tensor, cond: Tensor | None, paid: Tensor) -> Tensor:
        """R of the rows in `paid`, 0 for the others, float32 [N]."""
        rewards = torch.zeros(len(x0), device=x0.device)
        if bool(paid.any()):
            c = None if cond is None else cond[paid]
            rewards[paid] = self.reward(x0[paid], c).to(rewards)
        return rewards


def _linear_law(sampler: GaussianSampler, process: Schedule, grid: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """How the mean of each step depends on latent and estimate, and its std: float64, shape [K] each.

    Raises:
        ValueError: the sampler does not work on the process.
    """
    one, zero = torch.ones(len(grid) - 1, 1, dtype=torch.float64), torch.zeros(len(grid) - 1, 1).double()
    on_x, std = sampler.law(process, one, zero, grid[:-1], grid[1:])
    on_D = sampler.law(process, zero, one, grid[:-1], grid[1:]).mean
    law = on_x[:, 0], on_D[:, 0], std.reshape(-1).expand(len(one))
    if not all(bool(part.isfinite().all()) for part in law):
        raise InputError(f"{sampler!r} gives NaN or infinity on {process!r}: choose another sampler")
    return law
