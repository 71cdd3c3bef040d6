"""The reward process of a denoising chain as Gymnasium environments, single and vector."""

from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np
import torch
from gymnasium import spaces
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
    Chains,
    Info,
    Observation,
    SingleChainEnv,
    VectorChainEnv,
    copied,
    named,
)
from diffrl.envs.reward_process import RewardProcess
from diffrl.errors import InputError

__all__ = ["DiffusionMRPEnv", "DiffusionMRPVectorEnv"]


class DiffusionMRPEnv(SingleChainEnv[int]):
    """One denoising chain without decisions (`Discrete(1)`): each step pays how far the posterior mean moved.

        x_s ~ N(A x0 + κ x_t, std²),    r_i = μ_i - μ_{i+k},    μ_i = A_i x0 + κ_i x_i

    The agent sees `Dict(x_t, t)`. The reward is an array of the event's shape, described by `reward_space`
    and `reward_dim` as in MO-Gymnasium. `info` holds `A` and `kappa` of the value A E[x0 | x_t] + κ x_t, the
    position `index`, the label `cond` where there are labels, and the datum `x0`, which is the chain's hidden
    state: an agent must not read it.

    `reset(options={"x0": array})` starts a chain at this datum; for labelled data, give its label as "cond" too.

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
        reward_mode: "vector"; "flat", the same with one axis, which MO-Gymnasium's wrappers need for images; or
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

    options = ("x0", "cond")
    _chains: "_Chains"

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
            raise InputError(f"reward_mode is {reward_mode!r}: give 'vector', 'flat' or 'sum'")
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

    def step(self, action: int) -> tuple[Observation, Any, bool, bool, Info]:
        """Wait for one step; the action is 0.

        Raises:
            ValueError: another action.
            ResetNeeded: the chain has ended.
        """
        observation, reward, terminated, truncated, info = self._stepped(
            self._chains.step(action, self.reward_mode)
        )
        return (
            observation,
            float(reward) if self.reward_mode == "sum" else reward,
            terminated,
            truncated,
            info,
        )


class DiffusionMRPVectorEnv(VectorChainEnv):
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

    _chains: "_Chains"

    def __init__(self, num_envs: int = 1, *, max_episode_steps: int | None = None, **variant: Any) -> None:
        single = self._adopt(DiffusionMRPEnv, num_envs, max_episode_steps, variant)
        self.reward_process, self.reward_mode = single.reward_process, single.reward_mode
        if self.reward_mode != "sum":
            self.single_reward_space, self.reward_dim = single.reward_space, single.reward_dim
            self.reward_space = batch_space(single.reward_space, num_envs)
        self._chains = _Chains(self.reward_process, num_envs, single.noise)

    def step(self, actions: Array) -> tuple[Observation, Array, Array, Array, Info]:
        """One step of every chain; all actions are 0.

        Raises:
            ValueError: another action.
            ResetNeeded: a chain has ended.
        """
        return self._chains.step(actions, self.reward_mode)


class _Chains(Chains):
    """Chains of one reward process."""

    def __init__(
        self, reward_process: RewardProcess, n: int, noise: Callable[[Tensor], Tensor] | None
    ) -> None:
        super().__init__(n, noise)
        self.reward_process = reward_process
        self.x0 = torch.zeros(n, *reward_process.event_shape, dtype=reward_process.dtype)
        self.cond = torch.zeros_like(self.rows) if reward_process.num_classes else None
        self.states = reward_process.states(torch.zeros_like(self.rows), self.x0)

    def reset(self, mask: NDArray[np.bool_], given: Mapping[str, Array]) -> None:
        x0, cond = (given.get(name) for name in DiffusionMRPEnv.options)
        r, rows = self.reward_process, self.rows[torch.from_numpy(mask)]
        if len(rows) == 0:
            return
        label = None if cond is None else torch.tensor(cond)
        if x0 is None and label is None:
            datum, label = self._draw(rows)
        elif x0 is None:
            raise InputError("cond is given without x0: give both")
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
            raise InputError(f"action is {action}: the only one is 0, to wait")
        self.require_running()
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
