"""What the Gymnasium environments share: resets and seeds, arguments given by name, streams of random numbers."""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, TypeVar

import gymnasium
import numpy as np
import torch
from gymnasium.error import ResetNeeded
from gymnasium.utils import seeding
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray
from torch import Generator, Tensor

from diffrl.diffusion.laws import NoiseFn
from diffrl.diffusion.samplers.base import Noise
from diffrl.errors import InputError, InputTypeError

__all__ = [
    "Array",
    "Chains",
    "Info",
    "Observation",
    "SingleChainEnv",
    "Streams",
    "VectorChainEnv",
    "copied",
    "named",
]

Array = NDArray[Any]
Observation = dict[str, Array]
Info = dict[str, Any]
Action = TypeVar("Action")
Single = TypeVar("Single", bound="SingleChainEnv[Any]")


class Streams:
    """Random numbers of n chains: one stream for all of them, or one for each.

    Args:
        n: how many chains.
        noise: standard normal numbers for a tensor, in place of the streams'.
    """

    def __init__(self, n: int, noise: NoiseFn | None) -> None:
        self.n, self.given = n, noise
        self.generators: list[Generator] = []

    @property
    def shared(self) -> bool:
        """Whether one stream serves all chains."""
        return len(self.generators) == 1

    def seed(self, sources: Sequence[np.random.Generator]) -> None:
        """Seed the streams by numbers drawn from one source, or from one for each chain."""
        self.generators = [Generator().manual_seed(int(rng.integers(2**63))) for rng in sources]

    def seed_each(self, seeds: Sequence[int | None]) -> None:
        """Give each chain a stream with a seed of its own.

        Raises:
            ValueError: another number of seeds than of chains.
        """
        if len(seeds) != self.n:
            raise InputError(
                f"there are {len(seeds)} seeds for {self.n} chains: give one for each, or a number"
            )
        self.seed([seeding.np_random(s)[0] for s in seeds])

    def follow(self, rng: np.random.Generator, seed: int | None) -> None:
        """Seed one stream for all by the environment's generator, if a seed was given or there is no stream yet."""
        if seed is not None or not self.generators:
            self.seed([rng])

    def noise(self, x: Tensor, rows: Tensor) -> Tensor:
        """Standard normal numbers for x [R, *E], which belong to the chains `rows`, int64 [R]."""
        if self.given is not None:
            return self.given(x)
        g = self.generators
        return Noise(g[0] if self.shared else [g[row] for row in rows.tolist()])(x)


class Chains(ABC):
    """n chains as tensors. The arrays that it hands out are copies, which the caller may change.

    Args:
        n: how many chains.
        noise: standard normal numbers for a tensor, in place of the streams'.
    """

    def __init__(self, n: int, noise: NoiseFn | None) -> None:
        self.streams, self.rows = Streams(n, noise), torch.arange(n)
        self.over = np.ones(n, bool)
        """Which chains have ended, or have not started yet: bool [n]."""

    @abstractmethod
    def reset(self, mask: NDArray[np.bool_], given: Mapping[str, Array]) -> None:
        """Start the chains of the mask, bool [n], as the options [n, ...] of a reset say."""

    @abstractmethod
    def seen(self) -> tuple[Observation, Info]:
        """Observations and infos of all chains."""

    def require_running(self) -> None:
        """Refuse a step unless every chain runs.

        Raises:
            ResetNeeded: a chain has ended, or has not started.
        """
        if self.over.any():
            ended = np.flatnonzero(self.over).tolist()
            raise ResetNeeded(f"chains {ended} of {len(self.over)} are not running: call reset() first")


class SingleChainEnv(gymnasium.Env[Observation, Action]):
    """One chain: a subclass makes `_chains`, its spaces and its `step`."""

    options: ClassVar[tuple[str, ...]]
    """Names of the options of a reset; the class docstring says what they do."""
    metadata: dict[str, Any] = {"render_modes": []}
    _chains: Chains

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
        given = {k: np.asarray(v)[None] for k, v in _known(options, self.options).items()}
        self._chains.reset(np.ones(1, bool), given)
        observation, info = self._chains.seen()
        return _first(observation), _first(info)

    def _stepped(
        self, stepped: tuple[Observation, Array, Array, Array, Info]
    ) -> tuple[Observation, Any, bool, bool, Info]:
        """What a step of the one chain gave, without the leading dim."""
        observation, reward, terminated, truncated, info = stepped
        return _first(observation), reward[0], bool(terminated[0]), bool(truncated[0]), _first(info)


class VectorChainEnv(VectorEnv[Observation, Array, Array]):
    """Many chains at once: a subclass makes `_chains` and its `step`."""

    _chains: Chains

    def _adopt(
        self, make: Callable[..., Single], num_envs: int, max_steps: int | None, variant: Mapping[str, Any]
    ) -> Single:
        """Take the spaces of the single environment that `make` builds from the keywords, and return it."""
        if num_envs < 1:
            raise InputError(f"num_envs is {num_envs}: give at least one")
        cut: dict[str, Any] = {} if max_steps is None else {"max_steps": max_steps}
        single = make(**cut, **variant)
        self.num_envs, self._options = num_envs, (*single.options, "reset_mask")
        self.autoreset_mode = AutoresetMode.DISABLED
        self.metadata = {"render_modes": [], "autoreset_mode": self.autoreset_mode}
        self.single_observation_space = single.observation_space
        self.single_action_space = single.action_space
        self.observation_space = batch_space(single.observation_space, num_envs)
        self.action_space = batch_space(single.action_space, num_envs)
        return single

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
        given = {k: np.asarray(v) for k, v in _known(options, self._options).items()}
        self._chains.reset(_mask(given.pop("reset_mask", None), self.num_envs), given)
        return self._chains.seen()


def copied(x: Tensor) -> Array:
    """The numbers of a tensor, as an array that shares no memory with it."""
    return x.numpy().copy()


def named(
    kind: str, registry: Mapping[str, Callable[..., Any]], choice: Any, kwargs: Mapping[str, Any] | None
) -> Any:
    """The object that a name of the registry stands for, built with kwargs; an object is returned as it is.

    Args:
        kind: what to call it in an error.
        registry: name → constructor.
        choice: a name, or an object.
        kwargs: keywords of the constructor.

    Raises:
        TypeError: a keyword that the constructor does not have.
        ValueError: an unknown name, or keywords beside an object.
    """
    if not isinstance(choice, str):
        if kwargs:
            raise InputError(f"{kind}_kwargs goes with a name, but {kind} is an object already")
        return choice
    if choice not in registry:
        raise InputError(f"{kind} is {choice!r}: choose from {', '.join(sorted(registry))}")
    known = inspect.signature(registry[choice]).parameters
    for key in kwargs or {}:
        if key not in known:
            raise InputTypeError(f"{kind}_kwargs has no {key!r}: {choice!r} takes {', '.join(known)}")
    return registry[choice](**(kwargs or {}))


def _first(arrays: Mapping[str, Array]) -> dict[str, Any]:
    """The entries of the first chain."""
    return {key: array[0] for key, array in arrays.items()}


def _known(options: Mapping[str, Any] | None, names: Sequence[str]) -> dict[str, Any]:
    """The options of a reset; one of another name is refused."""
    for key in options or {}:
        if key not in names:
            raise InputError(f"options has no {key!r}: choose from {', '.join(names)}")
    return dict(options or {})


def _mask(given: Array | None, n: int) -> NDArray[np.bool_]:
    """Which of n chains start: all of them if no mask is given."""
    mask = np.ones(n, bool) if given is None else given
    if mask.shape != (n,) or mask.dtype != np.bool_:
        raise InputError(f"reset_mask is {mask.dtype} {mask.shape}: give a bool array of shape ({n},)")
    return mask
