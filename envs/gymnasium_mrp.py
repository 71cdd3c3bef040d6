"""The denoising chain as Gymnasium environments, single and vector: the torch core, NumPy at the edge."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import gymnasium
import numpy as np
import torch
from gymnasium import spaces
from gymnasium.error import ResetNeeded
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray
from torch import Tensor

from diffrl import keys
from diffrl.data.dataset import Data
from diffrl.data.registry import DATASETS
from diffrl.diffusion.schedules.base import Schedule
from diffrl.diffusion.schedules.registry import PROCESSES
from diffrl.envs.gymnasium_common import (
    Array,
    Info,
    Observation,
    Streams,
    copied,
    first,
    known_options,
    named,
    reset_mask,
)
from diffrl.envs.reward_process import RewardProcess

__all__ = ["DiffusionMRPEnv", "DiffusionMRPVectorEnv"]


class DiffusionMRPEnv(gymnasium.Env[Observation, int]):
    """One denoising chain: nothing to decide (`Discrete(1)`), each step pays the drift of the posterior mean.

        x_s ~ N(A x0 + κ x_t, std²),    r_i = μ_i - μ_{i+k},    μ_i = A_i x0 + κ_i x_i

    The agent sees `Dict(x_t, t)`. The reward is an array of the event's shape, described by `reward_space`
    and `reward_dim` as in MO-Gymnasium. `info` holds `A` and `kappa` of the value A E[x0 | x_t] + κ x_t, the
    position `index`, the label `cond` where there are labels, and the datum `x0`, which is the chain's hidden
    state: an agent that reads it cheats.

    `reset(options={"x0": array})` starts a chain at this datum; labelled data want its "cond" beside it.

    >>> import diffrl, gymnasium
    >>> env = gymnasium.make("DiffusionMRP-v0", process="flow", data="rings", num_steps=8, coupling="shared")
    >>> observation, info = env.reset(seed=0)
    >>> observation, reward, terminated, truncated, info = env.step(0)
    >>> reward.shape
    (2,)

    Source: Temporal Difference Learning for Diffusion Models (2026), https://arxiv.org/abs/2606.15048.

    Args:
        process: name in `diffrl.diffusion.schedules.PROCESSES` ("edm", "ddpm", "vp", "flow"), or a schedule.
        data: name in `diffrl.data.DATASETS` ("rings", "gmm", "digits", …), a data set, or points [M, *E].
        num_steps: N ≥ 1, the noise levels; see `diffrl.diffusion.chains.Chain`.
        coupling: η ∈ [0, 1], or "markov" (1), "shared" (0): how successive states share their noise.
        span: k ≥ 1, levels between successive states; K = ⌈N/k⌉ steps reach clean data.
        stride: Δ > 0, levels of the step whose posterior mean is the value.
        value: "posterior_mean", or "clean": A = 1, κ = 0, and only the last step pays.
        reward_mode: "vector"; "flat", the same as one axis, which MO-Gymnasium's wrappers want of images; or
            "sum" over the event as a float, with the array in `info["vector_reward"]`.
        max_steps: cut the chain at this position: truncated; None lets it run to clean data.
        process_kwargs: arguments of the process named, e.g. {"sigma_max": 20.0}.
        data_kwargs: arguments of the data set named, e.g. {"modes": 5}.
        noise: standard normal numbers for a tensor of the wanted shape [n, *E], n = 1 here: called once at
            each reset and each step; None draws from the environment's own generator.

    Raises:
        TypeError: a keyword that is not known here, or not to the process or data set named.
        ValueError: an argument is outside its range.
    """

    metadata: dict[str, Any] = {"render_modes": []}

    def __init__(
        self,
        *,
        process: str | Schedule = "edm",
        data: str | Data | Tensor = "rings",
        num_steps: int = 18,
        coupling: float | str = "markov",
        span: int = 1,
        stride: float = 1.0,
        value: Literal["posterior_mean", "clean"] = "posterior_mean",
        reward_mode: Literal["vector", "flat", "sum"] = "vector",
        max_steps: int | None = None,
        process_kwargs: Mapping[str, Any] | None = None,
        data_kwargs: Mapping[str, Any] | None = None,
        noise: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        if reward_mode not in ("vector", "flat", "sum"):
            raise ValueError(f"reward_mode is {reward_mode!r}: give 'vector', 'flat' or 'sum'")
        self.reward_process = RewardProcess(
            named("process", PROCESSES, process, process_kwargs),
            named("data", DATASETS, data, data_kwargs),
            num_steps=num_steps,
            coupling=coupling,
            span=span,
            stride=stride,
            value=value,
            max_steps=max_steps,
        )
        self.reward_mode, self.noise = reward_mode, noise
        self._chains = _Chains(self.reward_process, 1, noise)
        chain, event = self.reward_process.chain, self.reward_process.event_shape
        dtype = np.dtype(str(self.reward_process.dtype).removeprefix("torch."))
        low, high = float(chain.t.min()), float(chain.t.max())
        state = spaces.Box(-np.inf, np.inf, event, dtype.type)
        time = spaces.Box(low, high, (1,), dtype.type)
        self.observation_space = spaces.Dict({keys.X_T: state, keys.T: time})  # type: ignore[assignment]
        self.action_space: spaces.Space[int] = spaces.Discrete(1)  # type: ignore[assignment]
        if reward_mode != "sum":  # MO-Gymnasium and TorchRL take the attribute as the sign of vector rewards
            shape = event if reward_mode == "vector" else (event.numel(),)
            self.reward_space = spaces.Box(-np.inf, np.inf, shape, dtype.type)
            self.reward_dim = event.numel()

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, Info]:
        """Start a chain, at ``options["x0"]`` [*E] if given."""
        super().reset(seed=seed)
        if seed is not None or not self._chains.streams.generators:
            self._chains.streams.seed([self.np_random])
        given = {k: np.asarray(v)[None] for k, v in known_options(options, "x0", "cond").items()}
        self._chains.reset(np.ones(1, bool), **given)
        observation, info = self._chains.seen()
        return first(observation), first(info)

    def step(self, action: int) -> tuple[Observation, Any, bool, bool, Info]:
        """Wait for one step; the action is 0.

        Raises:
            ValueError: another action.
            ResetNeeded: the chain has ended.
        """
        observation, reward, terminated, truncated, info = self._chains.step(action, self.reward_mode)
        paid = float(reward[0]) if self.reward_mode == "sum" else reward[0]
        return first(observation), paid, bool(terminated[0]), bool(truncated[0]), first(info)


class DiffusionMRPVectorEnv(VectorEnv[Observation, Array, Array]):
    """Many denoising chains at once; everything has a leading dim of `num_envs`, infos too.

    A chain that has ended waits for ``reset(options={"reset_mask": mask})``, mask a bool array [num_envs]:
    autoreset is DISABLED, which is what TorchRL reads without losing terminal observations.

    A seed given as a number makes one stream for all chains. A list of seeds, one for each, gives every chain
    a stream of its own, and so the numbers of a `DiffusionMRPEnv` with that seed; it is slower.

    Args:
        num_envs: the number of chains.
        max_episode_steps: `gymnasium.make_vec`'s name for max_steps.
        variant: keywords of `DiffusionMRPEnv`.

    Raises:
        TypeError: an unknown keyword.
        ValueError: an argument is outside its range.
    """

    def __init__(self, num_envs: int = 1, *, max_episode_steps: int | None = None, **variant: Any) -> None:
        if num_envs < 1:
            raise ValueError(f"num_envs is {num_envs}: give at least one")
        cut: dict[str, Any] = {} if max_episode_steps is None else {"max_steps": max_episode_steps}
        single = DiffusionMRPEnv(**cut, **variant)
        self.num_envs = num_envs
        self.autoreset_mode = AutoresetMode.DISABLED
        self.metadata = {"render_modes": [], "autoreset_mode": self.autoreset_mode}
        self.single_observation_space = single.observation_space
        self.single_action_space = single.action_space
        self.observation_space = batch_space(single.observation_space, num_envs)
        self.action_space = batch_space(single.action_space, num_envs)
        self.reward_process, self.reward_mode = single.reward_process, single.reward_mode
        if self.reward_mode != "sum":
            self.single_reward_space, self.reward_dim = single.reward_space, single.reward_dim
            self.reward_space = batch_space(single.reward_space, num_envs)
        self._chains = _Chains(self.reward_process, num_envs, single.noise)

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, Info]:
        """Start all chains, or some of them.

        Args:
            seed: one number, or one for each chain.
            options: "reset_mask", bool [num_envs]: which; "x0", [num_envs, *E]: at these data, with their
                labels "cond" if the data have any.

        Returns:
            Observations and infos of all chains.
        """
        if isinstance(seed, Sequence):
            self._chains.streams.seed_each(seed)
        else:
            super().reset(seed=seed)
            if seed is not None or not self._chains.streams.generators:
                self._chains.streams.seed([self.np_random])
        given = {k: np.asarray(v) for k, v in known_options(options, "x0", "cond", "reset_mask").items()}
        self._chains.reset(reset_mask(given.pop("reset_mask", None), self.num_envs), **given)
        return self._chains.seen()

    def step(self, actions: Array) -> tuple[Observation, Array, Array, Array, Info]:
        """One step of every chain; all actions are 0.

        Raises:
            ValueError: another action.
            ResetNeeded: a chain has ended.
        """
        return self._chains.step(actions, self.reward_mode)


class _Chains:
    """n chains of one reward process, kept as tensors; arrays that leave it are fresh."""

    def __init__(
        self, reward_process: RewardProcess, n: int, noise: Callable[[Tensor], Tensor] | None
    ) -> None:
        self.reward_process, self.streams, self.rows = reward_process, Streams(n, noise), torch.arange(n)
        self.x0 = torch.zeros(n, *reward_process.event_shape, dtype=reward_process.dtype)
        self.cond = torch.zeros_like(self.rows) if reward_process.num_classes else None
        self.states = reward_process.states(torch.zeros_like(self.rows), self.x0)
        self.over = np.ones(n, bool)

    def reset(self, mask: NDArray[np.bool_], x0: Array | None = None, cond: Array | None = None) -> None:
        r, rows = self.reward_process, self.rows[torch.from_numpy(mask)]
        if len(rows) == 0:
            return
        label = None if cond is None else torch.tensor(cond)
        if x0 is None and label is None:
            datum, label = self._draw(rows)
        elif x0 is None:
            raise ValueError("cond is given without x0: give both")
        else:
            datum, label = r.given(torch.tensor(x0), label, tuple(self.rows.shape))
            datum, label = datum[rows], None if label is None else label[rows]
        start = r.start(torch.zeros_like(rows), datum, self.streams.noise(datum, rows))
        index = self.states.index.index_copy(0, rows, start.index)
        self.states = r.states(index, self.states.x.index_copy(0, rows, start.x))
        self.x0 = self.x0.index_copy(0, rows, datum)
        if self.cond is not None and label is not None:
            self.cond = self.cond.index_copy(0, rows, label)
        self.over[mask] = False

    def step(self, action: int | Array, reward_mode: str) -> tuple[Observation, Array, Array, Array, Info]:
        if np.any(np.asarray(action) != 0):
            raise ValueError(f"action is {action}: the only one is 0, to wait")
        if self.over.any():
            ended = np.flatnonzero(self.over).tolist()
            raise ResetNeeded(f"chains {ended} of {len(self.over)} are not running: call reset() first")
        noise = self.streams.noise(self.states.x, self.rows)
        self.states, r, terminated, truncated = self.reward_process.step(self.states, self.x0, noise)
        self.over = (terminated | truncated).numpy()
        observation, info = self.seen()
        reward = r.numpy()
        if reward_mode == "sum":
            info["vector_reward"] = reward
        if reward_mode != "vector":
            reward = reward.reshape(len(reward), -1)
        if reward_mode == "sum":
            reward = reward.sum(1)
        return observation, reward, terminated.numpy(), truncated.numpy(), info

    def seen(self) -> tuple[Observation, Info]:
        """Observations and infos."""
        s = self.states
        observation = {keys.X_T: copied(s.x), keys.T: copied(s.t)[:, None]}
        info = {
            keys.X0: copied(self.x0),
            keys.INDEX: copied(s.index),
            keys.A: copied(s.A),
            keys.KAPPA: copied(s.kappa),
        }
        return observation, info if self.cond is None else info | {keys.COND: copied(self.cond)}

    def _draw(self, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        generators = self.streams.generators
        if self.streams.shared:
            return self.reward_process.draw(len(rows), generators[0])
        draws = [self.reward_process.draw(1, generators[row]) for row in rows.tolist()]
        labels = [label for _, label in draws if label is not None]
        return torch.cat([x0 for x0, _ in draws]), torch.cat(labels) if labels else None
