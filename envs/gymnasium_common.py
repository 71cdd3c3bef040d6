"""What the Gymnasium environments share: arguments by name, streams of random numbers, arrays that leave them."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from gymnasium.utils import seeding
from numpy.typing import NDArray
from torch import Generator, Tensor

from diffrl.diffusion.laws import NoiseFn
from diffrl.diffusion.samplers.base import Noise

__all__ = [
    "Array",
    "Info",
    "Observation",
    "Streams",
    "copied",
    "first",
    "known_options",
    "named",
    "reset_mask",
]

Array = NDArray[Any]
Observation = dict[str, Array]
Info = dict[str, Any]


class Streams:
    """Random numbers of n chains: one stream for all, or one for each chain.

    Args:
        n: the chains.
        noise: standard normal numbers for a tensor, in place of the streams'.
    """

    def __init__(self, n: int, noise: NoiseFn | None) -> None:
        self.n, self.given = n, noise
        self.generators: list[Generator] = []

    @property
    def shared(self) -> bool:
        """Whether all chains have one stream."""
        return len(self.generators) == 1

    def seed(self, sources: Sequence[np.random.Generator]) -> None:
        """Start the streams by numbers from one source, or from one for each chain."""
        self.generators = [Generator().manual_seed(int(rng.integers(2**63))) for rng in sources]

    def seed_each(self, seeds: Sequence[int | None]) -> None:
        """Start a stream for each chain.

        Raises:
            ValueError: another number of seeds than of chains.
        """
        if len(seeds) != self.n:
            raise ValueError(
                f"there are {len(seeds)} seeds for {self.n} chains: give one for each, or a number"
            )
        self.seed([seeding.np_random(s)[0] for s in seeds])

    def noise(self, x: Tensor, rows: Tensor) -> Tensor:
        """Standard normal numbers for x [R, *E], the chains of these rows."""
        if self.given is not None:
            return self.given(x)
        g = self.generators
        return Noise(g[0] if self.shared else [g[row] for row in rows.tolist()])(x)


def copied(x: Tensor) -> Array:
    """An array of its own."""
    return x.numpy().copy()


def first(arrays: Mapping[str, Array]) -> dict[str, Any]:
    """The first chain's entries."""
    return {key: array[0] for key, array in arrays.items()}


def known_options(options: Mapping[str, Any] | None, *names: str) -> dict[str, Any]:
    """The options of a reset, refused if one has another name."""
    for key in options or {}:
        if key not in names:
            raise ValueError(f"options has no {key!r}: choose from {', '.join(names)}")
    return dict(options or {})


def named(
    kind: str, registry: Mapping[str, Callable[..., Any]], choice: Any, kwargs: Mapping[str, Any] | None
) -> Any:
    """What a name stands for, built with kwargs; an object is taken as it is."""
    if not isinstance(choice, str):
        if kwargs:
            raise ValueError(f"{kind}_kwargs goes with a name, but {kind} is an object already")
        return choice
    if choice not in registry:
        raise ValueError(f"{kind} is {choice!r}: choose from {', '.join(sorted(registry))}")
    known = inspect.signature(registry[choice]).parameters
    for key in kwargs or {}:
        if key not in known:
            raise TypeError(f"{kind}_kwargs has no {key!r}: {choice!r} takes {', '.join(known)}")
    return registry[choice](**(kwargs or {}))


def reset_mask(given: Array | None, n: int) -> NDArray[np.bool_]:
    """Which of n chains start anew: all if not given."""
    mask = np.ones(n, bool) if given is None else given
    if mask.shape != (n,) or mask.dtype != np.bool_:
        raise ValueError(f"reset_mask is {mask.dtype} {mask.shape}: give a bool array of shape ({n},)")
    return mask
