"""The reward process of a denoising chain as Gymnasium environments, single and vector."""

from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np
import torch
from gymnasium import spaces
from gymnasium.vector.utils import batch_space
from torch import Tensor

from diffrl import keys
from diffrl.data.dataset import Data
from diffrl.data.registry import DATASETS
from diffrl.devices import usable_device
from diffrl.diffusion.schedules.base import Schedule
from diffrl.diffusion.schedules.registry import PROCESSES
from diffrl.envs.arguments import as_tensor, largest_number, named
from diffrl.envs.drawing import Picture
from diffrl.envs.gymnasium_chains import Array, Chains, Info, Observation, Outcome, copied
from diffrl.envs.gymnasium_common import SingleChainEnv, VectorChainEnv
from diffrl.envs.one_chain import OneRewardChain
from diffrl.envs.reward_process import RewardProcess, States
from diffrl.errors import InputError

__all__ = ["DiffusionMRPEnv", "DiffusionMRPVectorEnv"]


class DiffusionMRPEnv(SingleChainEnv[int]):
    """One denoising chain without decisions (`Discrete(1)`): each step pays how far the posterior mean moved.

        x_s ~ N(A x0 + κ x_t, std²),    r_i = μ_i - μ_{i+k},    μ_i = A_i x0 + κ_i x_i

    The agent sees `Dict(x_t, t)`. The reward is an array of the event's shape, described by `reward_space`
    and `reward_dim` as in MO-Gymnasium. `info` holds `A` and `kappa`, of shape [1] like t, of the value
    A E[x0 | x_t] + κ x_t, the position `index`, the label `cond` where there are labels, and the datum `x0`, which is
    the chain's hidden state: an agent must not read it.

    `reset(options={"x0": array})` starts a chain at this datum; for labelled data, give its label as "cond" too.
    `render()` draws the chain, see `diffrl.envs.drawing`.

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
            "sum" over the event as a float, with the array in `info["vector_reward"]` (0 at a reset).
        max_steps: cut the chain at this position: truncated; None lets it run to clean data.
        process_kwargs: arguments of the process named, e.g. {"sigma_max": 20.0}.
        data_kwargs: arguments of the data set named, e.g. {"modes": 5}.
        noise: standard normal numbers for a tensor of the wanted shape [n, *E], n = 1 here: called once at
            each reset and each step; None draws from the environment's own generator.
        device: where states are computed; what the agent sees are arrays.
        dtype: "float32" or "float64", of states and rewards; None: that of the data.
        render_mode: "rgb_array", or None.

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
        data: str | Data | Tensor | Array = "rings",
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
        device: torch.device | str = "cpu",
        dtype: torch.dtype | str | None = None,
        render_mode: str | None = None,
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
            dtype=dtype,
        )
        self.reward_mode, self.noise, self.device = reward_mode, noise, usable_device(device)
        chain, event = self.reward_process.chain, self.reward_process.event_shape
        number: Any = np.dtype(str(self.reward_process.dtype).removeprefix("torch.")).type
        low, high = float(chain.t.min()), float(chain.t.max())
        state = spaces.Box(-np.inf, np.inf, event, number)
        time = spaces.Box(low, high, (1,), number)
        self.observation_space = spaces.Dict({keys.X_T: state, keys.T: time})  # type: ignore[assignment]
        self.action_space: spaces.Space[int] = spaces.Discrete(1)  # type: ignore[assignment]
        if reward_mode != "sum":  # MO-Gymnasium and TorchRL take the attribute as the sign of vector rewards
            shape = event if reward_mode == "vector" else (event.numel(),)
            self.reward_space = spaces.Box(-np.inf, np.inf, shape, number)
            self.reward_dim = event.numel()
        self._start_up(render_mode)

    def chains(self, n: int, *, plain: bool) -> "_Chains":
        """N such chains, with streams of their own; one may be stepped in plain numbers where that is possible."""
        return _Chains(self, n, plain=plain)


class DiffusionMRPVectorEnv(VectorChainEnv):
    """Many denoising chains at once; everything has a leading dim of `num_envs`, infos too.

    What becomes of a chain that has ended, `autoreset_mode` says, as in Gymnasium's own vector environments:

    | mode | the chain starts anew |
    |---|---|
    | "NextStep" | at the next step, which ignores its action and pays 0 |
    | "SameStep" | at once; what it ended with is in `infos["final_obs"]` and `infos["final_info"]` |
    | "Disabled" | by ``reset(options={"reset_mask": mask})``, mask a bool array [num_envs] |

    TorchRL's wrapper takes the last two, and loses terminal observations under "SameStep": give it "Disabled".

    A seed given as a number makes one stream for all chains. A list of seeds, one for each, gives every chain
    a stream of its own, and so the numbers of a `DiffusionMRPEnv` with that seed; it is slower.

    Args:
        num_envs: the number of chains.
        autoreset_mode: one of the above, or Gymnasium's `AutoresetMode`.
        max_episode_steps: `gymnasium.make_vec`'s name for max_steps.
        variant: keywords of `DiffusionMRPEnv`.

    Raises:
        TypeError: an unknown keyword.
        ValueError: an argument is outside its range.
    """

    single = DiffusionMRPEnv
    template: DiffusionMRPEnv

    def __init__(self, num_envs: int = 1, **variant: Any) -> None:
        super().__init__(num_envs, **variant)
        if self.template.reward_mode != "sum":
            self.reward_dim = self.template.reward_dim
            # TorchRL reads the entry of this dict, batched; MO-Gymnasium the attribute below, of one chain
            vars(self)["reward_space"] = batch_space(self.template.reward_space, num_envs)

    @property
    def reward_process(self) -> RewardProcess:
        """What its chains do."""
        return self.template.reward_process

    @property
    def reward_space(self) -> spaces.Box:
        """Of the reward of one chain, as in MO-Gymnasium's own vector environments; none for reward_mode="sum"."""
        return self.template.reward_space

    @property
    def single_reward_space(self) -> spaces.Box:
        """The same, by the name that says so."""
        return self.template.reward_space


class _Chains(Chains):
    """Chains of one environment."""

    def __init__(self, env: DiffusionMRPEnv, n: int, *, plain: bool) -> None:
        r, self.env, picture = env.reward_process, env, None
        if env.render_mode is not None:
            points = r.data if isinstance(r.data, Tensor) else r.data.test
            picture = Picture(points, *r.chain.scales, largest_number(r.data), n)
        super().__init__(n, env.noise, env.device, picture, plain=plain)
        self.reward_process = r
        self.x0 = torch.zeros(n, *r.event_shape, dtype=r.dtype, device=env.device)
        self.reward = self.x0
        self.cond = torch.zeros_like(self.rows) if r.num_classes else None
        self._states = r.states(torch.zeros_like(self.rows), self.x0)
        self._one = OneRewardChain(r)

    @property
    def states(self) -> States:
        """The present states."""
        if not (self.plain and self.started[0]):
            return self._states
        return self.reward_process.states(torch.tensor([self._one.index]), torch.from_numpy(self._one.x))

    def reset(self, rows: Tensor, given: Mapping[str, Array]) -> None:
        x0, cond = (given.get(name) for name in DiffusionMRPEnv.options)
        r = self.reward_process
        label = None if cond is None else as_tensor("cond", cond)
        if x0 is None and label is None:
            datum, label = self._draw(rows)
        elif x0 is None:
            raise InputError("cond is given without x0: give both")
        else:
            datum, label = r.given(as_tensor("x0", x0), label, tuple(self.rows.shape))
            datum, label = datum.to(rows.device)[rows], None if label is None else label.to(rows.device)[rows]
        start = r.start(torch.zeros_like(rows), datum, self.streams.noise(datum, rows))
        self._set(rows, start)
        self.x0 = self.x0.index_copy(0, rows, datum)
        self.reward = self.reward.index_fill(0, rows, 0)
        if self.cond is not None and label is not None:
            self.cond = self.cond.index_copy(0, rows, label)
        if self.plain:
            self._one.take(self._states.index, self._states.x, self.x0, self.cond)

    def step(self, action: Array, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        _require_waiting(action, self.over.shape)
        r, x0, here = self.reward_process, self.x0[rows], self.states
        noise = self.streams.noise(x0, rows)
        reached, reward, terminated, truncated = r.step(r.states(here.index[rows], here.x[rows]), x0, noise)
        self._set(rows, reached)
        self.reward = torch.zeros_like(self.x0).index_copy(0, rows, reward)
        if self.env.reward_mode != "vector":
            reward = reward.flatten(1)
        return reward.sum(1) if self.env.reward_mode == "sum" else reward, terminated, truncated

    def step_one(self, action: Array) -> Outcome:
        _require_waiting(action, ())
        noise = self.streams.noise(self.x0, self.rows).numpy()
        paid, terminated, truncated = self._one.step(noise)
        reward: Any = paid[0]
        observation, info = self._one.seen()
        if self.env.reward_mode == "sum":
            info["vector_reward"] = reward
            return observation, float(torch.from_numpy(paid).flatten(1).sum(1)), terminated, truncated, info
        if self.env.reward_mode == "flat":
            reward = reward.reshape(-1)
        return observation, reward, terminated, truncated, info

    def seen(self) -> tuple[Observation, Info]:
        s = self.states
        observation = {keys.X_T: copied(s.x), keys.T: copied(s.t)[:, None]}
        info = {
            keys.X0: copied(self.x0),
            keys.INDEX: copied(s.index),
            keys.A: copied(s.A)[:, None],
            keys.KAPPA: copied(s.kappa)[:, None],
        }
        if self.env.reward_mode == "sum":
            info["vector_reward"] = copied(self.reward)
        return observation, info if self.cond is None else info | {keys.COND: copied(self.cond)}

    def position(self) -> tuple[Tensor, Tensor]:
        s = self.states
        return s.index, s.x

    def _set(self, rows: Tensor, states: States) -> None:
        here = self.states
        self._states = self.reward_process.states(
            here.index.index_copy(0, rows, states.index), here.x.index_copy(0, rows, states.x)
        )

    def _draw(self, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        generators = self.streams.generators
        if self.streams.shared:
            draws = [self.reward_process.draw(len(rows), generators[0])]
        else:
            draws = [self.reward_process.draw(1, generators[row]) for row in rows.tolist()]
        labels = [label for _, label in draws if label is not None]
        x0 = torch.cat([x0 for x0, _ in draws]).to(rows.device)
        return x0, torch.cat(labels).to(rows.device) if labels else None


def _require_waiting(action: Array, shape: tuple[int, ...]) -> None:
    """Refuse another action than 0, of one chain (shape ()) or of each of many."""
    if action.shape != shape or (action != 0).any():
        needed = (
            "the only one is 0, to wait"
            if shape == ()
            else f"give {shape[0]} zeros, one for each chain, to wait"
        )
        raise InputError(f"action is {action.tolist()!r}: {needed}")
