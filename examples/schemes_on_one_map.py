"""The schemes of the field in one picture, from the runs of `compare plan=maps`.

    python examples/schemes_on_one_map.py runs/compare_maps

A row a scheme: the distance of its samples in few and in many network evaluations, what its network is off by, and
what a gradient step costs. Denoisers, consistency functions and flow maps are apart. A picture for each study and case,
with its numbers as CSV, beside the report.
"""

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from diffrl.experiments.findings import Finding
from diffrl.experiments.reports.run_table import distance_label
from diffrl.experiments.reports.style import (
    GREY,
    PALETTE,
    drawing,
    plain_ticks,
    save_figure,
    write_note,
    write_title,
)
from diffrl.experiments.study_findings import Panel, StudyFindings
from diffrl.metrics.intervals import Interval, interval
from diffrl.objectives.solutions import solution_of
from diffrl.training.runs import RunFolder

KINDS = {"denoiser": "denoisers", "to_clean": "consistency functions", "map": "flow maps"}
COST = "forward passes a step"
Figure = Callable[[Mapping[str, Any]], float | None]
ERRORS = {"value error": "value_error", "map error": "map_error", "held-out error": "denoising_error"}
"""Of data that are read, value error is against the denoiser that knows the training rows by heart, and held-out
denoising error stands beside it; of a known law the latter says nothing new."""


def kind_of(panel: Panel, scheme: str) -> str:
    """What a scheme learns."""
    path = next(iter(panel.cells[scheme].values())).path
    return solution_of(RunFolder(path).config()["objective"]["name"])


def by_kind(panel: Panel) -> dict[str, list[str]]:
    """The schemes of each kind, in the order of the study."""
    kinds = {scheme: kind_of(panel, scheme) for scheme in panel.schemes}
    return {kind: [s for s, found in kinds.items() if found == kind] for kind in KINDS}


def over_seeds(panel: Panel, scheme: str, of: Figure) -> Interval | None:
    """A figure of a scheme over its seeds; None where it was not measured."""
    cells: list[Finding] = [panel.cells[scheme][seed] for seed in panel.seeds(scheme)]
    values = [of(cell.figures) for cell in cells]
    kept = [value for value in values if value is not None]
    return interval(kept) if kept and len(kept) == len(values) else None


def mean_of(errors: Mapping[str, float] | None) -> float | None:
    """Geometric mean over noise levels, or pairs of times: no one of them decides alone."""
    return float(np.exp(np.mean(np.log(list(errors.values()))))) if errors else None


def quantities(panel: Panel) -> dict[str, Figure]:
    """What is told of each scheme: by name, how it is read from the figures of a run."""

    def distance(n: int) -> Figure:
        return lambda figures: figures["sample_distance"]["by_nfe"].get(str(n))

    def error(key: str) -> Figure:
        return lambda figures: mean_of(figures.get(key))

    runs = [cell.figures for cells in panel.cells.values() for cell in cells.values()]
    evaluations = sorted({int(n) for figures in runs for n in figures["sample_distance"]["by_nfe"]})
    found = {f"NFE {n}": distance(n) for n in evaluations}
    found |= {name: error(key) for name, key in ERRORS.items() if key != "denoising_error" or panel.is_real}
    return {**found, COST: lambda figures: figures.get("forward_equivalents")}


def rows_of(panel: Panel) -> list[dict[str, Any]]:
    """The numbers of the picture, a line for each scheme."""
    rows = []
    for kind, schemes in by_kind(panel).items():
        for scheme in schemes:
            row: dict[str, Any] = {"kind": kind, "scheme": scheme, "seeds": len(panel.seeds(scheme))}
            for name, figure in quantities(panel).items():
                value = over_seeds(panel, scheme, figure) or (None, None, None)
                row |= dict(zip((name, f"{name} low", f"{name} high"), value, strict=True))
            rows.append(row)
    return rows


def draw(panel: Panel, folder: Path) -> Path:
    """Draw one study on one case."""
    import matplotlib as mpl

    rows = rows_of(panel)
    counts = [name for name in rows[0] if name.startswith("NFE") and name.split()[-1].isdigit()]
    colors = mpl.colormaps["viridis"](np.linspace(0.9, 0, len(counts)))
    heights = [-(i + list(KINDS).index(row["kind"])) for i, row in enumerate(rows)]  # a gap between kinds
    with drawing(figsize=(11, 1.6 + 0.27 * (len(rows) + 2))) as figure:
        samples, errors, cost = figure.subplots(1, 3, sharey=True, width_ratios=(5, 3, 2))
        for color, name in zip(colors, counts, strict=True):
            _dots(samples, rows, heights, name, color=color, marker="o", label=name)
        for name, (color, marker) in zip(ERRORS, PALETTE, strict=False):
            if name in rows[0]:
                _dots(errors, rows, heights, name, color=color, marker=marker, label=name)
        _dots(cost, rows, heights, COST, color=GREY, marker="s", label=None)
        for axes, names in ((samples, counts), (errors, [name for name in ERRORS if name in rows[0]])):
            if middles := [row[name] for row in rows for name in names if row[name] is not None]:
                axes.set_xlim(0.7 * min(middles), 2 * max(middles))  # one that diverged hides no other
        distance = f"samples: {distance_label(panel.metric)}"
        for axes, title in ((samples, distance), (errors, "error of the network"), (cost, COST)):
            axes.set(xscale="log", title=title)
            plain_ticks(axes.xaxis, most=6)
            axes.grid(axis="y", visible=False)
        for axes in (samples, errors):
            axes.legend(fontsize=7)
        _names(samples, rows, heights)
        samples.set_ylim(min(heights) - 0.8, max(heights) + 2.6)  # room for the legends above the first row
        about = panel.study.title
        write_title(figure, f"{about[:1].upper()}{about[1:]} ({panel.case})")
        seeds = " to ".join(map(str, sorted({row["seeds"] for row in rows})))
        note = (
            f"Interquartile mean and 95 % interval over {seeds} seeds, which may end at the edge; errors are geometric "
            "means over noise levels or pairs of times. Less is better. "
            f"Matched: {panel.study.matched.replace('_', ' ')}."
        )
        write_note(figure, note)
        return save_figure(figure, folder / f"schemes_{panel.study.name}_{panel.case}.png", rows=rows)


def _names(axes: Any, rows: list[dict[str, Any]], heights: list[int]) -> None:
    """The schemes on the left, and of which kind they are above the first of each."""
    axes.set_yticks(heights, [row["scheme"] for row in rows])
    for kind, name in KINDS.items():
        places = [h for h, row in zip(heights, rows, strict=True) if row["kind"] == kind]
        if places:
            at = {"xy": (0, max(places) + 0.55), "xycoords": ("axes fraction", "data")}
            axes.annotate(name, **at, fontsize=8, style="italic")


def _dots(axes: Any, rows: list[dict[str, Any]], heights: list[int], name: str, **style: Any) -> None:
    """Points with their intervals, of the schemes that have the figure."""
    having = [(row, h) for row, h in zip(rows, heights, strict=True) if row[name] is not None]
    if not having:
        return
    x = np.array([row[name] for row, _ in having])
    ends = [
        [abs(x_i - (row[f"{name} {end}"] or x_i)) for x_i, (row, _) in zip(x, having, strict=True)]
        for end in ("low", "high")
    ]
    axes.errorbar(x, [h for _, h in having], xerr=ends, linewidth=0, elinewidth=1, markersize=4.5, **style)


def main(out: Path) -> list[Path]:
    """Draw every study on every case that has finished cells; returns the pictures' paths."""
    return [draw(panel, out / "figures") for panel in StudyFindings(out).panels() if panel.schemes]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="folder of the comparison")
    for path in main(parser.parse_args().out):
        print(path)
