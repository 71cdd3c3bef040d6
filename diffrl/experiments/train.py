"""One experiment from a configuration: train, with Monte Carlo beside it, evaluate, keep the figures."""

import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Any, cast

import torch
from torch import Tensor

from diffrl.data.dataset_all import Data
from diffrl.diffusion.denoisers import Denoiser
from diffrl.extras import require_installed
from diffrl.objectives.schemes import OBJECTIVES, monte_carlo_loss
from diffrl.training.build import build_data, build_denoiser, build_objective, build_oracle, build_sampler
from diffrl.training.evaluation import Evaluation, draw_samples
from diffrl.training.optim import Optim
from diffrl.training.runs import RunFolder, versions
from diffrl.training.table import Table
from diffrl.training.trainer import Average, Length, Target, Trainer

__all__ = [
    "AUTOCAST",
    "SHOWN",
    "Interrupted",
    "as_tuples",
    "check_settings",
    "interruptible",
    "open_logger",
    "run_experiment",
]

AUTOCAST = {"float32": None, "float64": None, "bfloat16": torch.bfloat16}
LOGGERS = ("csv", "tensorboard", "wandb")
SHOWN = {"images": 64, "points": 1000}  # samples kept for figures


class Interrupted(Exception):
    """A run was asked to stop by SIGINT or SIGTERM; it is saved."""


def run_experiment(config: Mapping[str, Any], *, progress: bool = True) -> RunFolder:
    """Train and evaluate what a configuration says, continuing whatever a resumed folder holds already.

    With ``compare`` Monte Carlo is trained too, on the same data and noise for the same gradient steps.

    Args:
        config: what `diffrl.configs` composes.
        progress: whether to show progress bars.

    Returns:
        The run's folder, with all its results.

    Raises:
        ValueError, DataError, MissingExtra: something in the configuration cannot be; no folder is made.
        RunFolderError: see `RunFolder.start`.
        NonFiniteLoss, CheckpointError: see `Trainer`.
        Interrupted: the run is saved, and can be resumed.
    """
    check_settings(config)
    data, main = build_data(config), config["objective"]["name"]
    is_baseline = OBJECTIVES[main].loss is monte_carlo_loss
    objectives = [main, "monte_carlo"] if config["compare"] and not is_baseline else [main]
    for name in objectives:
        _Job(config, data, baseline=name != main).check()  # now, and not at the end of training
    folder = RunFolder.start(config)
    head = {"config": folder.config(), "seed": config["seed"], "versions": versions(), "objectives": {}}
    results = folder.results() or head
    with interruptible() as interrupted:
        for name in objectives:
            if name in results["objectives"]:
                continue
            job = _Job(config, data, baseline=name != main)
            results["objectives"][name] = job.run(folder, interrupted, progress)
            folder.write_results(results)
    return folder


class _Job:
    """One objective of an experiment: its trainer, and how it is evaluated."""

    def __init__(self, config: Mapping[str, Any], data: Data, *, baseline: bool) -> None:
        self.config, self.data = config, data
        dtype = torch.float64 if config["dtype"] == "float64" else torch.float32
        denoiser = build_denoiser(config, data).to(config["device"], dtype)
        objective = build_objective(config, denoiser, baseline=baseline)
        self.name = objective.name
        self.sampler = build_sampler(config)
        self.trainer = Trainer(
            objective,
            data,
            seed=config["seed"],
            folder=None,
            length=Length(**config["trainer"]),
            optim=Optim(**as_tuples(config["optim"])),
            average=Average(**config["ema"]),
            target=Target(**config["target"]),
            device=config["device"],
            autocast=AUTOCAST[config["dtype"]],
        )
        self.evaluation = Evaluation(**as_tuples(config["eval"]))
        self.oracle = build_oracle(data, denoiser.process)
        if self.oracle is not None:
            self.oracle.to(config["device"])

    @property
    def average(self) -> Denoiser:
        """The averaged denoiser: what is evaluated."""
        return cast(Denoiser, self.trainer.ema.module)

    def check(self) -> None:
        """Try everything once, at little cost."""
        trainer = self.trainer
        x0, labels, generator = trainer.batch(0)
        trainer.objective.set_progress(0, trainer.length.grad_steps)
        states = trainer.objective.draw(x0, cond=labels, generator=generator)
        with torch.no_grad():
            trainer.loss(states)
        self.evaluation.check(self.average, self.oracle, self.data)
        self._draw(num_steps=1, samples=1)

    def value_error(self) -> dict[str, float]:
        """Of the averaged denoiser, by σ."""
        return self.evaluation.value_error(self.average, self.oracle, self.data)

    def run(self, folder: RunFolder, interrupted: Callable[[], bool], progress: bool) -> dict[str, Any]:
        """Train to the end, or raise `Interrupted`; the figures for results.json."""
        trainer = self.trainer
        trainer.folder = folder.checkpoints(self.name)
        trainer.resume()
        columns = ["objective", *trainer.figures, "loss_value", "td_error", "grad_norm", "lr"]
        if self.oracle is not None:
            columns += [f"value_error_{sigma:g}" for sigma in self.evaluation.sigmas]
        table = Table(folder.path / "metrics.csv", tuple(columns))
        done = range(trainer.step + 1 if trainer.step > 0 else 0)
        table.keep(lambda row: row["objective"] != self.name or int(row["grad_steps"]) in done)
        logger = open_logger(self.config["logger"], str(folder.path), self.name)

        def report(row: dict[str, float]) -> None:
            table.append({"objective": self.name, **row})
            if logger is not None:
                for key, value in row.items():
                    logger.log_scalar(f"{self.name}/{key}", value, step=int(row["grad_steps"]))

        def evaluate(_: Trainer) -> dict[str, float]:
            return {f"value_error_{sigma}": error for sigma, error in self.value_error().items()}

        if not trainer.fit(report=report, evaluate=evaluate, stop=interrupted, progress=progress):
            place = f"gradient step {trainer.step} of {self.name}"
            raise Interrupted(f"stopped after {place}, and saved; continue with resume={folder.path}")
        by_nfe, shown = {}, {}
        kept = SHOWN["images" if len(self.data.event_shape) == 3 else "points"]
        for num_steps in self.evaluation.num_steps:
            x, nfe = self._draw(num_steps, self.evaluation.samples)
            by_nfe[str(nfe)], shown[str(nfe)] = (
                self.evaluation.sample_distance(x, self.data),
                x[:kept].float(),
            )
        folder.write_samples("data", {"0": self.data.test[:kept]})
        folder.write_samples(self.name, shown)
        metric = f"{self.evaluation.distance}@{self.evaluation.samples}"
        return {
            **trainer.figures,
            "value_error": self.value_error(),
            "sample_distance": {"metric": metric, "by_nfe": by_nfe},
        }

    def _draw(self, num_steps: int, samples: int) -> tuple[Tensor, int]:
        return draw_samples(
            self.average,
            self.data,
            self.sampler,
            num_steps=num_steps,
            samples=samples,
            guidance_scale=self.config["guidance_scale"],
        )


def check_settings(config: Mapping[str, Any]) -> None:
    """Refuse what no schema knows to be wrong."""
    for key, known in (("dtype", tuple(AUTOCAST)), ("logger", LOGGERS)):
        if config[key] not in known:
            raise ValueError(f"{key} is {config[key]!r}: give {', '.join(known)}")
    if config["logger"] != "csv":
        require_installed(config["logger"], extra=config["logger"])
    try:
        torch.zeros(1, device=config["device"])
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # one for each way to lack it
        raise ValueError(f"device is {config['device']!r}, which cannot be used: {error}") from error


def as_tuples(config: Mapping[str, Any]) -> dict[str, Any]:
    """Lists, as a configuration file has them, as the tuples that constructors take."""
    return {k: tuple(v) if isinstance(v, list) else v for k, v in config.items()}


def open_logger(kind: str, folder: str, name: str) -> Any:
    """TorchRL's logger of that kind; None for "csv", which metrics.csv is already."""
    if kind == "csv":
        return None
    from torchrl.record.loggers import get_logger  # costs seconds

    mode = {"wandb_kwargs": {"mode": os.environ.get("WANDB_MODE", "online")}} if kind == "wandb" else {}
    return get_logger(kind, logger_name=f"{folder}/{kind}", experiment_name=name, **mode)


@contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Turn SIGINT and SIGTERM into a flag, so that a run stops between two steps."""
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False  # only the main thread hears signals
        return
    seen: list[int] = []

    def remember(number: int, frame: FrameType | None) -> None:
        if seen:  # asked twice: stop at once
            raise KeyboardInterrupt
        seen.append(number)

    old = {number: signal.signal(number, remember) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(seen)
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
