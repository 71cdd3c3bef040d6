"""Chains behind the Gymnasium environments: which run, which have ended, and their streams of random numbers."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from gymnasium.error import ResetNeeded
from gymnasium.utils import seeding
from numpy.typing import NDArray
from torch import Generator, Tensor

from diffrl.diffusion.laws import NoiseFn
from diffrl.diffusion.samplers.base import Noise
from diffrl.envs.arguments import fresh_noise, require_callable
from diffrl.envs.drawing import Picture
from diffrl.errors import InputError

__all__ = ["Array", "Chains", "Info", "Mask", "Observation", "Outcome", "Streams", "copied"]

Array = NDArray[Any]
Mask = NDArray[np.bool_]
Observation = dict[str, Array]
Info = dict[str, Any]
Outcome = tuple[Observation, Any, bool, bool, Info]


class Streams:
    """Random numbers of n chains: one stream for all of them, or one for each.

    Args:
        n: how many chains.
        noise: standard normal numbers for a tensor, in place of the streams'.
    """

    def __init__(self, n: int, noise: NoiseFn | None) -> None:
        require_callable("noise", noise, "that gives standard normal numbers for a tensor")
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
        if len(rows) == 0:
            return x
        if self.given is not None:
            return fresh_noise(self.given, x.clone())  # which a source may change
        g = self.generators  # of the CPU, wherever states live
        if self.shared:
            return torch.randn(x.shape, generator=g[0], dtype=x.dtype).to(x.device)
        blank = torch.empty(x.shape, dtype=x.dtype)
        return Noise([g[row] for row in rows.tolist()])(blank).to(x.device)


class Chains(ABC):
    """n chains as tensors. The arrays that it hands out are copies, which the caller may change.

    Args:
        n: how many chains.
        noise: standard normal numbers for a tensor, in place of the streams'.
        device: where states live.
        picture: draws the chains; None: no rendering.
        plain: whether there is one, on the CPU, and `step_one` is to step it.
    """

    def __init__(
        self, n: int, noise: NoiseFn | None, device: torch.device, picture: Picture | None, *, plain: bool
    ) -> None:
        self.plain = plain and device.type == "cpu"
        self.streams, self.rows, self.picture = Streams(n, noise), torch.arange(n, device=device), picture
        self.over = np.ones(n, bool)
        """Which chains have ended, or have not started yet: bool [n]."""
        self.started = np.zeros(n, bool)
        """Which chains have started at some time: bool [n]."""

    @abstractmethod
    def reset(self, rows: Tensor, given: Mapping[str, Array]) -> None:
        """Start the chains `rows`, int64 [R], as the options [n, ...] of a reset say."""

    @abstractmethod
    def step(self, action: Array, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Step the chains `rows`, int64 [R]; the others stay.

        Args:
            action: of all chains, [n, ...].
            rows: which ones step.

        Returns:
            Rewards [R, ...] and the flags terminated and truncated [R].
        """

    @abstractmethod
    def step_one(self, action: Array) -> Outcome:
        """Step the only chain in plain numbers, where `plain`; nothing has a leading dim."""

    @abstractmethod
    def seen(self) -> tuple[Observation, Info]:
        """Observations and infos of all chains."""

    @abstractmethod
    def position(self) -> tuple[Tensor, Tensor]:
        """Index [n] and latent [n, *E] of each chain."""

    def begin(self, mask: Mask, given: Mapping[str, Array]) -> None:
        """Start the chains of the mask, bool [n], as the options [n, ...] of a reset say."""
        if not mask.any():
            return
        self.reset(self.rows[torch.from_numpy(mask)], given)
        self.over[mask], self.started[mask] = False, True
        if self.picture is not None:
            self.picture.start(*self.position(), mask)

    def advance(self, action: Array, mask: Mask) -> tuple[Array, Array, Array]:
        """Step the chains of the mask, bool [n]; the others stay and are paid 0.

        Args:
            action: of all chains, [n, ...].
            mask: which ones step; they must be running.

        Returns:
            Rewards [n, ...] and the flags terminated and truncated [n].
        """
        self.require_running(mask)
        stepped = [copied(column) for column in self.step(action, self.rows[torch.from_numpy(mask)])]
        reward, terminated, truncated = (np.zeros((len(mask), *c.shape[1:]), c.dtype) for c in stepped)
        reward[mask], terminated[mask], truncated[mask] = stepped
        self.over[mask] = terminated[mask] | truncated[mask]
        if self.picture is not None:
            self.picture.follow(*self.position())
        return reward, terminated, truncated

    def advance_one(self, action: Array) -> Outcome:
        """Step the only chain, where `plain`: what a Gymnasium environment returns."""
        if self.over[0]:
            self.require_running(np.ones(1, bool))
        outcome = self.step_one(action)
        self.over[0] = outcome[2] or outcome[3]
        if self.picture is not None:
            self.picture.follow(*self.position())
        return outcome

    def require_running(self, mask: Mask) -> None:
        """Refuse to go on unless every chain of the mask, bool [n], runs.

        Raises:
            ResetNeeded: one of them has ended, or has not started.
        """
        if (stopped := self.over & mask).any():
            ended = np.flatnonzero(stopped).tolist()
            raise ResetNeeded(f"chains {ended} of {len(self.over)} are not running: call reset() first")

    def frames(self) -> tuple[Array, ...]:
        """A picture of each chain, uint8 [H, W, 3].

        Raises:
            ResetNeeded: one of them has not started.
            ValueError: the environment was made without rendering.
        """
        if self.picture is None:
            raise InputError("render_mode is None: make the environment with render_mode='rgb_array'")
        if not self.started.all():
            raise ResetNeeded("there is nothing to render: call reset() first")
        return self.picture.frames()


def copied(x: Tensor) -> Array:
    """The numbers of a tensor, as an array that shares no memory with it."""
    return x.cpu().numpy().copy()
