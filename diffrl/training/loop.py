"""The loop that training and fine-tuning share: steps, reports, evaluations, checkpoints, a progress bar, a stop."""

import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self

import numpy as np
import torch
from torch import Generator, Tensor
from tqdm import tqdm

from diffrl.devices import usable_device
from diffrl.errors import DiffrlError, InputError
from diffrl.ranges import require_int
from diffrl.training.checkpoints import (
    Checkpoint,
    CheckpointError,
    latest_checkpoint,
    load_checkpoint,
    read_identity,
    save_checkpoint,
    step_of,
    tidy,
)
from diffrl.training.distributed import ALONE, Ranks
from diffrl.training.identity import (
    Facts,
    RunChanged,
    fingerprint,
    refuse_changes,
    surroundings,
    warn_of_surroundings,
)
from diffrl.training.lock import folder_lock
from diffrl.training.optim import NonFiniteLoss
from diffrl.training.packed import Shapes

__all__ = ["Cadence", "Loop", "Unfinished", "step_generator"]

Row = dict[str, float]


class Unfinished(Exception):
    """An evaluation was left, as the run was asked to stop."""


def step_generator(seed: int, step: int, device: torch.device | str = "cpu") -> Generator:
    """All randomness of one step: a function of (seed, step), so that resuming needs no state.

    Runs that are compared under one seed see the same data and the same noise.
    """
    state = np.random.SeedSequence([seed, step]).generate_state(1, np.uint64)[0]
    return Generator(device).manual_seed(int(state) & (2**63 - 1))


class Cadence(Protocol):
    """How long a loop runs, and how often it reports, evaluates and saves, in its steps."""

    @property
    def total(self) -> int: ...
    @property
    def report_every(self) -> int: ...
    @property
    def eval_every(self) -> int: ...
    @property
    def checkpoint_every(self) -> int: ...
    @property
    def keep_checkpoints(self) -> int: ...


class Loop(ABC):
    """Runs `_advance` until the end: `steps` yields after each step, `fit` reports, evaluates and shows a bar.

    Args:
        length: how long, and how often to look and to save.
        folder: for checkpoints; None keeps none.
        seed: of everything random.
        device: where to work.
        autocast: dtype for the networks' arithmetic, e.g. torch.bfloat16; parameters stay as they are.
        identity: what else a checkpoint belongs to, beside `facts`, such as a configuration.
        ranks: the processes that share the loop; the first one writes, evaluates and reports.
    """

    unit: ClassVar[str] = "step"
    """What a step is called in the progress bar."""
    step_name: ClassVar[str] = "step"
    """The same in errors."""
    total_key: ClassVar[str] = "steps"
    """The key by which a user sets how long the loop runs."""

    def __init__(
        self,
        length: Cadence,
        *,
        folder: Path | None,
        seed: int,
        device: torch.device | str,
        autocast: torch.dtype | None,
        identity: Facts | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        self.identity: Facts = identity or {}
        self.ranks = ranks
        self.length, self.folder, self.seed = length, folder, require_int("seed", seed, 0)
        self.device, self.autocast = usable_device(device), autocast
        self.step, self.seconds = 0, 0.0
        self.due: Row | None = None
        """Figures of the step that the loop stands at, where its evaluation was left."""

    @property
    @abstractmethod
    def name(self) -> str:
        """For the progress bar and for errors."""

    @property
    @abstractmethod
    def figures(self) -> Row:
        """Counts so far."""

    @property
    def facts(self) -> dict[str, Any]:
        """What a checkpoint of this loop belongs to, by name: see `diffrl.training.identity`."""
        return {"seed": self.seed, self.total_key: self.length.total}

    @abstractmethod
    def _advance(self) -> Row:
        """One step; its figures.

        Raises:
            NonFiniteLoss: loss or gradient are not finite.
        """

    @abstractmethod
    def _caption(self, row: Row, evaluated: Row) -> str:
        """What the progress bar says, from the latest row and the latest evaluation."""

    @abstractmethod
    def _state(self) -> tuple[dict[str, Mapping[str, Tensor]], dict[str, Any]]:
        """Sets of weights, and everything else that a checkpoint holds."""

    @abstractmethod
    def _restore(self, checkpoint: Checkpoint, path: Path) -> None:
        """Take what `_state` gave.

        Raises:
            CheckpointError: it was given by something else.
        """

    @abstractmethod
    def _set_mode(self) -> None:
        """Put the modules in the mode that they are trained in."""

    def precision(self) -> AbstractContextManager[Any]:
        """The autocast of the run."""
        return nullcontext() if self.autocast is None else torch.autocast(self.device.type, self.autocast)

    def steps(self) -> Iterator[Row]:
        """One step an iteration, from where the loop stands; yields its figures.

        A checkpoint is due only when the next step is asked for: what the caller does with the figures of a
        step is done when the step is saved, and lost with it otherwise.

        Raises:
            NonFiniteLoss: of the step that gave it; nothing is changed by it.
            FolderInUse: another process writes checkpoints to the folder.
            RankLost: another process of several that share the loop has ended.
        """
        folder = self.folder if self.ranks.first else None
        with nullcontext() if folder is None else folder_lock(folder):
            if folder is not None:
                tidy(folder, self.length.keep_checkpoints)
            yield from self._steps()

    def _steps(self) -> Iterator[Row]:
        self._set_mode()
        while self.step < self.length.total:
            start = time.perf_counter()
            try:
                figures = self._advance()
            except NonFiniteLoss as error:
                raise self.not_finite(str(error)) from error
            self.step += 1
            self.seconds += time.perf_counter() - start
            yield figures
            last = self.step == self.length.total
            if last or self.step % self.length.checkpoint_every == 0:
                self._keep()

    @property
    def together(self) -> bool:
        """Whether every process has to bring its part to a checkpoint."""
        return False

    def _keep(self) -> None:
        """Save, where there is a folder; of several processes one does, and the others wait for it."""
        if self.folder is not None and self.together:
            self.save()
        elif self.folder is not None:
            self.ranks.from_first(self.save, self._doing("the checkpoint"))

    def _doing(self, what: str) -> str:
        """What one process does while the others wait, for an error of theirs."""
        return f"{what} at {self.step_name} {self.step} of {self.name}"

    def _evaluated(self, evaluate: Callable[[Self], Row]) -> Row | None:
        """Figures; None where the evaluation was left."""

        def found() -> Row | None:
            with suppress(Unfinished):
                return evaluate(self)
            return None

        try:
            return self.ranks.from_first(found, self._doing("the evaluation"))
        except NonFiniteLoss as error:
            raise self.not_finite(str(error)) from error

    def _look(
        self,
        figures: Row,
        report: Callable[[Row], None],
        evaluate: Callable[[Self], Row],
        finished: Callable[[Row], str | None],
    ) -> tuple[Row, str | None]:
        """The row of a step with its evaluation, and why to end; none where that was left, and is due."""
        self.due = figures
        if (evaluated := self._evaluated(evaluate)) is None:
            self._keep()
            return {}, None
        self.due, row = None, {**self.figures, **figures, **evaluated}
        reason = self.ranks.from_first(partial(finished, row), self._doing("the early stop"))
        report(row)
        return row, reason

    def not_finite(self, what: str) -> NonFiniteLoss:
        """The error to raise where steps were too large: what, when, the last checkpoint, the remedy."""
        kept = None if self.folder is None else latest_checkpoint(self.folder)
        return NonFiniteLoss(
            f"{self.name}: {what} at {self.step_name} {self.step}; last checkpoint: {kept or 'none'}. "
            "Lower optim.lr, or clip with optim.clip_norm"
        )

    def save(self) -> Path:
        """Write a checkpoint of this step, which the first process does; returns its folder.

        Raises:
            ValueError: there is no folder.
            CheckpointError: the disk refused.
        """
        if self.folder is None:
            raise InputError("this run has no folder for checkpoints")
        weights, training, parts = self._stored()
        if not self.ranks.first:
            if parts is not None:
                parts(None)
            return self.folder
        return save_checkpoint(
            self.folder,
            self.step,
            weights=weights,
            training={**training, "seconds": self.seconds, **({} if self.due is None else {"due": self.due})},
            keep=self.length.keep_checkpoints,
            identity={**self.facts, **self.identity},
            device=self.device,
            ranks=self.ranks.size,
            parts=parts,
        )

    def _stored(
        self,
    ) -> tuple[Mapping[str, Mapping[str, Tensor]], Mapping[str, Any], Callable[[Path | None], Shapes] | None]:
        """What `_state` gives, and what has all processes write their parts of further tensors."""
        return *self._state(), None

    def compare(self, *, extend: bool = False, accept_changes: bool = False) -> Path | None:
        """The newest checkpoint, if it belongs to this run; None if there is none.

        Args:
            extend: whether this run may be longer than the one that wrote the checkpoint.
            accept_changes: whether it may differ from it in everything.

        Raises:
            RunChanged: the checkpoint belongs to a run with other facts, or has more steps behind it than this run.
            CheckpointError: its manifest is damaged.
        """
        path = None if self.folder is None else latest_checkpoint(self.folder)
        if path is not None and not accept_changes:
            now = {**self.facts, **self.identity}
            refuse_changes(read_identity(path), now, of=path, steps=self.total_key, extend=extend)
        if path is not None and step_of(path) > self.length.total:
            raise RunChanged(
                f"{path} is beyond the {self.length.total} of {self.total_key}: give at least {step_of(path)}, "
                "or choose another folder"
            )
        return path

    def resume(self, *, extend: bool = False, accept_changes: bool = False) -> bool:
        """Continue from the newest checkpoint; False if there is none.

        A run that is longer than it was follows the schedules of its new length from here on, of learning rate and
        curriculum. Where neither depends on the length, it ends as one that was as long from the start, bit for bit.

        Args:
            extend: see `compare`.
            accept_changes: see `compare`.

        Several processes go on from what the first one reads, however many there were before.

        Raises:
            RunChanged: see `compare`.
            CheckpointError: it is damaged, or of something else.
            InputError: another process is given other data or settings than the first one, or other first weights.
        """
        found = self.ranks.from_first(lambda: self._newest(extend, accept_changes), "the last checkpoint")
        if self.ranks.size > 1:
            weights = [x for tensors in self._state()[0].values() for x in tensors.values()]
            self.ranks.agree({**self.facts, **self.identity, "weights": fingerprint(weights)})
        if found is None:
            return False
        path, checkpoint = found
        try:
            self._restore(checkpoint, path)
            self.seconds, self.step = checkpoint.training["seconds"], checkpoint.step
            self.due = checkpoint.training.get("due")
        except (KeyError, IndexError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            if isinstance(error, DiffrlError):
                raise
            raise CheckpointError(
                f"checkpoint {path} is not of this kind of run, or lacks a part of it "
                f"({type(error).__name__}: {' '.join(str(error).split())}): choose another folder"
            ) from error
        return True

    def _newest(self, extend: bool, accept_changes: bool) -> tuple[Path, Checkpoint] | None:
        """The newest checkpoint, compared and read."""
        path = self.compare(extend=extend, accept_changes=accept_changes)
        if path is None:
            return None
        checkpoint = load_checkpoint(path)
        warn_of_surroundings(checkpoint.versions, surroundings(self.device, self.ranks.size), of=path)
        return path, checkpoint

    def fit(
        self,
        *,
        report: Callable[[Row], None] = lambda row: None,
        evaluate: Callable[[Self], Row] = lambda loop: {},
        stop: Callable[[], bool] = lambda: False,
        finished: Callable[[Row], str | None] = lambda row: None,
        progress: bool = True,
    ) -> bool:
        """Run to the end under a progress bar; the first report is of the state before the first step.

        Args:
            report: takes a row of figures; a loss in it is that of its step.
            evaluate: figures every `eval_every` steps and at both ends. Where it raises `Unfinished`, a checkpoint is
                written and the loop ends; the loop that goes on from it evaluates first.
            stop: asked after every step; if true, or without its launcher any more, the loop ends with a checkpoint.
            finished: looks at every row with an evaluation; a reason ends the loop for good (early stop).
            progress: whether to show the bar.

        Returns:
            Whether the loop reached its end, early or not.
        """
        total, ranks = self.length.total, self.ranks
        if not ranks.first:
            report, progress = (lambda row: None), False
        looked, reason = Row(), None
        if self.step == 0 or self.due is not None:
            looked, reason = self._look(self.due or {}, report, evaluate, finished)
            if not looked or (reason is not None and 0 < self.step < total):
                return bool(looked)
        how = {"mininterval": 0.2 if sys.stderr.isatty() else 20, "disable": not progress}
        with tqdm(total=total, initial=self.step, desc=self.name, unit=self.unit, **how) as bar:
            for figures in self.steps():
                last, reason = self.step == total, None
                if look := last or self.step % self.length.eval_every == 0:
                    looked, reason = self._look(figures, report, evaluate, finished)
                    self._set_mode()
                    if not looked:
                        return False
                if look or self.step % self.length.report_every == 0:
                    row = {**self.figures, **figures}
                    if not look:
                        report(row)
                    bar.set_postfix_str(self._caption(row, looked), refresh=False)
                bar.update()
                if reason is not None and not last:
                    bar.write(f"stopped early after {self.step_name} {self.step}: {reason}")
                if reason is not None or (ranks.any(stop() or ranks.abandoned) and not last):
                    self._keep()
                    return reason is not None
        return True
