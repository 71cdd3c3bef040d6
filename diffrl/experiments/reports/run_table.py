"""What a run found, from its results.json: names for people, and one table."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from inspect import signature
from pathlib import Path
from typing import Any

from diffrl.data.splits import Split
from diffrl.diffusion.posterior import coupling_eta
from diffrl.experiments.schemes import MONTE_CARLO, settings_of
from diffrl.finetuning.evaluation import TO_BASE
from diffrl.metrics.measures import FigureName
from diffrl.objectives.monte_carlo import is_monte_carlo
from diffrl.objectives.registry import OBJECTIVES
from diffrl.objectives.stand_ins import StandIn
from diffrl.objectives.target_choice import bootstrap_of
from diffrl.registry import Entry, accepted
from diffrl.text_tables import text_table

__all__ = [
    "baseline_of",
    "bootstrap_row",
    "count_label",
    "data_label",
    "distance_label",
    "figure_rows",
    "judged_label",
    "mean_error",
    "mean_ratio",
    "objective_label",
    "quality_of",
    "split_line",
    "summary_table",
    "title",
]

SHARED = {1.0: "fresh noise", 0.0: "shared noise"}
"""What successive states of a chain have, by η."""
ERRORS = {"value_error": "value error", "denoising_error": "denoising error, test", "map_error": "map error"}
BOOTSTRAPS = {
    "own": "own predictions",
    "target": "a target network",
    "residual": "own, with gradient",
    "teacher": "a teacher",
}
DISTANCES = {
    "w2": "W2 distance",
    "sliced_w2": "sliced W2 distance",
    "mmd": "squared MMD",
}
OF_FEATURES = {
    "fd": "Fréchet distance",
    "kid": "kernel distance",
    "precision": "precision",
    "recall": "recall",
}


def objective_label(name: str, config: Mapping[str, Any]) -> str:
    """Name of an objective for people, such as "TD(λ=0.5)"; its key if no objective of that name is known here.

    In a run of several schemes the name says what noise the states of a chain share, unless it does not matter; of two
    that would be called alike, the one beside the run's own has its key added.

    Args:
        name: its key in ``results["objectives"]``.
        config: the run's configuration; options that it lacks are taken to have the defaults of today.
    """
    label, beside = _label(name, config), config.get("beside") or {}
    others = [config["objective"]["name"], *beside] if name in beside else []
    alike = any(_label(other, config) == label for other in others if other != name)
    return f"{label} ({name})" if alike else label


def _label(name: str, config: Mapping[str, Any]) -> str:
    """The name as the settings of the scheme give it."""
    beside = config.get("beside") or {}
    settings, registered = _scheme(name, config)
    objective = settings.get("objective", {})
    if registered not in OBJECTIVES:
        return name
    entry = OBJECTIVES.entry(registered)
    label = entry.label_for({**_defaults(entry), **objective})
    if not beside and name != objective.get(
        "name", name
    ):  # Monte Carlo beside the run's own, whose target is the datum
        return label
    label = StandIn(**accepted(StandIn, settings.get("chain", {}))).label(label)
    if not beside or entry.also is not None or is_monte_carlo(registered):
        return label
    eta = coupling_eta(settings["chain"]["coupling"])
    return f"{label}, {SHARED.get(eta, f'partly shared noise (η = {eta:g})')}"


def _scheme(name: str, config: Mapping[str, Any]) -> tuple[Mapping[str, Any], str]:
    """The settings of one scheme of a run, and the objective that it has."""
    if name not in (config.get("beside") or {}):
        return config, name
    settings = settings_of(config, name)
    return settings, settings.get("objective", {}).get("name", name)


def _defaults(entry: Entry) -> dict[str, Any]:
    parameters = [p for function in entry.functions for p in signature(function).parameters.values()]
    return {p.name: p.default for p in parameters if p.default is not p.empty}


def bootstrap_row(names: Iterable[str], config: Mapping[str, Any]) -> list[str]:
    """What each objective of a run bootstraps from, with a head for the row; nothing where none of them does.

    Args:
        names: keys in ``results["objectives"]``.
        config: as for `objective_label`.
    """
    sources = [_bootstrap_label(name, config) for name in names]
    return ["bootstraps from", *sources] if any(sources) else []


def _bootstrap_label(name: str, config: Mapping[str, Any]) -> str:
    """Empty for what bootstraps from nothing, and where that is not known."""
    settings, registered = _scheme(name, config)
    if registered not in OBJECTIVES:
        return ""
    entry, objective = OBJECTIVES.entry(registered), settings.get("objective", {})
    own = objective if objective.get("name", registered) == registered else {}
    return BOOTSTRAPS.get(bootstrap_of(entry.place, {**_defaults(entry), **own}), "")


def data_label(config: Mapping[str, Any]) -> str:
    """Name for people of the data that a run was trained on, and of its noise process if it is not the usual one.

    Args:
        config: the run's configuration.
    """
    data, process = config["data"], config["process"]["name"]
    name = Path(data["path"]).name if "path" in data else data["name"]
    if name == "gmm":
        name = f"a mixture of {data['components']} Gaussians in {data['dim']}-D"
    return name if process == "edm" else f"{name}, process {process}"


def distance_label(metric: str) -> str:
    """Name for people of ``results["objectives"][...]["sample_distance"]["metric"]``, without number and seed."""
    name = metric.partition("@")[0]
    measure, _, features = name.partition("_")
    if measure in OF_FEATURES and features:
        return f"{OF_FEATURES[measure]} ({features})"
    return DISTANCES.get(name, name)


def count_label(metric: str) -> str:
    """How many samples a figure is of, and their seed, such as "2,000 samples, seed 7"."""
    name = FigureName.of(metric)
    seed = re.sub(r"^(seed|key)", r"\1 ", name.seed)
    return ", ".join(filter(None, (f"{name.samples:,} samples", seed)))


def judged_label(name: str, words: str) -> str:
    """Words for a figure of a policy; for the distance to the base its measure, number of samples and seed too.

    >>> judged_label("distance_to_base_sliced_w2@256_seed7", "distance to base")
    'distance to base (sliced W2 distance of 256 samples, seed 7)'
    """
    measure = name.removeprefix(f"{TO_BASE}_")
    return words if measure == name else f"{words} ({distance_label(measure)} of {count_label(name)})"


def quality_of(found: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Measures of samples by name for people, then by network evaluations: the distance, then what else was taken.

    Args:
        found: as for `figure_rows`.
    """
    distance = found["sample_distance"]
    named = {distance["metric"]: distance["by_nfe"], **found.get("quality", {})}
    return {distance_label(metric): by_nfe for metric, by_nfe in named.items()}


def baseline_of(names: Iterable[str]) -> str | None:
    """What the others are measured against: Monte Carlo, else the second of two; None if there is no such thing."""
    known = [*names]
    if MONTE_CARLO in known and len(known) > 1:
        return MONTE_CARLO
    return known[1] if len(known) == 2 else None


def mean_error(errors: Mapping[str, float]) -> float:
    """Mean over noise levels."""
    return sum(errors.values()) / len(errors)


def mean_ratio(errors: Mapping[str, float], baseline: Mapping[str, float]) -> float:
    """Mean over noise levels of how many times the baseline's error an error is: the score of comparisons."""
    ratios = [errors[sigma] / by for sigma, by in baseline.items() if by > 0]
    return sum(ratios) / len(ratios) if ratios else 1.0


def title(results: Mapping[str, Any]) -> str:
    """One line that says what was run."""
    config = results["config"]
    length = config["trainer"]
    labels = [objective_label(name, config) for name in results["objectives"]]
    versus = ("; " if len(labels) > 2 else " and ").join(labels)
    return (
        f"{versus} on {data_label(config)}: {length['grad_steps']:,} gradient steps "
        f"of {length['batch_size']} data, seed {results['seed']}"
    )


def figure_rows(found: Mapping[str, Any]) -> list[list[str]]:
    """A row a figure of one objective: its name for people, and the figure in three digits.

    Args:
        found: what ``results["objectives"]`` holds of it, or `diffrl.experiments.evaluate.evaluate_run` finds.
    """
    rows = []
    for error, label in ERRORS.items():
        at = "" if error == "map_error" else "σ = "
        rows += [
            [f"{label}, {at}{level.replace('->', ' → ')}", f"{x:#.3g}"]
            for level, x in found.get(error, {}).items()
        ]
    count = count_label(found["sample_distance"]["metric"])
    for label, by_nfe in quality_of(found).items():
        rows += [[f"{label}, {count}, NFE {nfe}", f"{x:#.3g}"] for nfe, x in by_nfe.items()]
    return rows


def split_line(results: Mapping[str, Any]) -> str:
    """One line that says which data the run held out; empty where it held out none."""
    return f"held out    {Split(**results['split'])}" if "split" in results else ""


def summary_table(results: Mapping[str, Any]) -> str:
    """One row a figure, one column an objective, each with its ratio to the baseline, of two in a last column.

    Without an oracle, and of what is no denoiser, there is no value error; runs of diffrl 0.2 and before have no
    denoising error.
    """
    objectives = results["objectives"]
    names, baseline = [*objectives], baseline_of(objectives)
    labels = [objective_label(name, results["config"]).replace(", ", "\n") for name in names]
    found = list(objectives.values())
    rows = [["", *labels, *["ratio"] * (len(names) == 2)]]

    def add(name: str, figures: list[float | None], text: str = "#.3g") -> None:
        shown = ["" if figure is None else format(figure, text).rstrip(".") for figure in figures]
        ratios = [""] * len(figures)
        if baseline is not None and (by := figures[names.index(baseline)]):
            ratios = [
                f"{figure / by:.2f}" if n != baseline and figure is not None else ""
                for n, figure in zip(names, figures, strict=True)
            ]
        if len(names) > 2:
            shown = [
                f"{s}  {ratio:>5}{' ×' if ratio else '  '}" for s, ratio in zip(shown, ratios, strict=True)
            ]
        rows.append([name, *shown, *ratios[:1] * (len(names) == 2)])

    for error, label in (("value_error", "value error"), ("denoising_error", "denoising error, test")):
        having = [f for f in found if f.get(error)]
        if not having or (error == "denoising_error" and len(having) < len(found)):
            continue
        for sigma in having[0][error]:
            add(f"{label}, σ = {sigma}", [f[error].get(sigma) for f in found])
        if len(names) > 2 and baseline is not None and (by := objectives[baseline][error]):
            ratios = [mean_ratio(f[error], by) if f[error] else None for f in found]
            shown = [
                "" if r is None or n == baseline else f"{r:.2f} ×" for n, r in zip(names, ratios, strict=True)
            ]
            rows.append([f"{label}, mean ratio", *shown])
        elif error == "value_error":
            add(f"{label}, mean", [mean_error(f[error]) if f[error] else None for f in found])
        rows.append([])
    for of in (_of_maps, _of_samples):
        for label, figures in of(found):
            add(label, figures)
        rows += [[]] if rows[-1] else []
    if row := bootstrap_row(names, results["config"]):
        rows.append([*row, *[""] * (len(names) == 2)])
    add("network evaluations in training", [f["network_evaluations"] for f in found], ",")
    add("seconds of training", [f["seconds"] for f in found], ".1f")
    add("milliseconds a gradient step", [1000 * f["seconds"] / f["grad_steps"] for f in found], ".1f")
    if any("forward_equivalents" in f for f in found):  # no run of diffrl 0.3 and before has them
        add("a gradient step, in forward passes", [f.get("forward_equivalents") for f in found], ".1f")
    count = count_label(found[0]["sample_distance"]["metric"])
    return f"{title(results)}\n\n{text_table(rows)}\n\nMeasures of samples are of {count}."


def _of_maps(found: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, list[float | None]]]:
    """The error of the map at each pair of times, by its row's name, as `_of_samples`."""
    maps = [f.get("map_error", {}) for f in found]
    for key in dict.fromkeys(key for errors in maps for key in errors):
        yield f"map error, {key.replace('->', ' → ')}", [errors.get(key) for errors in maps]


def _of_samples(found: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, list[float | None]]]:
    """Each measure of samples by its row's name: of every objective, None where it was not taken."""
    taken = [quality_of(f) for f in found]
    for label, by_nfe in taken[0].items():
        for nfe in by_nfe:
            yield f"{label}, NFE {nfe}", [of.get(label, {}).get(nfe) for of in taken]
