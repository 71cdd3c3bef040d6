"""What a run of several schemes has shown, in sentences: each scheme against Monte Carlo, and what it costs."""

from collections.abc import Mapping
from typing import Any

from diffrl.experiments.reports.run_table import baseline_of, distance_label, mean_ratio, objective_label

__all__ = ["in_words"]

ALIKE = 0.03
"""Relative differences up to this are told as none: at one seed they mean nothing."""

Found = Mapping[str, Any]


def in_words(results: Mapping[str, Any]) -> str:
    """A paragraph for every scheme but the baseline, and one on what was equal; empty for a run of less than three.

    Args:
        results: what results.json holds.
    """
    found, config = results["objectives"], results["config"]
    baseline = baseline_of(found)
    if baseline is None or len(found) < 3:
        return ""
    given, counts = config["trainer"], {figures["network_evaluations"] for figures in found.values()}
    evaluations = f"{counts.pop():,} network evaluations" if len(counts) == 1 else "but not the evaluations"
    paragraphs = [
        "\n  ".join(
            [f"{objective_label(name, config)}, against Monte Carlo:", *_sentences(figures, found[baseline])]
        )
        for name, figures in found.items()
        if name != baseline
    ]
    return "\n\n".join(
        [
            *paragraphs,
            f"Equal for all: the data and the random numbers of each step, {given['grad_steps']:,} steps of "
            f"{given['batch_size']} data, the first weights,\nthe optimiser, {evaluations}. Different: the target, and "
            f"the noise that successive states share.\nOne run, seed {results['seed']}: several and intervals "
            "come by 'seeds=[1,2,3]'.",
        ]
    )


def _sentences(found: Found, by: Found) -> list[str]:
    """How good the denoiser is, how good its samples are, and what a step costs."""
    lines = []
    if found["value_error"]:
        ratio = mean_ratio(found["value_error"], by["value_error"])
        far = "about as near to" if abs(ratio - 1) <= ALIKE else "nearer to" if ratio < 1 else "farther from"
        price = "The price: the" if ratio > 1 + ALIKE else "The"
        levels = _listed(found["value_error"], by["value_error"], "σ =")
        lines.append(f"{price} denoiser is {far} the exact one of the training data.")
        lines.append(f"  Value error {ratio:.2f} × in the mean; {levels}")
    if found.get("denoising_error"):
        ratio = mean_ratio(found["denoising_error"], by["denoising_error"])
        levels = _listed(found["denoising_error"], by["denoising_error"], "σ =")
        lines.append(f"  On data that no training saw, denoising error {ratio:.2f} × in the mean; {levels}")
    samples, reference = (of["sample_distance"]["by_nfe"] for of in (found, by))
    metric = distance_label(found["sample_distance"]["metric"])
    lines.append(f"Samples, {metric} to the data: {_listed(samples, reference, 'NFE')}")
    pace = found["seconds"] / by["seconds"] if by["seconds"] else 1.0
    extra = found["network_evaluations"] / by["network_evaluations"]
    return [*lines, f"Training: {extra:.2f} × the network evaluations, {pace:.2f} × the time."]


def _listed(found: Mapping[str, float], by: Mapping[str, float], at: str) -> str:
    """Each figure as a multiple of the baseline's."""
    ratios = {key: f"{x / by[key]:.2f}" for key, x in found.items() if by[key] > 0}
    return (
        f"at {at} {', '.join(ratios)}: {', '.join(ratios.values())} ×"
        if ratios
        else "no ratio: it is 0 or below"
    )
