"""Trials of a λ within a training: some steps with each, a look at held-out data, and back to where they began."""

import copy
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from diffrl import keys
from diffrl.data.dataset import Data
from diffrl.diffusion.denoisers import Denoiser
from diffrl.objectives.chain_value import ChainValue
from diffrl.objectives.scheme import Objective
from diffrl.objectives.stand_ins import OverChains
from diffrl.objectives.td_adaptive import AdaptiveLoss
from diffrl.objectives.weights import ChainTerms
from diffrl.shapes import event_mean
from diffrl.training.ema import EMA
from diffrl.training.loop import Cadence, step_generator

__all__ = ["Trials", "held_out"]

HELD_SEED = 7_919_003_573  # held-out noise comes from a stream of its own, which no small user seed shares
SHARE = 0.1


def held_out(data: Data, seed: int) -> tuple[Data, Data]:
    """The data to train on and those to hold out: a tenth of finitely many rows; of a law, fresh draws for both.

    An image and its mirror image stay together.
    """
    if data.num_train is None:
        return data, data
    pairs = data.num_train // (1 + data.mirrored)
    order = torch.randperm(pairs, generator=step_generator(HELD_SEED + seed, 0))
    n = max(1, round(SHARE * len(order)))
    labels = data.train_labels

    def rows(i: Tensor) -> Data:
        i = torch.cat([i, i + pairs]) if data.mirrored else i
        return replace(
            data,
            train=None if data.train is None else data.train[i],
            rows=None if data.rows is None else data.rows.take(i),
            train_labels=None if labels is None else labels[i],
        )

    return rows(order[n:]), rows(order[:n])


class Trained(Protocol):
    """What trials ask of a trainer."""

    step: int
    device: torch.device
    num_classes: int
    objective: Objective
    ema: EMA

    @property
    def length(self) -> Cadence: ...
    def remember(self) -> Callable[[], None]: ...
    def train_on(self, step: int) -> Mapping[str, float]: ...
    def precision(self) -> AbstractContextManager[Any]: ...


class Trials:
    """Makes the trials of an `AdaptiveLoss`, and remembers what came of them.

    Args:
        loss: whose λ is tried.
        data: held-out data.
        seed: of the run.
    """

    def __init__(self, loss: AdaptiveLoss, data: Data, seed: int) -> None:
        self.loss, self.data, self.seed = loss, data, seed
        self.history: list[dict[str, Any]] = []
        """Of each trial: the step, the errors by λ, and the λ that was taken."""

    def run(self, trainer: Trained) -> None:
        """A trial, if one is due at the trainer's step; after it the trainer is as before, but for λ."""
        plan, total = self.loss.plan, trainer.length.total
        if trainer.step not in plan.times(total):
            return
        back, before, errors = trainer.remember(), self._errors(trainer), []
        for lmbda in plan.candidates:
            self.loss.lmbda = lmbda
            for i in range(plan.length(total)):
                trainer.train_on(min(trainer.step + i, total - 1))
            errors.append(self._errors(trainer))
            back()
        means = {f"{c:g}": float(e.mean()) for c, e in zip(plan.candidates, errors, strict=True)}
        taken = self.loss.choose(before, errors)
        self.history.append(
            {"step": trainer.step, "before": float(before.mean()), "errors": means, "lmbda": taken}
        )

    @torch.no_grad()
    def _errors(self, trainer: Trained) -> Tensor:
        """The averaged denoiser's error on each held-out chain, mean of ‖D(x) - x0‖²/(c_out² dim(E)) along it, [n]."""
        generator = step_generator(HELD_SEED + self.seed, trainer.step)
        n, N = self.loss.plan.heldout, self.data.num_train
        x0, labels = self.data.batch(n if N is None else min(n, N), generator)
        denoiser = cast(Denoiser, trainer.ema.module)
        x0 = x0.to(trainer.device, next(denoiser.parameters()).dtype)
        labels = labels.to(trainer.device) if labels is not None and trainer.num_classes else None
        if trainer.device.type != "cpu":
            generator = step_generator(HELD_SEED + self.seed, trainer.step, trainer.device)
        draw = (
            trainer.objective.draw
        )  # errors are taken against the data themselves, whatever targets stand in
        draw = draw.sampler if isinstance(draw, OverChains) else draw
        chain = draw(x0, cond=labels, generator=generator)
        with trainer.precision():
            D_x = ChainValue(denoiser).denoise(chain[keys.X_T], chain[keys.T], chain.get(keys.COND, None))
        self.loss.network_evaluations += chain[keys.T].numel()
        square = event_mean((D_x - chain[keys.X0]).square(), 2)
        return (square / ChainTerms(chain, denoiser).c_out.squeeze(-1) ** 2).mean(1)

    def state_dict(self) -> dict[str, Any]:
        """λ and what came of the trials so far."""
        return {"lmbda": self.loss.lmbda, "history": copy.deepcopy(self.history)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`."""
        self.loss.lmbda, self.history = state["lmbda"], list(state["history"])
