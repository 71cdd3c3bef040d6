"""What a configuration trains by: the loss of its objective, and what draws the states that the loss is fed with."""

import inspect
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, runtime_checkable

from tensordict import TensorDict
from torch import Generator, Tensor

from diffrl.diffusion.chains import Chain
from diffrl.diffusion.denoisers import Denoiser
from diffrl.diffusion.starts import STARTS, Starts, UniformStarts
from diffrl.diffusion.trajectories import ChainSampler
from diffrl.errors import InputError, of_group
from diffrl.objectives.denoiser_loss import DenoiserLoss
from diffrl.objectives.registry import OBJECTIVES
from diffrl.registry import Config, Entry, accepted

__all__ = ["Adaptive", "Draw", "Objective", "Progressive", "build_objective"]


class Draw(Protocol):
    """Draws the states that a loss is fed with."""

    def __call__(self, x0: Tensor, *, cond: Tensor | None, generator: Generator) -> TensorDict:
        """States of clean data x0 [B, *E]."""
        ...


@runtime_checkable
class Progressive(Protocol):
    """A `Draw` or a loss that changes along the training; where that stands is all it depends on: resuming is exact.

    A draw may bring `target_decay`, the decay of the target network after the present step.
    """

    def set_progress(self, step: int, grad_steps: int) -> None:
        """Stand at gradient step `step`, counted from 0, of `grad_steps`."""
        ...


@runtime_checkable
class Adaptive(Protocol):
    """A `Draw` that learns from the losses of the states that it drew, and is saved with the training."""

    def update(self, states: TensorDict) -> None:
        """Learn from states in which the loss has left its losses."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """All that was learnt: tensors and numbers."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`."""
        ...


@dataclass(frozen=True)
class Objective:
    """A way to train: a loss, and what draws the states it is fed with."""

    name: str
    loss: DenoiserLoss
    draw: Draw

    def set_progress(self, step: int, grad_steps: int) -> None:
        """Tell draw and loss, where they are `Progressive`, where the training stands; before every step."""
        for part in (self.draw, self.loss):
            if isinstance(part, Progressive):
                part.set_progress(step, grad_steps)

    @property
    def target_decay(self) -> float | None:
        """The decay of the target network that the draw brings, if it does."""
        return getattr(self.draw, "target_decay", None)


def build_objective(config: Config, denoiser: Denoiser, *, baseline: bool = False) -> Objective:
    """The objective of ``config["objective"]``, on the chains of ``config["chain"]`` unless it draws its own states.

    Args:
        config: the configuration of a training run.
        denoiser: what is trained.
        baseline: Monte Carlo instead, with the same weight on the same states.

    Raises:
        ValueError: an option outside its range, or options that contradict each other.
    """
    options = dict(config["objective"])
    entry = OBJECTIVES.entry(options.pop("name"))
    draw = _draw(entry, options, config, denoiser)
    if baseline:
        entry = OBJECTIVES.entry("monte_carlo")
    with of_group("objective", options):
        loss = entry.make(denoiser, **accepted(entry.make, options))
    return Objective(entry.name, loss, draw)


def _draw(entry: Entry, options: Config, config: Config, denoiser: Denoiser) -> Draw:
    """What draws the states of an objective: a sampler of its own, or one of chains."""
    starts: Starts = STARTS.build(config["starts"])
    if entry.also is None:
        with of_group("chain", config["chain"]):
            chain = Chain(denoiser.process, **accepted(Chain, config["chain"]))
            return ChainSampler(chain, **accepted(ChainSampler, config["chain"]), starts=starts)
    if not isinstance(starts, UniformStarts):
        raise InputError(f"objective {entry.name} draws its states without a chain: set starts=uniform")
    make = partial(entry.also, denoiser.process, **accepted(entry.also, options))
    with of_group("objective", options):
        return make() if inspect.isclass(entry.also) else make
