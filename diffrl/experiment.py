"""One experiment from a configuration: train the objective, and Monte Carlo beside it, evaluate, keep the figures."""

import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from diffrl.build import build_data, build_denoiser, build_objective, build_oracle, build_sampler
from diffrl.data import Data
from diffrl.evaluation import Evaluation, draw_samples
from diffrl.runs import RunFolder, versions
from diffrl.trainer import Average, Length, Optim, Table, Target, Trainer

__all__ = ["run_experiment"]

AUTOCAST = {"float32": None, "float64": None, "bfloat16": torch.bfloat16}


def run_experiment(
    config: Mapping[str, Any], folder: RunFolder, *, progress: bool = True
) -> dict[str, Any] | None:
    """Train and evaluate every objective of a configuration, continuing whatever the folder holds already.

    With ``compare`` the Monte Carlo objective is trained too, on the same data, noise and gradient steps.

    Args:
        config: what `diffrl.configs` composes.
        folder: the run's folder.
        progress: whether to show progress bars.

    Returns:
        What results.json then holds, or None if the run was interrupted (SIGINT, SIGTERM) and saved.

    Raises:
        NonFiniteLoss, DataError, CheckpointError, ValueError: see there.
    """
    data = build_data(config)
    main = config["objective"]
    objectives = [main]
    if config["compare"] and main["name"] != "monte_carlo":
        objectives.append({"name": "monte_carlo", "weight": main.get("weight", "edm")})
    head = {"config": dict(config), "seed": config["seed"], "versions": versions(), "objectives": {}}
    results = folder.results() or head
    with _interruptible() as interrupted:
        for objective in objectives:
            if objective["name"] in results["objectives"]:
                continue
            figures = _train({**config, "objective": objective}, data, folder, interrupted, progress)
            if figures is None:
                return None
            results["objectives"][objective["name"]] = figures
            folder.write_results(results)
    return results


def _train(
    config: Mapping[str, Any], data: Data, folder: RunFolder, interrupted: Callable[[], bool], progress: bool
) -> dict[str, Any] | None:
    """Figures of one objective, or None if interrupted."""
    name, device, evaluation = (
        config["objective"]["name"],
        config["device"],
        Evaluation(**_tuples(config["eval"])),
    )
    dtype = torch.float64 if config["dtype"] == "float64" else torch.float32
    denoiser = build_denoiser(config, data).to(device, dtype)
    trainer = Trainer(
        build_objective(config, denoiser),
        data,
        seed=config["seed"],
        folder=folder.checkpoints(name),
        length=Length(**config["trainer"]),
        optim=Optim(**_tuples(config["optim"])),
        average=Average(**config["ema"]),
        target=Target(**config["target"]),
        device=device,
        autocast=AUTOCAST[config["dtype"]],
    )
    trainer.resume()
    oracle = build_oracle(data, denoiser.process)
    if oracle is not None:
        oracle.to(device)

    def value_error(trainer: Trainer) -> dict[str, float]:
        errors = evaluation.value_error(trainer.ema.module, oracle, data)
        return {f"value_error_{sigma}": error for sigma, error in errors.items()}

    columns = ["objective", *trainer.figures, "loss_value", "td_error", "grad_norm", "lr"]
    columns += [f"value_error_{sigma:g}" for sigma in evaluation.sigmas] if oracle is not None else []
    table = Table(folder.path / "metrics.csv", tuple(columns))
    table.keep(lambda row: row["objective"] != name or int(row["grad_steps"]) <= trainer.step)
    logger = _logger(config["logger"], folder.path, name)

    def report(row: dict[str, float]) -> None:
        table.append({"objective": name, **row})
        if logger is not None:
            for key, value in row.items():
                logger.log_scalar(f"{name}/{key}", value, step=int(row["grad_steps"]))

    if not trainer.fit(report=report, evaluate=value_error, stop=interrupted, progress=progress):
        return None
    average = trainer.ema.module
    by_nfe = {}
    for num_steps in evaluation.num_steps:
        x, nfe = draw_samples(
            average,
            data,
            build_sampler(config),
            num_steps=num_steps,
            samples=evaluation.samples,
            guidance_scale=config["guidance_scale"],
        )
        by_nfe[str(nfe)] = evaluation.sample_distance(x, data)
    return {
        **trainer.figures,
        "value_error": evaluation.value_error(average, oracle, data),
        "sample_distance": {"metric": f"{evaluation.distance}@{evaluation.samples}", "by_nfe": by_nfe},
    }


def _tuples(config: Mapping[str, Any]) -> dict[str, Any]:
    return {k: tuple(v) if isinstance(v, list) else v for k, v in config.items()}


def _logger(kind: str, folder: Path, name: str) -> Any:
    """TorchRL's logger of that kind; None for "csv", which metrics.csv is already."""
    if kind == "csv":
        return None
    from torchrl.record.loggers import get_logger  # costs seconds

    return get_logger(kind, logger_name=str(folder / kind), experiment_name=name)


@contextmanager
def _interruptible() -> Iterator[Callable[[], bool]]:
    """Turn SIGINT and SIGTERM into a flag, so that a run stops between two steps."""
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
