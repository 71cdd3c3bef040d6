"""The denoising chain as Gymnasium environments in which the agent denoises, single and vector."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from numpy.typing import NDArray
from torch import Tensor

from diffrl import keys
from diffrl.data.dataset import Data
from diffrl.data.image_files import check_finite
from diffrl.data.registry import DATASETS
from diffrl.diffusion.denoisers import DenoiserFn
from diffrl.diffusion.exact import EmpiricalDenoiser, MixtureDenoiser
from diffrl.diffusion.laws import NoiseFn
from diffrl.diffusion.samplers.base import GaussianSampler
from diffrl.diffusion.samplers.registry import SAMPLERS, samplers_with_law
from diffrl.diffusion.schedules.base import Schedule
from diffrl.diffusion.schedules.registry import PROCESSES
from diffrl.envs.decision_process import ActionKind, DecisionProcess, RewardPlacement
from diffrl.envs.gymnasium_common import (
    Array,
    Chains,
    Info,
    Observation,
    SingleChainEnv,
    VectorChainEnv,
    copied,
    named,
)
from diffrl.errors import InputError
from diffrl.rewards.calls import Reward
from diffrl.rewards.registry import REWARDS
from diffrl.shapes import require_floating

__all__ = ["DiffusionMDPEnv", "DiffusionMDPVectorEnv"]


class DiffusionMDPEnv(SingleChainEnv[Array]):
    """One denoising chain: the agent chooses each next latent, and is paid for the clean sample it ends at.

        x_0 ~ N(0, σ² I) at the noisiest level;    x_{i+1} = c a_i;    r = R(x_K) on reaching clean data, else 0

    The agent sees `Dict(x_t, t)`, and `cond` if there are conditions. Actions are arrays of the event's shape, in
    units of `action_scale`, c: their space is [-1, 1], but numbers outside are not clipped. With action "x0_hat" the
    agent gives the clean estimate, and the environment draws the next latent from the sampler's law.
    `info` holds the position `index`.

    The environment has a pretrained denoiser, by default the exact one of the data: `pretrained_action()` is the action
    of its sampler at the present latent. An agent that always takes it draws the sampler's samples.

    `reset(options={"x_t": array, "index": 3})` starts at this latent and position (default 0); "cond" sets the
    condition.

    >>> import diffrl, gymnasium
    >>> env = gymnasium.make("DiffusionMDP-v0", num_steps=5, action="x0_hat")
    >>> observation, info = env.reset(seed=0)
    >>> for _ in range(5):
    ...     observation, reward, terminated, truncated, info = env.step(env.unwrapped.pretrained_action())
    >>> terminated, round(reward, 1)
    (True, -0.5)

    Source: Training Diffusion Models with Reinforcement Learning (Black et al., 2024), section 4.2,
    https://arxiv.org/abs/2305.13301.

    Args:
        process: name in `diffrl.diffusion.schedules.PROCESSES` ("flow", "edm", "ddpm", "vp"), or a schedule.
        data: name in `diffrl.data.DATASETS` ("rings", "gmm", "digits", …), or a data set: it gives the shape of
            latents and the default denoiser.
        num_steps: K = N ≥ 1, the noise levels and the steps of a chain.
        action: "next_latent", or "x0_hat".
        reward: name in `diffrl.rewards.REWARDS`, or any callable (x0 [N, *E], cond) → N numbers. Without
            reward_kwargs "mode_distance" is to the first mode of the data.
        reward_placement: "terminal", or with action "x0_hat" also "dense": each step pays R of the clean estimate.
        sampler: name in `diffrl.diffusion.samplers.samplers_with_law()`, or a sampler whose step is a Gaussian.
        denoiser: the pretrained one; None: the exact one of the data, where that is known.
        conditions: labels [M], or other arrays [M, ...], that each chain's condition is drawn from; or None.
        action_scale: c > 0; None: 4 σ of the noisiest level for the next latent, 1 for the clean estimate. A power
            of two does not round.
        max_steps: cut the chain at this position: truncated; None lets it run to clean data.
        process_kwargs: arguments of the process named, e.g. {"shift": 3.0}.
        data_kwargs: arguments of the data set named, e.g. {"modes": 5}.
        reward_kwargs: arguments of the reward named.
        sampler_kwargs: arguments of the sampler named, e.g. {"eta": 0.5} of "ddim".
        noise: standard normal numbers for a tensor of the wanted shape [n, *E], n = 1 here: called at each reset,
            at each step with action "x0_hat", and by `pretrained_action`; None draws from the environment's own
            generator.

    Raises:
        TypeError: a keyword that is not known here, or not to what is named.
        ValueError: an argument is outside its range.
    """

    options = ("x_t", "index", "cond")
    _chains: "_Chains"

    def __init__(
        self,
        *,
        process: str | Schedule = "flow",
        data: str | Data = "rings",
        num_steps: int = 10,
        action: ActionKind = "next_latent",
        reward: str | Reward = "mode_distance",
        reward_placement: RewardPlacement = "terminal",
        sampler: str | GaussianSampler = "ancestral",
        denoiser: DenoiserFn | None = None,
        conditions: Tensor | None = None,
        action_scale: float | None = None,
        max_steps: int | None = None,
        process_kwargs: Mapping[str, Any] | None = None,
        data_kwargs: Mapping[str, Any] | None = None,
        reward_kwargs: Mapping[str, Any] | None = None,
        sampler_kwargs: Mapping[str, Any] | None = None,
        noise: NoiseFn | None = None,
    ) -> None:
        law: Data = named("data", DATASETS, data, data_kwargs)
        schedule: Schedule = named("process", PROCESSES, process, process_kwargs)
        if reward == "mode_distance" and reward_kwargs is None and law.mixture is not None:
            reward_kwargs = {"index": 0, "mixture": law.mixture}
        if reward_placement == "dense" and action == "next_latent":
            raise InputError("dense rewards are of clean estimates, which only action 'x0_hat' brings")
        lawful = {name: SAMPLERS[name] for name in samplers_with_law()}
        self.decision_process = DecisionProcess(
            schedule,
            named("reward", REWARDS, reward, reward_kwargs),
            event_shape=law.event_shape,
            num_steps=num_steps,
            sampler=named("sampler", lawful, sampler, sampler_kwargs),
            action=action,
            reward_placement=reward_placement,
            conditions=conditions,
            max_steps=max_steps,
        )
        d = self.decision_process
        sigma = float(schedule.sigma(d.grid[0]))
        if action_scale is None:
            action_scale = 4 * sigma if action == "next_latent" else 1.0
        if not action_scale > 0:
            raise InputError(f"action_scale is {action_scale}: give the number > 0 that an action of 1 means")
        self.action_scale, self.noise = action_scale, noise
        self.denoiser = _exact(law, schedule) if denoiser is None else denoiser
        self._chains = _Chains(d, 1, noise, action_scale, self.denoiser)
        self.observation_space = _observation_space(d, d.largest_latent(action_scale))  # type: ignore[assignment]
        self.action_space = spaces.Box(-1, 1, d.event_shape, np.float32)

    def pretrained_action(self) -> Array:
        """The action of the pretrained sampler at the present latent, drawn anew at each call.

        Raises:
            ValueError: no denoiser is known.
        """
        return self._chains.pretrained_action()[0]

    def step(self, action: Array) -> tuple[Observation, float, bool, bool, Info]:
        """Go to the next latent.

        Args:
            action: of the event's shape, in units of `action_scale`.

        Raises:
            ValueError: an action of another shape, or one with NaN or infinity.
            ResetNeeded: the chain has ended.
        """
        observation, reward, terminated, truncated, info = self._stepped(
            self._chains.step(np.asarray(action)[None])
        )
        return observation, float(reward), terminated, truncated, info


class DiffusionMDPVectorEnv(VectorChainEnv):
    """Many denoising chains at once; everything has a leading dim of `num_envs`, infos too.

    A chain that has ended waits for ``reset(options={"reset_mask": mask})``, mask a bool array [num_envs]:
    autoreset is DISABLED, which is what TorchRL reads without losing terminal observations.

    A seed given as a number makes one stream for all chains. A list of seeds, one for each, gives every chain
    a stream of its own, and so the numbers of a `DiffusionMDPEnv` with that seed; it is slower.

    Args:
        num_envs: the number of chains.
        max_episode_steps: `gymnasium.make_vec`'s name for max_steps.
        variant: keywords of `DiffusionMDPEnv`.

    Raises:
        TypeError: an unknown keyword.
        ValueError: an argument is outside its range.
    """

    _chains: "_Chains"

    def __init__(self, num_envs: int = 1, *, max_episode_steps: int | None = None, **variant: Any) -> None:
        single = self._adopt(DiffusionMDPEnv, num_envs, max_episode_steps, variant)
        self.decision_process, self.denoiser = single.decision_process, single.denoiser
        self.action_scale = single.action_scale
        self._chains = _Chains(
            self.decision_process, num_envs, single.noise, self.action_scale, self.denoiser
        )

    def pretrained_action(self) -> Array:
        """The actions of the pretrained sampler at the present latents, [num_envs, *E]; see `DiffusionMDPEnv`."""
        return self._chains.pretrained_action()

    def step(self, actions: Array) -> tuple[Observation, Array, Array, Array, Info]:
        """One step of every chain; actions [num_envs, *E] as in `DiffusionMDPEnv`.

        Raises:
            ValueError: actions of another shape, or with NaN or infinity.
            ResetNeeded: a chain has ended.
        """
        return self._chains.step(np.asarray(actions))


class _Chains(Chains):
    """Chains of one decision process."""

    def __init__(
        self,
        decision_process: DecisionProcess,
        n: int,
        noise: NoiseFn | None,
        scale: float,
        denoiser: DenoiserFn | None,
    ) -> None:
        super().__init__(n, noise)
        self.decision_process = d = decision_process
        self.scale, self.denoiser = scale, denoiser
        start = torch.zeros(n, *d.event_shape)
        self.latents = d.latents(torch.zeros_like(self.rows), start)
        self.cond = None if d.conditions is None else d.conditions[torch.zeros_like(self.rows)]

    def reset(self, mask: NDArray[np.bool_], given: Mapping[str, Array]) -> None:
        x_t, index, cond = (given.get(name) for name in DiffusionMDPEnv.options)
        d, rows = self.decision_process, self.rows[torch.from_numpy(mask)]
        if len(rows) == 0:
            return
        if self.cond is not None:
            label = self._draw(rows) if cond is None else self._given_condition(cond)[rows]
            self.cond = self.cond.index_copy(0, rows, label)
        elif cond is not None:
            raise InputError("options has a 'cond', but the environment has no conditions")
        if x_t is None and index is not None:
            raise InputError("options has an 'index', but no 'x_t' for that position")
        at = self._given_index(index)[rows]
        if x_t is None:
            x = d.start(self.streams.noise(self.latents.x[rows], rows)).x
        else:
            x = self._checked(x_t, "x_t")[rows]
        index_now = self.latents.index.index_copy(0, rows, at)
        self.latents = d.latents(index_now, self.latents.x.index_copy(0, rows, x))
        self.over[mask] = False

    def step(self, action: Array) -> tuple[Observation, Array, Array, Array, Info]:
        chosen = self.scale * self._checked(action, "action")
        self.require_running()
        self.latents, reward, terminated, truncated = self.decision_process.step(
            self.latents,
            chosen,
            cond=self.cond,
            x0_hat=None,
            noise=self._noise,
        )
        self.over = (terminated | truncated).numpy()
        observation, info = self.seen()
        return observation, reward.numpy(), terminated.numpy(), truncated.numpy(), info

    @torch.no_grad()
    def pretrained_action(self) -> Array:
        self.require_running()
        d, here = self.decision_process, self.latents
        if self.denoiser is None:
            raise InputError("the exact denoiser of these data is not known: give denoiser=")
        D_x = self.denoiser(here.x, here.t, self.cond)
        if d.action == "next_latent":
            return copied(d.denoise(here, D_x, self._noise) / self.scale)
        return copied(D_x / self.scale)

    def seen(self) -> tuple[Observation, Info]:
        observation = {keys.X_T: copied(self.latents.x), keys.T: copied(self.latents.t)[:, None]}
        if self.cond is not None:
            observation[keys.COND] = copied(self.cond)
        return observation, {keys.INDEX: copied(self.latents.index)}

    def _noise(self, x: Tensor) -> Tensor:
        return self.streams.noise(x, self.rows)

    def _checked(self, given: Array, what: str) -> Tensor:
        x, shape = torch.tensor(given), self.latents.x.shape
        require_floating([(what, x)])
        if x.shape != shape:
            raise InputError(f"{what} has shape {tuple(x.shape[1:])}, but {tuple(shape[1:])} is needed")
        check_finite(x, what)
        return x.to(self.latents.x)

    def _given_index(self, index: Array | None) -> Tensor:
        at, last = (
            torch.zeros_like(self.rows) if index is None else torch.tensor(index),
            self.decision_process.last,
        )
        if at.shape != self.rows.shape or at.is_floating_point() or bool(((at < 0) | (at >= last)).any()):
            raise InputError(f"index is {at.tolist()}: give whole numbers in [0, {last - 1}], one a chain")
        return at

    def _given_condition(self, cond: Array) -> Tensor:
        assert self.cond is not None
        c = torch.tensor(cond)
        if c.shape != self.cond.shape or c.is_floating_point() != self.cond.is_floating_point():
            raise InputError(
                f"cond is {c.dtype} {tuple(c.shape)}: give {self.cond.dtype} {tuple(self.cond.shape)}"
            )
        return c.to(self.cond)

    def _draw(self, rows: Tensor) -> Tensor:
        d, generators = self.decision_process, self.streams.generators
        parts = [(len(rows), generators[0])]
        if not self.streams.shared:
            parts = [(1, generators[row]) for row in rows.tolist()]
        drawn = [d.draw_conditions(n, g) for n, g in parts]
        return torch.cat([c for c in drawn if c is not None])


def _observation_space(d: DecisionProcess, bound: float) -> spaces.Dict:
    """The latent, whose numbers lie within ±bound, its time, and the condition where there is one."""
    times = d.grid.float()
    seen: dict[str, spaces.Space[Any]] = {
        keys.X_T: spaces.Box(-bound, bound, d.event_shape, np.float32),
        keys.T: spaces.Box(float(times.min()), float(times.max()), (1,), np.float32),
    }
    if d.num_classes:
        seen[keys.COND] = spaces.Discrete(d.num_classes)
    elif d.conditions is not None:
        c = d.conditions.numpy()
        seen[keys.COND] = spaces.Box(c.min(0), c.max(0), dtype=c.dtype.type)
    return spaces.Dict(seen)


def _exact(data: Data, process: Schedule) -> DenoiserFn | None:
    """The posterior mean of the data, where it is known."""
    if data.mixture is not None:
        m = data.mixture
        return MixtureDenoiser(process, m.means, m.stds, m.weights)
    return None if data.train is None else EmpiricalDenoiser(process, data.train)
