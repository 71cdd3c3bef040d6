"""Quality of samples by network evaluations: measured, and named so that each figure says what it is of."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from diffrl.diffusion.samplers.base import Sampler
from diffrl.diffusion.samplers.counting import evaluations
from diffrl.diffusion.schedules.base import Schedule
from diffrl.metrics.measures import Reference
from diffrl.training.evaluation import Evaluation

__all__ = ["by_columns", "for_results", "measure_samples", "quality_columns"]

ByNFE = dict[str, dict[str, float]]
"""Figures by measure, then by network evaluations of a sample."""


def measure_samples(
    evaluation: Evaluation,
    reference: Reference,
    draw: Callable[[int], tuple[Tensor, int]],
    *,
    broken: Callable[[int], Exception],
    each: Callable[[str, Tensor], Any] = lambda nfe, x: None,
) -> ByNFE:
    """Draw samples on each grid of an evaluation, and take all its measures of them.

    Args:
        evaluation: what is measured.
        reference: the set to compare with.
        draw: from the levels of a grid to samples [n, *E] and the network evaluations of each.
        broken: the error to raise where samples of so many levels hold NaN or infinity.
        each: called with the network evaluations and the samples.
    """
    found: ByNFE = {measure: {} for measure in evaluation.measures}
    for num_steps in evaluation.num_steps:
        x, nfe = draw(num_steps)
        if not bool(x.isfinite().all()):
            raise broken(num_steps)
        for measure, figure in evaluation.measured(x, reference).items():
            found[measure][str(nfe)] = figure
        each(str(nfe), x)
    return found


def for_results(evaluation: Evaluation, found: ByNFE) -> dict[str, Any]:
    """As results.json has them: ``sample_distance``, and ``quality`` by the figure's name where it was asked for."""
    distance = {"metric": evaluation.figure(evaluation.distance), "by_nfe": found[evaluation.distance]}
    quality = {evaluation.figure(measure): found[measure] for measure in evaluation.measures[1:]}
    return {"sample_distance": distance, **({"quality": quality} if quality else {})}


def by_columns(evaluation: Evaluation, found: ByNFE) -> dict[str, float]:
    """As metrics.csv has them, by columns such as ``fd_digits_cnn@500_seed7_nfe5``."""
    return {
        _column(evaluation, measure, nfe): figure
        for measure, figures in found.items()
        for nfe, figure in figures.items()
    }


def quality_columns(
    evaluation: Evaluation, sampler: Sampler, process: Schedule, calls: int = 1
) -> tuple[str, ...]:
    """The columns of figures taken in training; none where none are.

    Args:
        evaluation: what is measured.
        sampler: the reverse step.
        process: noise schedule.
        calls: network evaluations of a call of the denoiser: 2 with guidance.
    """
    if evaluation.quality_every == 0:
        return ()
    counts = [calls * evaluations(sampler, process, levels) for levels in evaluation.num_steps]
    return tuple(
        _column(evaluation, measure, n) for measure in evaluation.measures for n in dict.fromkeys(counts)
    )


def _column(evaluation: Evaluation, measure: str, nfe: int | str) -> str:
    return f"{evaluation.figure(measure)}_nfe{nfe}"
