"""The training loop: gradient steps, learning rate, averages, checkpoints."""

import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Generator, Tensor
from torchrl.objectives import HardUpdate
from tqdm import tqdm

from diffrl.data.dataset_all import Data
from diffrl.objectives.soft_update import SoftUpdate
from diffrl.training.build import Adaptive, Objective
from diffrl.training.checkpoints import CheckpointError, latest_checkpoint, load_checkpoint, save_checkpoint
from diffrl.training.ema import EMA

__all__ = ["Average", "Length", "NonFiniteLoss", "Optim", "Target", "Trainer", "step_generator"]


class NonFiniteLoss(RuntimeError):
    """The loss or its gradient became NaN or infinite."""


def step_generator(seed: int, step: int, device: torch.device | str = "cpu") -> Generator:
    """All randomness of one gradient step: a function of (seed, step), so that resuming needs no state.

    Objectives that are compared under one seed see the same data and the same noise.
    """
    state = np.random.SeedSequence([seed, step]).generate_state(1, np.uint64)[0]
    return Generator(device).manual_seed(int(state) & (2**63 - 1))


@dataclass(frozen=True)
class Optim:
    """AdamW with warm-up and decay of the learning rate.

    Args:
        lr: greatest learning rate.
        betas: decay rates of Adam's moments.
        weight_decay: decoupled.
        warmup_steps: gradient steps of linear rise from 0.
        decay: "cosine" to 0 at the last step, or "none".
        clip_norm: greatest gradient norm; None does not clip.
    """

    lr: float = 2e-3
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    warmup_steps: int = 100
    decay: Literal["cosine", "none"] = "cosine"
    clip_norm: float | None = 1.0

    def __post_init__(self) -> None:
        if not self.lr > 0:
            raise ValueError(f"optim.lr is {self.lr}: it must be above 0")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"optim.betas is {self.betas}: give two decay rates in [0, 1)")
        if self.warmup_steps < 0:
            raise ValueError(f"optim.warmup_steps is {self.warmup_steps}: it must be 0 or more")
        if self.decay not in ("cosine", "none"):
            raise ValueError(f"optim.decay is {self.decay!r}: give 'cosine' or 'none'")
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise ValueError(f"optim.clip_norm is {self.clip_norm}: it must be above 0; null does not clip")

    def lr_at(self, step: int, grad_steps: int) -> float:
        """Learning rate of gradient step `step`, counted from 0."""
        warmup = min((step + 1) / self.warmup_steps, 1.0) if self.warmup_steps > 0 else 1.0
        if self.decay == "none":
            return self.lr * warmup
        progress = max(step - self.warmup_steps, 0) / max(grad_steps - self.warmup_steps, 1)
        return self.lr * warmup * 0.5 * (1 + math.cos(math.pi * progress))


@dataclass(frozen=True)
class Target:
    """How a target network follows, where the objective has one.

    Args:
        decay: θ⁻ ← decay θ⁻ + (1 - decay) θ after every step (TorchRL's SoftUpdate); an objective that brings
            decays of its own, as consistency training does, goes by those.
        every: instead, a hard copy each so many steps (TorchRL's HardUpdate).
    """

    decay: float = 0.999
    every: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.decay <= 1:
            raise ValueError(f"target.decay is {self.decay}: it must lie in [0, 1]")
        if self.every is not None and self.every < 1:
            raise ValueError(f"target.every is {self.every}: it must be at least 1")


@dataclass(frozen=True)
class Average:
    """The moving average of the weights that is evaluated; see `diffrl.training.ema.EMA`.

    Args:
        halflife: in data (not states) seen.
        ramp: greatest half-life as a share of the data seen so far; None for no warm-up.
    """

    halflife: float = 2000.0
    ramp: float | None = 0.05


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
    """

    grad_steps: int = 2000
    batch_size: int = 32
    report_every: int = 50
    eval_every: int = 250
    checkpoint_every: int = 500
    keep_checkpoints: int = 2
    label_dropout: float = 0.1

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if name != "label_dropout" and value < 1:
                raise ValueError(f"trainer.{name} is {value}: it must be at least 1")
        if not 0 <= self.label_dropout <= 1:
            raise ValueError(f"trainer.label_dropout is {self.label_dropout}: it is a share in [0, 1]")


class Trainer:
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
        autocast: dtype for the network's arithmetic, e.g. torch.bfloat16; values stay in float32.

    Raises:
        NonFiniteLoss: from `steps`, where loss, gradient or weights are not finite; no such step is saved.
    """

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
    ) -> None:
        self.objective, self.loss, self.data, self.seed, self.folder = (
            objective,
            objective.loss,
            data,
            seed,
            folder,
        )
        self.length, self.optim, self.device, self.autocast = length, optim, torch.device(device), autocast
        self.denoiser = self.loss.denoiser
        self.num_classes = int(getattr(self.denoiser.network, "num_classes", 0))
        self.ema = EMA(self.denoiser, average.halflife, average.ramp)
        self.parameters = [p for p in self.denoiser.parameters() if p.requires_grad]
        self.optimiser = torch.optim.AdamW(
            self.parameters, lr=optim.lr, betas=optim.betas, weight_decay=optim.weight_decay, fused=True
        )
        self.target = _target_updater(self.loss, target)
        self.adaptive = objective.draw if isinstance(objective.draw, Adaptive) else None
        self.step, self.seconds = 0, 0.0
        data.batch(length.batch_size, step_generator(seed, 0))  # more than the data holds is refused here

    @property
    def figures(self) -> dict[str, float]:
        """Counts so far."""
        return {
            "grad_steps": self.step,
            "samples": self.step * self.length.batch_size,
            "network_evaluations": self.loss.network_evaluations,
            "seconds": round(self.seconds, 3),
        }

    def steps(self) -> Iterator[dict[str, float]]:
        """One gradient step an iteration, from where the trainer stands; yields its figures.

        A checkpoint is due only when the next step is asked for: what the caller does with the figures of a
        step is done when the step is saved, and lost with it otherwise.
        """
        self.denoiser.train()
        while self.step < self.length.grad_steps:
            start = time.perf_counter()
            yielded = self._step()
            self.seconds += time.perf_counter() - start
            yield yielded
            last = self.step == self.length.grad_steps
            if self.folder is not None and (last or self.step % self.length.checkpoint_every == 0):
                self.save()

    def batch(self, step: int) -> tuple[Tensor, Tensor | None, Generator]:
        """Data of a step, its labels (some dropped), and the generator that the noise continues from."""
        generator = step_generator(self.seed, step)
        x0, labels = self.data.batch(self.length.batch_size, generator)
        if self.num_classes == 0:
            labels = None
        elif labels is not None:
            dropped = torch.rand(len(labels), generator=generator) < self.length.label_dropout
            labels = labels.masked_fill(dropped, self.num_classes).to(self.device)
        dtype = next(iter(self.parameters)).dtype
        if self.device.type != "cpu":
            generator = step_generator(self.seed, step, self.device)
        return x0.to(self.device, dtype), labels, generator

    def _step(self) -> dict[str, float]:
        self.objective.set_progress(self.step, self.length.grad_steps)
        x0, labels, generator = self.batch(self.step)
        chain = self.objective.draw(x0, cond=labels, generator=generator)
        with self._autocast():
            out = self.loss(chain)
        loss = out["loss_value"]
        loss.backward()
        norm = torch.nn.utils.get_total_norm(
            [p.grad for p in self.parameters if p.grad is not None], foreach=True
        )
        loss_value, grad_norm = loss.item(), norm.item()
        if not math.isfinite(loss_value + grad_norm):
            self.optimiser.zero_grad()
            raise self._not_finite(f"loss {loss_value:g} with gradient norm {grad_norm:g}")
        if self.optim.clip_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(self.parameters, self.optim.clip_norm, norm, foreach=True)
        lr = self.optim.lr_at(self.step, self.length.grad_steps)
        for group in self.optimiser.param_groups:
            group["lr"] = lr
        self.optimiser.step()
        self.optimiser.zero_grad()
        if self.target is not None:
            if isinstance(self.target, SoftUpdate) and self.objective.target_decay is not None:
                self.target.eps = self.objective.target_decay
            self.target.step()
        self.ema.update(self.length.batch_size)
        if self.adaptive is not None:
            self.adaptive.update(chain)
        self.step += 1
        return {
            "loss_value": loss_value,
            "td_error": out["td_error"].item(),
            "grad_norm": grad_norm,
            "lr": lr,
        }

    def _not_finite(self, what: str) -> NonFiniteLoss:
        kept = None if self.folder is None else latest_checkpoint(self.folder)
        return NonFiniteLoss(
            f"{self.objective.name}: {what} at gradient step {self.step}; last good checkpoint: "
            f"{kept or 'none'}. Lower optim.lr, or clip with optim.clip_norm"
        )

    def _autocast(self) -> AbstractContextManager[Any]:
        return nullcontext() if self.autocast is None else torch.autocast(self.device.type, self.autocast)

    def save(self) -> Path:
        """Write a checkpoint of this step.

        Raises:
            NonFiniteLoss: the weights are not finite any more.
        """
        if self.folder is None:
            raise ValueError("this trainer has no folder for checkpoints")
        if not all(bool(p.isfinite().all()) for p in self.parameters):
            raise self._not_finite("weights that are not finite")
        weights = {"model": self.denoiser.state_dict(), "ema": self.ema.module.state_dict()}
        if self.target is not None:
            weights["target"] = {k: v for k, v in self.loss.state_dict().items() if k.startswith("target_")}
        training = {
            "optimiser": self.optimiser.state_dict(),
            "target": {} if self.target is None else self.target.state_dict(),
            "network_evaluations": self.loss.network_evaluations,
            "seconds": self.seconds,
            "ema_samples": self.ema.samples,
        }
        if self.adaptive is not None:
            training["draw"] = self.adaptive.state_dict()
        keep = self.length.keep_checkpoints
        return save_checkpoint(self.folder, self.step, weights=weights, training=training, keep=keep)

    def resume(self) -> bool:
        """Continue from the newest checkpoint; False if there is none.

        Raises:
            CheckpointError: it is damaged, or of another network.
        """
        path = None if self.folder is None else latest_checkpoint(self.folder)
        if path is None:
            return False
        checkpoint = load_checkpoint(path)
        weights, training = checkpoint.weights, checkpoint.training
        try:
            self.denoiser.load_state_dict(weights["model"])
        except RuntimeError as error:
            reason = " ".join(str(error).split())
            raise CheckpointError(f"checkpoint {path} is of another network: {reason}") from error
        self.ema.load_state_dict({"samples": training["ema_samples"], "module": weights["ema"]})
        if self.target is not None:
            self.loss.load_state_dict(weights["target"], strict=False)
            self.target.load_state_dict(training["target"])
        self.optimiser.load_state_dict(training["optimiser"])
        if self.adaptive is not None:
            self.adaptive.load_state_dict(training["draw"])
        self.loss.network_evaluations = training["network_evaluations"]
        self.seconds, self.step = training["seconds"], checkpoint.step
        return True

    def fit(
        self,
        *,
        report: Callable[[dict[str, float]], None],
        evaluate: Callable[["Trainer"], dict[str, float]],
        stop: Callable[[], bool] = lambda: False,
        progress: bool = True,
    ) -> bool:
        """Train to the end under a progress bar; the first report is of the untrained denoiser.

        Args:
            report: takes a row of figures; the loss in a row is that of its step.
            evaluate: figures of the averaged denoiser.
            stop: asked after every step; if true, a checkpoint is written and training ends.
            progress: whether to show the bar.

        Returns:
            Whether training reached its end.
        """
        total, shown = self.length.grad_steps, ""
        if self.step == 0:
            report({**self.figures, **evaluate(self)})
        with tqdm(
            total=total,
            initial=self.step,
            desc=self.objective.name,
            unit="step",
            mininterval=0.2 if sys.stderr.isatty() else 20,  # a line of a log each
            disable=not progress,
        ) as bar:
            for figures in self.steps():
                last = self.step == total
                look = last or self.step % self.length.eval_every == 0
                if look or self.step % self.length.report_every == 0:
                    row = {**self.figures, **figures}
                    if look:
                        evaluated = evaluate(self)
                        self.denoiser.train()
                        row |= evaluated
                        if evaluated:
                            shown = f"value error {sum(evaluated.values()) / len(evaluated):.3g}, "
                    report(row)
                    rate = row["samples"] / max(self.seconds, 1e-9)
                    bar.set_postfix_str(
                        f"loss {row['loss_value']:.3g}, {shown}{rate:,.0f} samples/s", refresh=False
                    )
                bar.update()
                if stop() and not last:
                    if self.folder is not None:
                        self.save()
                    return False
        return True


def _target_updater(loss: Any, target: Target) -> SoftUpdate | HardUpdate | None:
    if loss.bootstrap != "target":
        return None
    if target.every is not None:
        return HardUpdate(loss, value_network_update_interval=target.every - 1)  # it copies one call late
    return SoftUpdate(loss, eps=target.decay)
