"""Training a denoiser: draw states, descend the loss, move averages and target networks."""

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from tensordict import TensorDict
from torch import Generator, Tensor

from diffrl.data.dataset import Data
from diffrl.errors import InputError
from diffrl.objectives.denoiser_loss import DenoiserLoss
from diffrl.objectives.fused import FusedStep
from diffrl.objectives.scheme import Adaptive, Objective
from diffrl.objectives.soft_update import SoftUpdate
from diffrl.objectives.stand_ins import StandIn, StandInChains
from diffrl.objectives.td_adaptive import AdaptiveLoss
from diffrl.ranges import at_least_one
from diffrl.training.arithmetic import Arithmetic
from diffrl.training.augmenting import check_augmentable
from diffrl.training.batches import Batches
from diffrl.training.checkpoints import Checkpoint, CheckpointError
from diffrl.training.distributed import ALONE, Ranks
from diffrl.training.dropout import has_dropout, seeded
from diffrl.training.ema import Average
from diffrl.training.identity import Facts, flat
from diffrl.training.loop import Loop, step_generator
from diffrl.training.loss_scale import LossScale
from diffrl.training.optim import Optim, Optimiser
from diffrl.training.sharding import Sharding, part_of, require_shardable
from diffrl.training.shares import Gradients
from diffrl.training.target import Target, target_updater
from diffrl.training.trials import Trials, held_out

__all__ = ["Average", "Length", "Target", "Trainer"]


@dataclass(frozen=True)
class Length:
    """How long to train, and how often to look and to save.

    Args:
        grad_steps: gradient steps in all.
        batch_size: data per step; the states trained on are this times those of a chain.
        report_every: gradient steps between rows of metrics.csv.
        eval_every: gradient steps between evaluations.
        checkpoint_every: gradient steps between checkpoints.
        keep_checkpoints: how many of them stay.
        label_dropout: share of data whose label is replaced by the null label.
        augment: probability of each change of EDM's augmentation of images, which a network with
            network.augment_dim=9 is told of, see `diffrl.data.augmentation.augment`; 0: images stay as they are.
    """

    grad_steps: int = 2000
    batch_size: int = 32
    report_every: int = 50
    eval_every: int = 250
    checkpoint_every: int = 500
    keep_checkpoints: int = 2
    label_dropout: float = 0.1
    augment: float = 0.0

    def __post_init__(self) -> None:
        shares = ("label_dropout", "augment")
        at_least_one("trainer", {k: v for k, v in vars(self).items() if k not in shares})
        for name in shares:
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"trainer.{name} is {getattr(self, name)}: it is a share in [0, 1]")

    @property
    def total(self) -> int:
        """Steps in all."""
        return self.grad_steps


class Trainer(Loop):
    """Trains one objective: `steps` yields after each gradient step, `fit` runs to the end.

    Args:
        objective: the loss and what draws its states.
        data: batches of clean data.
        seed: of data order and noise, see `step_generator`.
        folder: for checkpoints; None keeps none.
        length: steps, batch size, and how often to report, evaluate and save.
        optim: optimiser and learning rate.
        average: the weights that are evaluated.
        target: how a target network follows.
        device: where to train.
        autocast: dtype for the network's arithmetic, e.g. torch.bfloat16; values stay in float32. With torch.float16,
            on a CPU only, gradients have a `LossScale`.
        arithmetic: how a step is computed; None is all of it at once, as it is.
        identity: what else a checkpoint belongs to, see `diffrl.training.identity`.
        ranks: the processes that share each batch, of `length.batch_size` data in all: each draws the whole of it, and
            takes the gradient of its rows, see `diffrl.training.shares`. Dropout is its own.

    Raises:
        NonFiniteLoss: from `steps`, where loss, gradient or weights are not finite; no such step is saved.
        WorkerLost: from `steps`, where a process that reads the data has died.
    """

    step_name: ClassVar[str] = "gradient step"
    total_key: ClassVar[str] = "trainer.grad_steps"
    length: Length
    sharding: Sharding | None = None
    """What the processes cut among them, from the first step on."""

    def __init__(
        self,
        objective: Objective,
        data: Data,
        *,
        seed: int,
        folder: Path | None,
        length: Length,
        optim: Optim,
        average: Average,
        target: Target,
        device: torch.device | str = "cpu",
        autocast: torch.dtype | None = None,
        arithmetic: Arithmetic | None = None,
        identity: Facts | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        super().__init__(
            length, folder=folder, seed=seed, device=device, autocast=autocast, identity=identity, ranks=ranks
        )
        scale = LossScale.of_run(autocast, self.device)
        self.options = {"optim": optim, "ema": average, "target": target}
        self.objective, self.loss, self.data = objective, objective.loss, data
        self.denoiser = self.loss.denoiser
        self.num_classes = int(getattr(self.denoiser.network, "num_classes", 0))
        self.has_dropout = has_dropout(self.denoiser)
        self.arithmetic = arithmetic or Arithmetic()
        self.arithmetic.prepare(self.loss, data.event_shape)
        self.averages = average.averages(self.denoiser)
        self.ema = self.averages["ema"]
        self.parameters = [p for p in self.denoiser.parameters() if p.requires_grad]
        self.optimiser = Optimiser(
            self.parameters, optim, length.grad_steps, vectorised=True, loss_scale=scale
        )
        self.target = target_updater(self.loss, target)
        self.adaptive = objective.draw if isinstance(objective.draw, Adaptive) else None
        factor = self.arithmetic.factor(data.event_shape, length.batch_size)
        self.gradients = Gradients(self.loss, self.optimiser, self.arithmetic, ranks, factor=factor)
        self.trials = None
        if self.arithmetic.sharded and ranks.size > 1:
            require_shardable(self.loss, self.arithmetic, scale)
        if isinstance(self.loss, AdaptiveLoss):
            self.data, held = held_out(data, seed)
            self.trials = Trials(self.loss, held, seed)
            if isinstance(objective.draw, StandInChains):
                objective.draw.refer_to(self.data)
        if length.augment:
            check_augmentable(self.denoiser, data.event_shape, objective)
        data.numbers(length.batch_size, step_generator(seed, 0))  # more than the data holds is refused here
        self.batches = Batches(self.data, seed, length, self.num_classes)

    @property
    def name(self) -> str:
        """The objective's."""
        return self.objective.name

    @property
    def figures(self) -> dict[str, float]:
        """Counts so far."""
        return {
            "grad_steps": self.step,
            "samples": self.step * self.length.batch_size,
            "network_evaluations": self.loss.network_evaluations,
            "seconds": round(self.seconds, 3),
        }

    @property
    def facts(self) -> dict[str, Any]:
        """Data, process, objective and options; the network's weights are the checkpoint's own."""
        groups = {group: vars(options) for group, options in self.options.items()}
        stand_in = getattr(self.objective.draw, "stand_in", StandIn())
        return {
            **super().facts,
            **flat(groups),
            "trainer.batch_size": self.length.batch_size,
            "trainer.label_dropout": self.length.label_dropout,
            **({"trainer.augment": self.length.augment} if self.length.augment else {}),
            **flat({"trainer": vars(self.arithmetic)}),
            "data.fingerprint": self.data.fingerprint,
            "data.event_shape": self.data.event_shape,
            "data.num_classes": self.data.num_classes,
            "data.classes": self.data.classes,
            "data.class_shares": self.data.class_shares,
            "data.title": self.data.name,
            "objective.name": self.name,
            **{f"objective.{name}": value for name, value in _options(self.loss).items()},
            **{f"objective.anneal.{name}": values for name, values in self.loss.anneal.items()},
            "chain": repr(getattr(self.objective.draw, "chain", None)),
            **{f"chain.{name}": value for name, value in vars(stand_in).items()},
            **({} if self.trials is None else flat({"objective": vars(self.trials.loss.plan)})),
            "denoiser.prediction_type": self.denoiser.prediction_type,
            "denoiser.sigma_data": self.denoiser.sigma_data,
            "process": repr(self.denoiser.process),
        }

    def _set_mode(self) -> None:
        self.denoiser.train()

    def _caption(self, row: dict[str, float], evaluated: dict[str, float]) -> str:
        error = ""
        for kind in ("map_error", "value_error"):
            if errors := [found for name, found in evaluated.items() if name.startswith(kind)]:
                error = f"{kind.replace('_', ' ')} {sum(errors) / len(errors):.3g}, "
        rate = row["samples"] / max(self.seconds, 1e-9)
        return f"loss {row['loss_value']:.3g}, {error}{rate:,.0f} samples/s"

    def batch(self, step: int) -> tuple[Tensor, Tensor | None, Generator]:
        """Data of a step, its labels, and the generator that the noise continues from, see `Batches`."""
        x0, labels, generator = self.batches(step)
        labels = None if labels is None else labels.to(self.device)
        dtype = next(iter(self.parameters)).dtype
        if self.device.type != "cpu":
            generator = step_generator(self.seed, step, self.device)
        return x0.to(self.device, dtype), labels, generator

    def steps(self) -> Iterator[dict[str, float]]:
        """As those of every loop; where the data have workers, they read ahead meanwhile."""
        with self.batches.ahead(self.step, self.length.total):
            yield from super().steps()

    def _advance(self) -> dict[str, float]:
        if self.trials is not None:
            self.trials.run(self)
        return self.train_on(self.step)

    def train_on(self, step: int) -> dict[str, float]:
        """One gradient step on the data and the noise of `step`; its figures.

        Raises:
            NonFiniteLoss: loss or gradient are not finite.
        """
        self.objective.set_progress(step, self.length.grad_steps)
        x0, labels, generator = self.batch(step)
        fused = self.objective.fused if self.arithmetic.accumulate == 1 and self.ranks.size == 1 else None
        if fused is not None:
            figures, states = self._descend_fused(fused, x0, labels, generator), None
        else:
            states = self.objective.draw(x0, cond=labels, generator=generator)
            figures = self._descend(states, generator)
        with self.ranks.answered():  # of parts, processes compute the norm together
            figures |= self.optimiser.step(figures["loss_value"])
        if self.target is not None:
            if isinstance(self.target, SoftUpdate) and self.objective.target_decay is not None:
                self.target.eps = self.objective.target_decay
            self.target.step()
        for average in self.averages.values():
            average.update(self.length.batch_size)
        if self.adaptive is not None and states is not None:
            self.adaptive.update(states)
        return figures

    @property
    def together(self) -> bool:
        """Where they have cut it."""
        return self.sharding is not None

    def _shard(self, states: TensorDict) -> None:
        """Cut what is trained among the processes; states [B, K] are those of a batch."""
        self.gradients.check(states)
        self.sharding = Sharding(
            self.denoiser, self.optimiser, self.averages, self.target, self.ranks, self.device
        )
        self.parameters = self.sharding.parameters
        self.optimiser = self.gradients.optimiser = self.sharding.optimiser
        self.gradients.sharding = self.sharding

    def _stored(self) -> Any:
        weights, training = self._state()
        if self.sharding is None:
            return weights, training, None
        return self.sharding.apart(weights, training)

    def _steps(self) -> Iterator[dict[str, float]]:
        yield from super()._steps()
        if self.sharding is not None:
            self.sharding.gather()

    def _evaluated(self, evaluate: Callable[[Self], dict[str, float]]) -> dict[str, float] | None:
        with nullcontext() if self.sharding is None else self.sharding.gathered():
            return super()._evaluated(evaluate)

    def _descend(self, states: TensorDict, generator: Generator) -> dict[str, float]:
        """Compute the gradient on states [B, K]; their loss and TD error."""
        if self.arithmetic.sharded and self.ranks.size > 1 and self.sharding is None:
            self._shard(states)
        learning = self.adaptive is not None and bool(
            self.adaptive.state_dict()
        )  # uniform starts have no state
        return self.gradients(states, partial(self._around, generator), learning=learning)

    def _descend_fused(
        self, step: FusedStep, x0: Tensor, labels: Tensor | None, generator: Generator
    ) -> dict[str, float]:
        """The same by a fused step, of the whole batch at once."""
        loss_value, td_error = step(
            x0, cond=labels, generator=generator, around=partial(self._around, generator)
        )
        self.optimiser.backward(loss_value, self.gradients.factor)
        return {"loss_value": loss_value.item(), "td_error": td_error.item()}

    @contextmanager
    def _around(self, generator: Generator) -> Iterator[None]:
        """The precision of the loss, and its dropout."""
        dropout = seeded(generator, self.ranks.rank) if self.has_dropout else nullcontext()
        with self.precision(), dropout:
            yield

    def remember(self) -> Callable[[], None]:
        """A function that brings all that is trained back to where it is now; evaluations stay counted."""
        weights, training = copy.deepcopy(self._state())
        sets = {name: dict(tensors) for name, tensors in weights.items()}
        now = Checkpoint(self.step, sets, training, versions={}, identity={})

        def back() -> None:
            spent = self.loss.network_evaluations
            self._restore(copy.deepcopy(now), Path())
            self.loss.network_evaluations = spent

        return back

    def save(self) -> Path:
        """Write a checkpoint of this step.

        Raises:
            NonFiniteLoss: the weights are not finite any more.
        """
        finite = all(bool(part_of(p).isfinite().all()) for p in self.parameters)
        if self.ranks.any(not finite) if self.together else not finite:
            raise self.not_finite("weights that are not finite")
        return super().save()

    def _state(self) -> tuple[dict[str, Mapping[str, Tensor]], dict[str, Any]]:
        weights: dict[str, Mapping[str, Tensor]] = {
            "model": self.denoiser.state_dict(),
            **{name: average.module.state_dict() for name, average in self.averages.items()},
        }
        if self.target is not None:
            weights["target"] = {k: v for k, v in self.loss.state_dict().items() if k.startswith("target_")}
        training = {
            "optimiser": self.optimiser.state_dict(),
            "target": {} if self.target is None else self.target.state_dict(),
            "network_evaluations": self.loss.network_evaluations,
            "ema_samples": self.ema.samples,
        }
        if self.optimiser.loss_scale is not None:
            training["loss_scale"] = self.optimiser.loss_scale.state_dict()
        if self.adaptive is not None:
            training["draw"] = self.adaptive.state_dict()
        if self.trials is not None:
            training["trials"] = self.trials.state_dict()
        return weights, training

    def _restore(self, checkpoint: Checkpoint, path: Path) -> None:
        weights, training = checkpoint.weights, checkpoint.training
        try:
            self.denoiser.load_state_dict(weights["model"])
        except RuntimeError as error:
            reason = " ".join(str(error).split())
            raise CheckpointError(f"checkpoint {path} is of another network: {reason}") from error
        for name, average in self.averages.items():
            average.load_state_dict({"samples": training["ema_samples"], "module": weights[name]})
        if self.target is not None:
            self.loss.load_state_dict(weights["target"], strict=False)
            self.target.load_state_dict(training["target"])
        self.optimiser.load_state_dict(training["optimiser"], checkpoint.step)
        if self.optimiser.loss_scale is not None:
            self.optimiser.loss_scale.load_state_dict(training["loss_scale"])
        if self.adaptive is not None:
            self.adaptive.load_state_dict(training["draw"])
        if self.trials is not None:
            self.trials.load_state_dict(training["trials"])
        self.loss.network_evaluations = training["network_evaluations"]


def _options(loss: DenoiserLoss) -> dict[str, Any]:
    """The options of a loss that it or its estimator keeps under their own names, where they are plain and stay."""
    homes = (loss, getattr(loss, "_value_estimator", None))  # the property would make one
    kinds = [kind for kind in type(loss).__mro__ if issubclass(kind, DenoiserLoss)]  # one may hand options on
    found = {
        name: getattr(home, name)
        for name in dict.fromkeys(name for kind in kinds for name in inspect.signature(kind).parameters)
        for home in homes
        if hasattr(home, name) and name not in loss.moving
    }
    return {name: value for name, value in found.items() if isinstance(value, bool | int | float | str)}
