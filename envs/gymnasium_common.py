"""What the Gymnasium environments share: resets, steps, autoreset and rendering, of one chain and of many."""

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, TypeVar

import gymnasium
import numpy as np
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from diffrl.envs.arguments import as_action
from diffrl.envs.gymnasium_chains import Array, Chains, Info, Mask, Observation, Outcome
from diffrl.errors import InputError, InputTypeError
from diffrl.ranges import require_int

__all__ = ["SingleChainEnv", "VectorChainEnv"]

Action = TypeVar("Action")
RENDERING: dict[str, Any] = {"render_modes": ["rgb_array"], "render_fps": 4}


class SingleChainEnv(gymnasium.Env[Observation, Action]):
    """One chain: a subclass makes its chains and its spaces."""

    options: ClassVar[tuple[str, ...]]
    """Names of the options of a reset; the class docstring says what they do."""
    metadata: dict[str, Any] = RENDERING
    _chains: Chains

    @abstractmethod
    def chains(self, n: int, *, plain: bool) -> Chains:
        """N such chains, with streams of their own; one may be stepped in plain numbers where that is possible."""

    def _start_up(self, render_mode: str | None) -> None:
        """What the subclass does last in its constructor."""
        if render_mode not in (None, "rgb_array"):
            raise InputError(f"render_mode is {render_mode!r}: give 'rgb_array' or None")
        self.render_mode = render_mode
        self._chains = self.chains(1, plain=True)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, Info]:
        """Start a chain.

        Args:
            seed: of its random numbers; None continues the streams that there are.
            options: where the chain starts; the class docstring lists them.

        Raises:
            ValueError: an unknown option, or one of another shape.
        """
        super().reset(seed=seed)
        self._chains.streams.follow(self.np_random, seed)
        given = {k: v[None] for k, v in _known(options, self.options).items()}
        self._chains.begin(np.ones(1, bool), given)
        observation, info = self._chains.seen()
        return _observed(observation, self.observation_space), _told(info)

    def step(self, action: Action) -> Outcome:
        """Go one step; the class docstring says what an action is.

        Raises:
            TypeError: the action is of another type.
            ValueError: it has another shape, holds NaN or infinity, or is none of the choices.
            ResetNeeded: the chain has ended.
        """
        chains, chosen = self._chains, as_action(action, self.action_space)
        if chains.plain:
            return chains.advance_one(chosen)
        reward, terminated, truncated = chains.advance(chosen[None], np.ones(1, bool))
        observation, info = chains.seen()
        paid = float(reward[0]) if reward.ndim == 1 else reward[0]
        return (
            _observed(observation, self.observation_space),
            paid,
            bool(terminated[0]),
            bool(truncated[0]),
            _told(info),
        )

    def render(self) -> Any:
        """A picture of the chain, uint8 [H, W, 3]; see `diffrl.envs.drawing`.

        Raises:
            ResetNeeded: no chain has started.
            ValueError: the environment was made without render_mode="rgb_array".
        """
        return self._chains.frames()[0]


class VectorChainEnv(VectorEnv[Observation, Array, Array]):
    """Many chains at once: a subclass names the environment of one chain."""

    single: ClassVar[Callable[..., SingleChainEnv[Any]]]
    """The environment of one chain."""

    def __init__(
        self,
        num_envs: int = 1,
        *,
        autoreset_mode: AutoresetMode | str = AutoresetMode.NEXT_STEP,
        max_episode_steps: int | None = None,
        **variant: Any,
    ) -> None:
        self.num_envs, self.autoreset_mode = require_int("num_envs", num_envs), _mode(autoreset_mode)
        cut: dict[str, Any] = {} if max_episode_steps is None else {"max_steps": max_episode_steps}
        self.template = type(self).single(**cut, **variant)
        """One such environment, which knows the spaces and the process."""
        self._options = (*self.template.options, "reset_mask")
        self.render_mode = self.template.render_mode
        self.metadata = {**RENDERING, "autoreset_mode": self.autoreset_mode}
        self.single_observation_space = self.template.observation_space
        self.single_action_space = self.template.action_space
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self._chains = self.template.chains(num_envs, plain=False)

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, Info]:
        """Start all chains, or some of them.

        Args:
            seed: one number, or one for each chain.
            options: "reset_mask", bool [num_envs], says which chains start; the others are those of the single
                environment, each with a leading dim of num_envs.

        Returns:
            Observations and infos of all chains.

        Raises:
            ValueError: an unknown option, one of another shape, or another number of seeds than of chains.
        """
        if isinstance(seed, Sequence):
            self._chains.streams.seed_each(seed)
        else:
            super().reset(seed=seed)
            self._chains.streams.follow(self.np_random, seed)
        given = _known(options, self._options)
        self._chains.begin(_mask(given.pop("reset_mask", None), self.num_envs), given)
        observation, info = self._chains.seen()
        return observation, _masked(info, np.ones(self.num_envs, bool))

    def step(self, actions: Array) -> tuple[Observation, Array, Array, Array, Info]:
        """One step of every chain; actions as in the single environment, with a leading dim of num_envs.

        Raises:
            TypeError: the actions are of another type.
            ValueError: they have another shape, hold NaN or infinity, or are none of the choices.
            ResetNeeded: a chain has not started, or has ended and waits for its reset.
        """
        chains, every = self._chains, np.ones(self.num_envs, bool)
        anew = self._anew()
        reward, terminated, truncated = chains.advance(as_action(actions, self.action_space), ~anew)
        chains.begin(anew, {})
        observation, info = chains.seen()
        info = _masked(info, every)
        ended = chains.over.copy()
        if self.autoreset_mode == AutoresetMode.SAME_STEP and ended.any():
            last = np.full(self.num_envs, None, object)
            for row in np.flatnonzero(ended).tolist():
                last[row] = _observed(observation, self.single_observation_space, row)
            final = {"final_obs": last, "final_info": _masked(_only(chains.seen()[1], ended), ended)}
            chains.begin(ended, {})
            observation, info = chains.seen()
            info = _masked(info, every) | _masked(final, ended)
        return observation, reward, terminated, truncated, info

    def _anew(self) -> Mask:
        """Which chains start anew at the next step."""
        return self._chains.over & self._chains.started & (self.autoreset_mode == AutoresetMode.NEXT_STEP)

    def render(self) -> tuple[Array, ...]:
        """A picture of each chain, uint8 [H, W, 3]; see `diffrl.envs.drawing`.

        Raises:
            ResetNeeded: a chain has not started.
            ValueError: the environment was made without render_mode="rgb_array".
        """
        return self._chains.frames()


def _observed(observation: Observation, space: Any, row: int = 0) -> Observation:
    """What one chain shows: a label as a number, which Discrete takes, a single number of a Box as an array."""
    return {
        key: array[row] if isinstance(space[key], spaces.Discrete) else array[row, ...]
        for key, array in observation.items()
    }


def _told(infos: Info, row: int = 0) -> Info:
    """The infos of one chain."""
    return {key: array[row] for key, array in infos.items()}


def _masked(info: Info, mask: Mask) -> Info:
    """Beside each entry, which chains have it, as Gymnasium's vector infos say it: `_index` for `index`."""
    return info | {f"_{key}": mask.copy() for key in info}


def _only(info: Info, mask: Mask) -> Info:
    """Infos with zeros for the chains that are not in the mask."""
    return {
        key: np.where(mask.reshape(-1, *[1] * (a.ndim - 1)), a, np.zeros_like(a)) for key, a in info.items()
    }


def _mode(given: AutoresetMode | str) -> AutoresetMode:
    try:
        return AutoresetMode(given)
    except ValueError as error:
        names = ", ".join(repr(mode.value) for mode in AutoresetMode)
        raise InputError(f"autoreset_mode is {given!r}: choose from {names}") from error


def _known(options: Mapping[str, Any] | None, names: Sequence[str]) -> dict[str, Array]:
    """The options of a reset as arrays; one of another name is refused."""
    if options is not None and not isinstance(options, Mapping):
        raise InputTypeError(f"options is {options!r}: give a dict with some of {', '.join(names)}")
    for key in options or {}:
        if key not in names:
            raise InputError(f"options has no {key!r}: choose from {', '.join(names)}")
    return {key: np.asarray(value) for key, value in (options or {}).items()}


def _mask(given: Array | None, n: int) -> Mask:
    """Which of n chains start: all of them if no mask is given."""
    mask = np.ones(n, bool) if given is None else given
    if mask.shape != (n,) or mask.dtype != np.bool_:
        raise InputError(f"reset_mask is {mask.dtype} {mask.shape}: give a bool array of shape ({n},)")
    return mask
