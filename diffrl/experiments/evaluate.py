"""Measuring a trained denoiser: by the loop at its end, and again afterwards with other settings."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffrl.data.dataset import Data
from diffrl.devices import usable_device
from diffrl.diffusion.denoisers import Denoiser
from diffrl.diffusion.exact import MixtureDenoiser
from diffrl.errors import InputError
from diffrl.experiments.run import made_of
from diffrl.experiments.schemes import registered_name
from diffrl.objectives.place import Solution
from diffrl.objectives.solutions import solution_of
from diffrl.training.build import build_oracle, build_sampler
from diffrl.training.checkpoints import latest_checkpoint, read_identity
from diffrl.training.evaluation import Evaluation, draw_samples
from diffrl.training.identity import RunChanged
from diffrl.training.quality import for_results, measure_samples
from diffrl.training.runs import Run, RunFolder, load

__all__ = ["errors_of", "evaluate_run"]


def errors_of(
    evaluation: Evaluation,
    denoiser: Denoiser,
    oracle: MixtureDenoiser | None,
    data: Data,
    solution: Solution,
) -> dict[str, dict[str, float]]:
    """Errors by name and σ; those of the flow map, where they are asked for, by "t->r".

    A value error is the distance to D*, and only what is meant as D* has one.

    Args:
        evaluation: what is measured.
        denoiser: D.
        oracle: the exact denoiser D*, or None.
        data: the set.
        solution: what the denoiser is meant to be.
    """
    found = evaluation.map_error(denoiser, oracle, data, solution)
    is_value = solution in ("denoiser", "map")
    return {
        "value_error": evaluation.value_error(denoiser, oracle, data) if is_value else {},
        "denoising_error": evaluation.denoising_error(denoiser, data),
        **({"map_error": found} if found else {}),
    }


def evaluate_run(
    path: Path,
    settings: Mapping[str, Any],
    *,
    objective: str | None = None,
    weights: str = "ema",
    device: str = "cpu",
) -> dict[str, Any]:
    """Measure the model of a run again; with the settings that it was trained with, on its device, the same figures.

    The folder is only read.

    Args:
        path: the run's folder.
        settings: options of `diffrl.training.evaluation.Evaluation`, in place of the run's own.
        objective: whose denoiser; None: the run's main one.
        weights: "ema", the averaged ones, or "model".
        device: where it is measured.

    Returns:
        Errors by name and noise level, ``sample_distance`` with its metric and values by network evaluations, and
        ``quality`` with those of further measures, as in results.json.

    Raises:
        RunChanged: the data are others than those of the training.
        InputError: an option outside its range; samples that are not finite.
        RunFolderError, CheckpointError, FileError, DataError: see `diffrl.load` and its `Run.data`.
    """
    place = usable_device(device)
    run = load(path, objective, weights=weights)
    data = run.data
    _require_same_data(path, run, data)
    denoiser, oracle = run.denoiser.to(place), build_oracle(data, run.denoiser.process)
    if oracle is not None:
        oracle.to(place)
    solution = solution_of(registered_name(run.config, run.objective))
    evaluation = made_of("eval", Evaluation, {"eval": {**run.config.get("eval", {}), **settings}})
    evaluation.check_measures(data)
    sampler, scale = build_sampler(run.config), run.config.get("guidance_scale", 1.0)
    by_nfe = measure_samples(
        evaluation,
        evaluation.reference(data, place),
        lambda num_steps: draw_samples(
            denoiser,
            data,
            sampler,
            num_steps=num_steps,
            samples=evaluation.samples,
            seed=evaluation.seed,
            guidance_scale=scale,
            batch_size=evaluation.at_once,
            streams=evaluation.streams,
        ),
        broken=lambda num_steps: InputError(
            f"samples of {num_steps} levels hold NaN or infinity: give other eval.num_steps"
        ),
    )
    return {**errors_of(evaluation, denoiser, oracle, data, solution), **for_results(evaluation, by_nfe)}


def _require_same_data(path: Path, run: Run, data: Data) -> None:
    newest = latest_checkpoint(RunFolder(path).checkpoints(run.objective))
    known = {} if newest is None else read_identity(newest)
    if known.get("data.fingerprint", data.fingerprint) != data.fingerprint:
        raise RunChanged(
            f"the data of {path} are others than in its training: bring back those that it was trained on"
        )
