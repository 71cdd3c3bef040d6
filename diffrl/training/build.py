"""From a configuration's names and numbers to objects, through the registry of each module."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, runtime_checkable

import torch
from tensordict import TensorDict
from torch import Generator, Tensor, nn

from diffrl.data.dataset_all import DATASETS, Data
from diffrl.diffusion.chains import Chain
from diffrl.diffusion.denoisers import Denoiser, EmpiricalDenoiser, MixtureDenoiser
from diffrl.diffusion.networks import NETWORKS
from diffrl.diffusion.samplers.loop import SAMPLERS, Sampler
from diffrl.diffusion.schedules.all import PROCESSES, Schedule
from diffrl.diffusion.starts import STARTS, Starts, UniformStarts
from diffrl.diffusion.trajectories import ChainSampler
from diffrl.objectives.denoiser_loss import DenoiserLoss
from diffrl.objectives.schemes import OBJECTIVES
from diffrl.objectives.value import ValueLoss

__all__ = [
    "Adaptive",
    "Draw",
    "Objective",
    "Progressive",
    "accepted",
    "build_data",
    "build_denoiser",
    "build_objective",
    "build_oracle",
    "build_sampler",
    "named",
]

Config = Mapping[str, Any]


class Draw(Protocol):
    """Draws the states that a loss is fed with."""

    def __call__(self, x0: Tensor, *, cond: Tensor | None, generator: Generator) -> TensorDict:
        """States of clean data x0 [B, *E]."""
        ...


@runtime_checkable
class Progressive(Protocol):
    """A `Draw` that changes along the training; where that stands is all it depends on, so resuming is exact.

    It may bring `target_decay`, the decay of the target network after the present step.
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
    loss: ValueLoss | DenoiserLoss
    draw: Draw

    def set_progress(self, step: int, grad_steps: int) -> None:
        """Tell a `Progressive` draw where the training stands; to be called before every step."""
        if isinstance(self.draw, Progressive):
            self.draw.set_progress(step, grad_steps)

    @property
    def target_decay(self) -> float | None:
        """The decay of the target network that the draw brings, if it does."""
        return getattr(self.draw, "target_decay", None)


def build_data(config: Config) -> Data:
    """The data set of ``config["data"]``."""
    return named(DATASETS, config["data"])


def build_process(config: Config) -> Schedule:
    """The process of ``config["process"]``."""
    return named(PROCESSES, config["process"])


def build_sampler(config: Config) -> Sampler:
    """The sampler of ``config["sampler"]``."""
    return named(SAMPLERS, config["sampler"])


def build_denoiser(config: Config, data: Data) -> Denoiser:
    """A fresh denoiser, its weights drawn from ``config["seed"]``; the global generator stays as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config["seed"])
        network: nn.Module = named(
            NETWORKS, config["network"], event_shape=data.event_shape, num_classes=data.num_classes
        )
    return Denoiser(network, build_process(config), **config["denoiser"])


def build_objective(config: Config, denoiser: Denoiser, *, baseline: bool = False) -> Objective:
    """The objective of ``config["objective"]`` on the chain of ``config["chain"]``.

    Args:
        config: the configuration.
        denoiser: what is trained.
        baseline: Monte Carlo instead, with the same weight on the same states.

    Raises:
        ValueError: an option outside its range, or options that contradict each other.
    """
    options = dict(config["objective"])
    name = options.pop("name")
    if options.get("lmbda") is not None and options.get("n_steps") is not None:
        raise ValueError(
            f"objective.lmbda={options['lmbda']} and objective.n_steps={options['n_steps']} are two families "
            "of targets: set one of them to null"
        )
    scheme = OBJECTIVES[name]
    starts: Starts = named(STARTS, config["starts"])
    draw: Draw
    if scheme.draw is not None:
        make = partial(scheme.draw, denoiser.process, **accepted(scheme.draw, options))
        draw = make() if inspect.isclass(scheme.draw) else make
        if not isinstance(starts, UniformStarts):
            raise ValueError(f"objective {name} draws its states without a chain: set starts=uniform")
    else:
        chain = Chain(denoiser.process, **accepted(Chain, config["chain"]))
        draw = ChainSampler(chain, **accepted(ChainSampler, config["chain"]), starts=starts)
    if baseline:
        name, scheme = "monte_carlo", OBJECTIVES["monte_carlo"]
    return Objective(name, scheme.loss(denoiser, **accepted(scheme.loss, options)), draw)


def build_oracle(data: Data, process: Schedule) -> MixtureDenoiser | None:
    """The exact denoiser of the data: of its law, or of its training points; None if neither is at hand."""
    if data.mixture is not None:
        m = data.mixture
        return MixtureDenoiser(process, m.means, m.stds, m.weights)
    return None if data.train is None else EmpiricalDenoiser(process, data.train)


def named(registry: Mapping[str, Callable[..., Any]], config: Config, **more: Any) -> Any:  # noqa: ANN401
    """What a registry makes of a configuration: its ``name``, called with the other entries and `more`."""
    options = dict(config)
    return registry[options.pop("name")](**more, **options)


def accepted(function: Callable[..., Any], options: Config) -> dict[str, Any]:
    """The options that `function` has parameters for."""
    names = inspect.signature(function).parameters
    return {k: v for k, v in options.items() if k in names}
