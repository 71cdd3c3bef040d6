"""The denoising chain as Gymnasium environments in which the agent denoises, single and vector."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor

from diffrl import keys
from diffrl.data.dataset import Data
from diffrl.data.registry import DATASETS
from diffrl.devices import usable_device
from diffrl.diffusion.denoisers import DenoiserFn
from diffrl.diffusion.exact import EmpiricalDenoiser, MixtureDenoiser
from diffrl.diffusion.laws import NoiseFn
from diffrl.diffusion.samplers.base import GaussianSampler
from diffrl.diffusion.samplers.registry import SAMPLERS, samplers_with_law
from diffrl.diffusion.schedules.base import Schedule
from diffrl.diffusion.schedules.registry import PROCESSES
from diffrl.envs.arguments import (
    as_data,
    as_dtype,
    as_tensor,
    largest_number,
    named,
    require_callable,
    require_states,
)
from diffrl.envs.decision_process import ActionKind, ActionScale, DecisionProcess, Latents, RewardPlacement
from diffrl.envs.drawing import Picture
from diffrl.envs.gymnasium_chains import Array, Chains, Info, Mask, Observation, Outcome, copied
from diffrl.envs.gymnasium_common import SingleChainEnv, VectorChainEnv
from diffrl.envs.one_chain import OneDecisionChain
from diffrl.errors import InputError
from diffrl.ranges import require_number
from diffrl.rewards.calls import Reward
from diffrl.rewards.registry import REWARDS
from diffrl.shapes import expand_like

__all__ = ["DiffusionMDPEnv", "DiffusionMDPVectorEnv"]


class DiffusionMDPEnv(SingleChainEnv[Array]):
    """One denoising chain: the agent chooses each next latent, and is paid for the clean sample it ends at.

        x_0 ~ N(0, σ² I) at the noisiest level;    x_{i+1} = c_i a_i;    r = w R(x_K) on reaching clean data, else 0

    The agent sees `Dict(x_t, t)`, and `cond` if there are conditions. Actions are arrays of the event's shape. Their
    space is [-1, 1], but numbers outside are not clipped. By default the unit c_i of an action is the half-width of a
    box around the latents of the level that it leads to, b = s α + 4 σ, rounded up to a power of two, with s the
    largest number of the data: so an agent that acts at random stays near the data whatever the process. With action
    "x0_hat" the agent gives the clean estimate, in units of s, and the environment draws the next latent from the
    sampler's law. `info` holds the position `index`.

    Observations are the latent and its time as a sampler has them; with `normalise` they are x_t / b_i, and the share
    of the chain that is left, which an agent from outside learns from more easily where σ is large.

    The environment has a pretrained denoiser, by default the exact one of the data: `pretrained_action()` is the action
    of its sampler at the present latent. An agent that always takes it draws the sampler's samples.

    `reset(options={"x_t": array, "index": 3})` starts at this latent, given as observed, and position (default 0);
    "cond" sets the condition. `render()` draws the chain, see `diffrl.envs.drawing`.

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
        data: name in `diffrl.data.DATASETS` ("rings", "gmm", "digits", …), a data set, or points [M, *E]: it gives the
            shape of latents and the default denoiser.
        num_steps: K = N ≥ 1, the noise levels and the steps of a chain.
        action: "next_latent", or "x0_hat".
        reward: name in `diffrl.rewards.REWARDS`, or any callable (x0 [N, *E], cond) → N numbers. Without
            reward_kwargs "mode_distance" is to the first mode of the data.
        reward_placement: "terminal", or with action "x0_hat" also "dense": each step pays R of the clean estimate.
        reward_scale: w > 0.
        sampler: name in `diffrl.diffusion.samplers.samplers_with_law()`, or a sampler whose step is a Gaussian.
        denoiser: the pretrained one, on `device`; None: the exact one of the data, where that is known.
        conditions: labels [M], or other arrays [M, ...], that each chain's condition is drawn from; or None.
        action_scale: c_i: "level" as said above, a number > 0, or None for 1. A power of two does not round.
        normalise: whether observations are in units of the level.
        max_steps: cut the chain at this position: truncated; None lets it run to clean data.
        process_kwargs: arguments of the process named, e.g. {"shift": 3.0}.
        data_kwargs: arguments of the data set named, e.g. {"modes": 5}.
        reward_kwargs: arguments of the reward named.
        sampler_kwargs: arguments of the sampler named, e.g. {"eta": 0.5} of "ddim".
        noise: standard normal numbers for a tensor of the wanted shape [n, *E], n = 1 here: called at each reset,
            at each step with action "x0_hat", and by `pretrained_action`; None draws from the environment's own
            generator.
        device: where latents, denoiser and reward are computed; what the agent sees are arrays.
        dtype: "float32" or "float64", of latents and observations.
        render_mode: "rgb_array", or None.

    Raises:
        TypeError: a keyword that is not known here, or not to what is named, or something of a wrong type.
        ValueError: an argument is outside its range, or the sampler does not work on the process.
    """

    options = ("x_t", "index", "cond")
    _chains: "_Chains"

    def __init__(
        self,
        *,
        process: str | Schedule = "flow",
        data: str | Data | Tensor | Array = "rings",
        num_steps: int = 10,
        action: ActionKind = "next_latent",
        reward: str | Reward = "mode_distance",
        reward_placement: RewardPlacement = "terminal",
        reward_scale: float = 1.0,
        sampler: str | GaussianSampler = "ancestral",
        denoiser: DenoiserFn | None = None,
        conditions: Tensor | Array | None = None,
        action_scale: ActionScale = "level",
        normalise: bool = False,
        max_steps: int | None = None,
        process_kwargs: Mapping[str, Any] | None = None,
        data_kwargs: Mapping[str, Any] | None = None,
        reward_kwargs: Mapping[str, Any] | None = None,
        sampler_kwargs: Mapping[str, Any] | None = None,
        noise: NoiseFn | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | str = "float32",
        render_mode: str | None = None,
    ) -> None:
        self.data = law = _data_set(named("data", DATASETS, data, data_kwargs))
        if reward_placement == "dense" and action == "next_latent":
            raise InputError("dense rewards are of clean estimates, which only action 'x0_hat' brings")
        self.decision_process = d = DecisionProcess(
            named("process", PROCESSES, process, process_kwargs),
            named("reward", REWARDS, reward, _reward_kwargs(reward, reward_kwargs, law)),
            event_shape=law.event_shape,
            num_steps=num_steps,
            sampler=named("sampler", {n: SAMPLERS[n] for n in samplers_with_law()}, sampler, sampler_kwargs),
            action=action,
            reward_placement=reward_placement,
            conditions=conditions,
            max_steps=max_steps,
            action_scale=action_scale,
            data_scale=largest_number(law),
            dtype=as_dtype(dtype),
        )
        require_callable("denoiser", denoiser, "(x [N, *E], t [N], cond) -> clean estimates")
        self.reward_scale = require_number("reward_scale", reward_scale, 0, ends="()")
        self.noise, self.normalise, self.device = noise, normalise, usable_device(device)
        self.denoiser = _exact(law, d.process, self.device) if denoiser is None else denoiser
        self.observation_space = _observation_space(d, normalise)  # type: ignore[assignment]
        self.action_space = spaces.Box(-1, 1, d.event_shape, np.float32)
        self._start_up(render_mode)

    def chains(self, n: int, *, plain: bool) -> "_Chains":
        """N such chains, with streams of their own; one may be stepped in plain numbers where that is possible."""
        return _Chains(self, n, plain=plain)

    def pretrained_action(self) -> Array:
        """The action of the pretrained sampler at the present latent, drawn anew at each call.

        Raises:
            ResetNeeded: the chain has ended.
            ValueError: no denoiser is known, or it gives another shape than the latent's.
        """
        return self._chains.pretrained_action(np.ones(1, bool))[0]


class DiffusionMDPVectorEnv(VectorChainEnv):
    """Many denoising chains at once; everything has a leading dim of `num_envs`, infos too.

    What becomes of a chain that has ended, `autoreset_mode` says, as in Gymnasium's own vector environments:

    | mode | the chain starts anew |
    |---|---|
    | "NextStep" | at the next step, which ignores its action and pays 0 |
    | "SameStep" | at once; what it ended with is in `infos["final_obs"]` and `infos["final_info"]` |
    | "Disabled" | by ``reset(options={"reset_mask": mask})``, mask a bool array [num_envs] |

    TorchRL's wrapper takes the last two, and loses terminal observations under "SameStep": give it "Disabled".

    A seed given as a number makes one stream for all chains. A list of seeds, one for each, gives every chain
    a stream of its own, and so the numbers of a `DiffusionMDPEnv` with that seed; it is slower.

    Args:
        num_envs: the number of chains.
        autoreset_mode: one of the above, or Gymnasium's `AutoresetMode`.
        max_episode_steps: `gymnasium.make_vec`'s name for max_steps.
        variant: keywords of `DiffusionMDPEnv`.

    Raises:
        TypeError: an unknown keyword.
        ValueError: an argument is outside its range.
    """

    single = DiffusionMDPEnv
    template: DiffusionMDPEnv
    _chains: "_Chains"

    @property
    def decision_process(self) -> DecisionProcess:
        """What its chains do."""
        return self.template.decision_process

    def pretrained_action(self) -> Array:
        """The actions of the pretrained sampler at the present latents, [num_envs, *E]; see `DiffusionMDPEnv`.

        It is 0 for a chain that starts anew at the next step.
        """
        return self._chains.pretrained_action(~self._anew())


class _Chains(Chains):
    """Chains of one environment."""

    def __init__(self, env: DiffusionMDPEnv, n: int, *, plain: bool) -> None:
        self.env, self.decision_process = env, env.decision_process
        d, device = self.decision_process, env.device
        alpha, sigma = d.process.alpha(d.grid), d.process.sigma(d.grid)
        picture = None
        if env.render_mode is not None:
            picture = Picture(env.data.test, alpha, sigma, largest_number(env.data), n)
        super().__init__(n, env.noise, device, picture, plain=plain and OneDecisionChain.serves(d))
        start = torch.zeros(n, *d.event_shape, dtype=d.dtype, device=device)
        self._latents = d.latents(torch.zeros_like(self.rows), start)
        self.cond = None if d.conditions is None else d.conditions[[0] * n].to(device)
        self._one = OneDecisionChain(d, env.normalise)

    @property
    def latents(self) -> Latents:
        """The present latents."""
        if not (self.plain and self.started[0]):
            return self._latents
        return self.decision_process.latents(torch.tensor([self._one.index]), torch.from_numpy(self._one.x))

    def reset(self, rows: Tensor, given: Mapping[str, Array]) -> None:
        x_t, index, cond = (given.get(name) for name in DiffusionMDPEnv.options)
        d = self.decision_process
        if cond is not None and self.cond is None:
            raise InputError("options has a 'cond', but the environment has no conditions")
        if x_t is None and index is not None:
            raise InputError("options has an 'index', but no 'x_t' for that position")
        label = self._draw(rows) if cond is None else self._given_condition(cond)[rows]
        at = self._given_index(index)[rows]
        if x_t is None:
            x = d.start(self.streams.noise(self.latents.x[rows], rows)).x
        else:
            x = self._checked(x_t, "x_t")[rows] * self._observed_unit(at, self.latents.x)
        if self.cond is not None and label is not None:
            self.cond = self.cond.index_copy(0, rows, label)
        self._set(rows, at, x)
        if self.plain:
            self._one.take(self._latents.index, self._latents.x, self.cond)

    def step(self, action: Array, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        d, here = self.decision_process, self.latents
        reached, reward, terminated, truncated = d.step(
            d.latents(here.index[rows], here.x[rows]),
            self._checked(action, "action")[rows],
            cond=None if self.cond is None else self.cond[rows],
            x0_hat=None,
            noise=lambda x: self.streams.noise(x, rows),
        )
        self._set(rows, reached.index, reached.x)
        return self.env.reward_scale * reward, terminated, truncated

    def step_one(self, action: Array) -> Outcome:
        one = self._one
        fits = action.dtype.kind == "f" and action.itemsize <= one.x.itemsize
        if fits and action.shape == one.x.shape[1:] and np.isfinite(action).all():
            a = action[None].astype(one.x.dtype, copy=False)
        else:
            a = self._checked(action[None], "action").numpy()
        reward, terminated, truncated = one.step(
            a, lambda: self.streams.noise(torch.from_numpy(one.x), self.rows)
        )
        observation, info = one.seen()
        return observation, float(self.env.reward_scale * reward), terminated, truncated, info

    @torch.no_grad()
    def pretrained_action(self, mask: Mask) -> Array:
        self.require_running(mask)
        d, denoiser, rows = self.decision_process, self.env.denoiser, self.rows[torch.from_numpy(mask)]
        if denoiser is None:
            raise InputError("the exact denoiser of these data is not known: give denoiser=")
        here = self.latents
        here = d.latents(here.index[rows], here.x[rows])
        chosen = denoiser(here.x, here.t, None if self.cond is None else self.cond[rows])
        if chosen.shape != here.x.shape:
            raise InputError(f"denoiser gives {tuple(chosen.shape)} for latents {tuple(here.x.shape)}")
        if d.action == "next_latent":
            chosen = d.denoise(here, chosen, lambda x: self.streams.noise(x, rows))
        actions = torch.zeros_like(self.latents.x)
        actions[rows] = d.in_units(chosen, here.index, inverse=True).to(actions)
        return copied(actions)

    def seen(self) -> tuple[Observation, Info]:
        index, x, t = self.latents.index, self.latents.x, self.latents.t
        if self.env.normalise:
            x, t = x / self._observed_unit(index, x), 1 - index.to(x) / self.decision_process.num_steps
        observation = {keys.X_T: copied(x), keys.T: copied(t)[:, None]}
        if self.cond is not None:
            observation[keys.COND] = copied(self.cond)
        return observation, {keys.INDEX: copied(index)}

    def position(self) -> tuple[Tensor, Tensor]:
        here = self.latents
        return here.index, here.x

    def _set(self, rows: Tensor, index: Tensor, x: Tensor) -> None:
        here = self.latents
        self._latents = self.decision_process.latents(
            here.index.index_copy(0, rows, index), here.x.index_copy(0, rows, x)
        )

    def _observed_unit(self, index: Tensor, x: Tensor) -> Tensor:
        """What an observed latent of 1 means at positions [R]: b_i, or 1."""
        b = self.decision_process.boxes.to(x)[index]
        return expand_like(b if self.env.normalise else torch.ones_like(b), x)

    def _checked(self, given: Array, what: str) -> Tensor:
        shape = self.latents.x.shape
        alone = len(self.rows) == 1 and given.ndim > 0 and len(given) == 1  # errors leave out the leading dim
        needed = f"numbers of a floating dtype, shape {tuple(shape[1:] if alone else shape)}"
        x = as_tensor(what, given, needed)
        require_states(what, x[0] if alone else x, () if alone else shape[:1], shape[1:])
        return x.to(self.latents.x)

    def _given_index(self, index: Array | None) -> Tensor:
        at = torch.zeros_like(self.rows) if index is None else as_tensor("index", index)
        last = self.decision_process.last
        whole = not at.is_floating_point() and at.dtype != torch.bool and at.shape == self.rows.shape
        if not whole or bool(((at < 0) | (at >= last)).any()):
            raise InputError(f"index is {at.tolist()}: give whole numbers in [0, {last - 1}], one a chain")
        return at.to(self.rows)

    def _given_condition(self, given: Array) -> Tensor:
        c = self.decision_process.given_condition(as_tensor("cond", given), self.rows.shape)
        known = self.decision_process.conditions
        assert known is not None
        if bool(((c < known.amin(0)) | (c > known.amax(0))).any()):
            raise InputError("cond is outside the range of the conditions, and so of the observation space")
        return c.to(self.latents.x.device)

    def _draw(self, rows: Tensor) -> Tensor | None:
        d, generators = self.decision_process, self.streams.generators
        if d.conditions is None:
            return None
        parts = [(len(rows), generators[0])]
        if not self.streams.shared:
            parts = [(1, generators[row]) for row in rows.tolist()]
        drawn = [d.draw_conditions(n, g) for n, g in parts]
        return torch.cat([c for c in drawn if c is not None]).to(rows.device)


def _observation_space(d: DecisionProcess, normalise: bool) -> spaces.Dict:
    """The latent within its bounds, its time, and the condition where there is one."""
    number: Any = np.dtype(str(d.dtype).removeprefix("torch.")).type
    times = torch.tensor([0.0, 1.0]) if normalise else d.grid.to(d.dtype)
    bound = float((d.bounds() / d.boxes if normalise else d.bounds()).max())
    seen: dict[str, spaces.Space[Any]] = {
        keys.X_T: spaces.Box(-bound, bound, d.event_shape, number),
        keys.T: spaces.Box(float(times.min()), float(times.max()), (1,), number),
    }
    if d.num_classes:
        seen[keys.COND] = spaces.Discrete(d.num_classes)
    elif d.conditions is not None:
        c = d.conditions.cpu().numpy()
        seen[keys.COND] = spaces.Box(c.min(0), c.max(0), c.shape[1:], c.dtype.type)
    return spaces.Dict(seen)


def _reward_kwargs(reward: str | Reward, given: Mapping[str, Any] | None, data: Data) -> Any:
    """What was given; for "mode_distance" without anything the first mode of the data."""
    if reward == "mode_distance" and given is None and data.mixture is not None:
        return {"index": 0, "mixture": data.mixture}
    return given


def _data_set(given: Any) -> Data:
    """A data set, or points [M, *E] made one."""
    data = as_data(given)
    return data if isinstance(data, Data) else Data("points", data.float(), train=data.float())


def _exact(data: Data, process: Schedule, device: torch.device) -> DenoiserFn | None:
    """The posterior mean of the data, where it is known."""
    if data.mixture is not None:
        m = data.mixture
        return MixtureDenoiser(process, m.means, m.stds, m.weights).to(device)
    return None if data.train is None else EmpiricalDenoiser(process, data.train).to(device)
