"""What a configuration trains by: the loss of its objective, and what draws the states that the loss is fed with."""

import copy
from dataclasses import dataclass
from functools import cached_property, partial
from inspect import isclass, signature
from typing import Any, Protocol, runtime_checkable

from tensordict import TensorDict
from torch import Generator, Tensor

from diffrl.data.dataset import Data
from diffrl.diffusion.chains import Chain
from diffrl.diffusion.denoisers import Denoiser, DenoiserFn
from diffrl.diffusion.starts import STARTS, Starts, UniformStarts
from diffrl.diffusion.trajectories import ChainSampler
from diffrl.errors import InputError, of_group
from diffrl.objectives.denoiser_loss import DenoiserLoss
from diffrl.objectives.fused import FusedStep, fused
from diffrl.objectives.registry import OBJECTIVES
from diffrl.objectives.stand_ins import OverChains, StandIn, StandInChains
from diffrl.objectives.transitions import Transition
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
        for part in self._progressive:
            part.set_progress(step, grad_steps)

    @cached_property
    def _progressive(self) -> list[Progressive]:
        return [part for part in (self.draw, self.loss) if isinstance(part, Progressive)]

    @cached_property
    def _fused(self) -> FusedStep | None:
        return fused(self.loss, self.draw)

    @property
    def fused(self) -> FusedStep | None:
        """What takes the place of draw and loss in a step, to the same numbers; None: nothing does."""
        step = self._fused
        return step if step is not None and step.fits else None

    @property
    def target_decay(self) -> float | None:
        """The decay of the target network that the draw brings, if it does."""
        return getattr(self.draw, "target_decay", None)


def build_objective(
    config: Config,
    denoiser: Denoiser,
    *,
    data: Data | None = None,
    teacher: DenoiserFn | None = None,
    baseline: bool = False,
) -> Objective:
    """The objective of ``config["objective"]``, on the chains of ``config["chain"]`` unless it draws its own states.

    Args:
        config: the configuration of a training run.
        denoiser: what is trained, on the device where it will be.
        data: what it is trained on, for targets that look at more than the batch.
        teacher: the denoiser whose file the option `teacher` names; None: that option says it itself.
        baseline: Monte Carlo instead, with the same weight on the same states, and the datum itself as its target.

    Raises:
        ValueError: an option outside its range, or options that contradict each other.
    """
    options = dict(config["objective"])
    entry = OBJECTIVES.entry(options.pop("name"))
    if getattr(denoiser, "prior", None) is not None and not getattr(
        entry.also, "draws_noise_of_prior", False
    ):
        raise InputError(f"objective {entry.name} draws N(0, I): with denoiser.prior set objective=priorgrad")
    if teacher is not None:
        options["teacher"] = teacher
    with of_group("chain", config["chain"]):
        stand_in = StandIn(**accepted(StandIn, config["chain"]))
    if entry.also is None:
        draw: Draw = _chains(config, denoiser, data, stand_in)
    else:
        _require_datum(entry, stand_in)
        draw = _own_states(entry, options, config, denoiser, data)
    if baseline:
        draw = _as_drawn(draw)
        entry = OBJECTIVES.entry("monte_carlo")
    with of_group("objective", options):
        loss = entry.make(denoiser, **accepted(entry.make, options))
    if data is not None:  # which a prior standardises
        loss.data_std = data.sigma_data if getattr(denoiser, "prior", None) is None else 1.0
    if not getattr(loss, "takes_x0_mean", False):
        _require_datum(entry, stand_in)
    if stand_in.single and not baseline and not _looks_one_step_ahead(loss):
        raise InputError(
            f"chain.x0={stand_in.x0} makes steps of their own, along which there are no returns: set objective=td "
            "objective.lmbda=0, and anneal neither that nor n_steps"
        )
    return Objective(entry.name, loss, draw)


def _require_datum(entry: Entry, stand_in: StandIn) -> None:
    if stand_in.x0 != "datum":
        raise InputError(
            f"objective {entry.name} knows no stand-in for x0: set chain.x0=datum; docs/transition_sources.md says why"
        )


def _as_drawn(draw: Draw) -> Draw:
    """What draws the same states with the datum itself as their target."""
    if isinstance(draw, OverChains):
        return draw.sampler
    transition = getattr(draw, "transition", None)
    if isinstance(transition, Transition):
        draw = copy.copy(draw)
        draw.transition = Transition(transition.process)  # type: ignore[attr-defined]
    return draw


def _sampler(config: Config, denoiser: Denoiser) -> ChainSampler:
    starts: Starts = STARTS.build(config["starts"])
    with of_group("chain", config["chain"]):
        chain = Chain(denoiser.process, **accepted(Chain, config["chain"]))
        return ChainSampler(chain, **accepted(ChainSampler, config["chain"]), starts=starts)


def _chains(config: Config, denoiser: Denoiser, data: Data | None, stand_in: StandIn) -> Draw:
    """What draws chains, and what stands in for their data."""
    sampler = _sampler(config, denoiser)
    if stand_in.x0 == "datum":
        return sampler
    num_classes = int(getattr(denoiser.network, "num_classes", 0))
    device = next(denoiser.parameters()).device
    with of_group("chain", config["chain"]):
        return StandInChains(sampler, stand_in, data, num_classes=num_classes, device=device)


def _own_states(entry: Entry, options: Config, config: Config, denoiser: Denoiser, data: Data | None) -> Draw:
    """What draws the states of an objective that has a function or class of its own for it."""
    also = entry.also
    assert also is not None
    asked, supplied = signature(also).parameters, {"data": data, "denoiser": denoiser}
    more: dict[str, Any] = {name: value for name, value in supplied.items() if name in asked}
    if "sampler" in asked:
        more["sampler"] = _sampler(config, denoiser)
    elif not isinstance(STARTS.build(config["starts"]), UniformStarts):
        raise InputError(f"objective {entry.name} draws its states without a chain: set starts=uniform")
    make = partial(also, denoiser.process, **more, **accepted(also, options))
    with of_group("objective", options):
        return make() if isclass(also) else make


def _looks_one_step_ahead(loss: DenoiserLoss) -> bool:
    estimator = getattr(loss, "value_estimator", None)
    for name, one_step in (("lmbda", 0), ("n_steps", 1)):
        if set(loss.anneal.get(name, (getattr(estimator, name, None),))) == {one_step}:
            return True
    return False
