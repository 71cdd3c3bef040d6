"""What a run found, from its results.json: names for people, and one table."""

from collections.abc import Mapping
from inspect import signature
from pathlib import Path
from typing import Any

from diffrl.objectives.registry import OBJECTIVES
from diffrl.objectives.stand_ins import StandIn
from diffrl.registry import accepted
from diffrl.text_tables import text_table

__all__ = ["data_label", "distance_label", "mean_value_error", "objective_label", "summary_table", "title"]

DISTANCES = {
    "w2": "W2 distance",
    "sliced_w2": "sliced W2 distance",
    "mmd": "squared MMD",
    "fd_digits_cnn": "Fréchet distance (digits_cnn)",
}


def objective_label(name: str, config: Mapping[str, Any]) -> str:
    """Name of an objective for people, such as "TD(λ=0.5)"; its key if no objective of that name is known here.

    Args:
        name: its key in ``results["objectives"]``.
        config: the run's configuration; options that it lacks are taken to have the defaults of today.
    """
    if name not in OBJECTIVES:
        return name
    entry = OBJECTIVES.entry(name)
    parameters = [p for function in entry.functions for p in signature(function).parameters.values()]
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
    options = config.get("objective", {})
    label = entry.label_for({**defaults, **options})
    beside = name != options.get("name", name)  # Monte Carlo beside it, whose target is the datum
    return label if beside else StandIn(**accepted(StandIn, config.get("chain", {}))).label(label)


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
    """Name for people of ``results["objectives"][...]["sample_distance"]["metric"]``, without the count."""
    name = metric.partition("@")[0]
    return DISTANCES.get(name, name)


def mean_value_error(errors: Mapping[str, float]) -> float:
    """Mean over noise levels."""
    return sum(errors.values()) / len(errors)


def title(results: Mapping[str, Any]) -> str:
    """One line that says what was run."""
    config = results["config"]
    length = config["trainer"]
    versus = " and ".join(objective_label(name, config) for name in results["objectives"])
    return (
        f"{versus} on {data_label(config)}: {length['grad_steps']:,} gradient steps "
        f"of {length['batch_size']} data, seed {results['seed']}"
    )


def summary_table(results: Mapping[str, Any]) -> str:
    """One row a figure, one column an objective; of two objectives, a last column with their ratio."""
    objectives = results["objectives"]
    labels = [objective_label(name, results["config"]) for name in objectives]
    found = list(objectives.values())
    rows = [["", *labels]]
    two = len(found) == 2
    if two:
        rows[0].append("ratio")

    def add(name: str, figures: list[float], text: str = "#.3g") -> None:
        row = [name, *(format(figure, text).rstrip(".") for figure in figures)]
        rows.append([*row, f"{figures[0] / figures[1]:.2f}" if two and figures[1] else ""][: len(rows[0])])

    for sigma in found[0]["value_error"]:
        add(f"value error, σ = {sigma}", [f["value_error"][sigma] for f in found])
    if found[0]["value_error"]:
        add("value error, mean", [mean_value_error(f["value_error"]) for f in found])
        rows.append([])
    if all("denoising_error" in f for f in found):  # runs of diffrl 0.2 and before have none
        for sigma in found[0]["denoising_error"]:
            add(f"denoising error, test, σ = {sigma}", [f["denoising_error"][sigma] for f in found])
        rows.append([])
    distance = distance_label(found[0]["sample_distance"]["metric"])
    for nfe in found[0]["sample_distance"]["by_nfe"]:
        add(f"{distance}, NFE {nfe}", [f["sample_distance"]["by_nfe"][nfe] for f in found])
    rows.append([])
    add("network evaluations in training", [f["network_evaluations"] for f in found], ",")
    add("seconds of training", [f["seconds"] for f in found], ".1f")
    return f"{title(results)}\n\n{text_table(rows)}"
