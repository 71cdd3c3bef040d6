"""The figure of sample quality: every measure by network evaluations, and while the network trained."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffrl.experiments.reports.run_table import count_label, distance_label, objective_label, title
from diffrl.experiments.reports.style import PALETTE, drawing, name_ticks, save_figure, write_title
from diffrl.training.runs import RunFolder
from diffrl.training.table import Table

__all__ = ["draw_quality"]

Rows = list[dict[str, Any]]  # a row a point: panel, figure, objective, nfe, grad_steps, value


def draw_quality(folder: str | Path) -> Path | None:
    """Draw what was measured of samples beside the distance, or in training; None where there was neither.

    Writes plots/quality.png and .pdf, and the numbers shown in plots/quality.csv.

    Args:
        folder: a run folder in which at least one objective is done.

    Returns:
        The png's path.

    Raises:
        MissingExtra: matplotlib is not installed.
        RunFolderError: there is no run in the folder.
    """
    run = RunFolder.open(Path(folder))
    results = run.results()
    at_end = _at_end(results["objectives"])
    looks = _in_training(Table(run.path / "metrics.csv", ()).rows())
    figures = list(dict.fromkeys(row["figure"] for row in at_end))
    if len(figures) < 2 and not looks:
        return None
    names = {name: objective_label(name, results["config"]) for name in results["objectives"]}
    across = 1 + bool(looks)
    with drawing(figsize=(4.6 * across, 0.6 + 2.9 * len(figures))) as figure:
        panels = figure.subplots(len(figures), across, squeeze=False)
        for of, axes in zip(figures, panels, strict=True):
            _draw(axes[0], [row for row in at_end if row["figure"] == of], names, "nfe")
            axes[0].set(xscale="log", xlabel="network evaluations per sample (NFE)")
            name_ticks(axes[0], list(dict.fromkeys(str(row["nfe"]) for row in at_end)))
            axes[0].set_ylabel(f"{distance_label(of)}\n{count_label(of)}")
            if looks:
                most = max(row["nfe"] for row in looks)
                mine = [row for row in looks if row["figure"] == of and row["nfe"] == most]
                _draw(axes[1], mine, names, "grad_steps")
                axes[1].set(xlabel="gradient steps", ylabel=f"at NFE {most}")
        panels[0][0].legend()
        write_title(figure, title(results))
        return save_figure(figure, run.path / "plots" / "quality.png", rows=[*at_end, *looks])


def _draw(axes: Any, rows: Rows, names: Mapping[str, str], x: str) -> None:
    """A line for each objective."""
    for (name, label), (colour, marker) in zip(names.items(), _looks(len(names)), strict=True):
        mine = sorted((row[x], row["value"]) for row in rows if row["objective"] == name)
        axes.plot(*zip(*mine, strict=True), color=colour, marker=marker, markersize=4, label=label)


def _looks(n: int) -> list[tuple[str, str]]:
    return [PALETTE[i % len(PALETTE)] for i in range(n)]


def _at_end(objectives: Mapping[str, Any]) -> Rows:
    """The figures of results.json."""
    return [
        _row("end", figure, name, int(nfe), found["grad_steps"], value)
        for name, found in objectives.items()
        for figure, by_nfe in {
            found["sample_distance"]["metric"]: found["sample_distance"]["by_nfe"],
            **found.get("quality", {}),
        }.items()
        for nfe, value in by_nfe.items()
    ]


def _in_training(table: Sequence[Mapping[str, str]]) -> Rows:
    """The figures of metrics.csv, by their columns."""
    columns = [(name, re.fullmatch(r"(.+@.+)_nfe(\d+)", name)) for name in (table[0] if table else ())]
    return [
        _row("training", of[1], row["objective"], int(of[2]), int(row["grad_steps"]), float(row[name]))
        for row in table
        for name, of in columns
        if of is not None and row[name]
    ]


def _row(panel: str, figure: str, objective: str, nfe: int, steps: int, value: float) -> dict[str, Any]:
    names = ("panel", "figure", "objective", "nfe", "grad_steps", "value")
    return dict(zip(names, (panel, figure, objective, nfe, steps, value), strict=True))
