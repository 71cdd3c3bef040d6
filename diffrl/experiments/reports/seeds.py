"""The report of one training configuration at several seeds, from the folder alone: a table with intervals.

out/
  index.json      the seeds and their folders, the commands that were run
  cells/…         the run of each seed, a run folder as any other
  report.md       the table
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from diffrl.experiments.findings import Findings
from diffrl.experiments.reports.parts import commands_table
from diffrl.experiments.reports.run_table import (
    baseline_of,
    bootstrap_row,
    mean_error,
    objective_label,
    quality_of,
    title,
)
from diffrl.metrics.intervals import interval
from diffrl.text_files import write_atomically
from diffrl.text_tables import markdown_table, text_table
from diffrl.training.runs import RunFolder, RunFolderError

__all__ = ["SEEDS", "seeds_table", "write_seeds_report"]

SEEDS = ("seed",)
"""What places a run among those of other seeds."""


class _SeedFindings(Findings):
    """The runs of a configuration at several seeds."""

    where: ClassVar[tuple[str, ...]] = SEEDS

    def __init__(self, out: Path) -> None:
        super().__init__(out)
        self.results = [RunFolder(cell.path).results() for cell in self.finished()]
        """What results.json holds, of each finished run."""
        if not self.results:
            raise RunFolderError(f"{out}: no run is finished; the same command continues")


def seeds_table(out: Path) -> str:
    """Interquartile means over seeds with 95 % intervals, for a terminal.

    Args:
        out: folder of the comparison.

    Raises:
        RunFolderError: there is no comparison in the folder, or none of its runs is finished.
    """
    found = _SeedFindings(out)
    return f"{_title(found)}\n\n{text_table(_rows(found))}"


def write_seeds_report(out: Path) -> Path:
    """Write report.md anew from the runs that are finished; the others are listed. Returns its path.

    Args:
        out: folder of the comparison.

    Raises:
        RunFolderError: as `seeds_table`.
    """
    found = _SeedFindings(out)
    lines = [f"# {_title(found)}\n", commands_table(found.commands), markdown_table(_rows(found))]
    rows = [
        [str(cell.seed), cell.status, f"cells/{cell.path.name}", cell.error or ""] for cell in found.cells
    ]
    lines += ["## Runs\n", markdown_table([["seed", "", "folder", "why"], *rows])]
    write_atomically(out / "report.md", "\n".join(lines))
    return out / "report.md"


def _title(found: _SeedFindings) -> str:
    seeds = ", ".join(str(cell.seed) for cell in found.finished())
    what = title(found.results[0]).rpartition(", seed ")[0]
    return f"{what}, seeds {seeds}: interquartile mean and 95 % bootstrap interval"


def _rows(found: _SeedFindings) -> list[list[str]]:
    """One row a figure, one column an objective, and one for the ratio by seed of each to the baseline."""
    first = found.results[0]
    names = list(first["objectives"])
    labels = [objective_label(name, first["config"]) for name in names]
    baseline = baseline_of(names)
    others = [name for name in names if name != baseline] if baseline is not None else []
    ratios = ["ratio"] if len(others) == 1 else [f"× {objective_label(n, first['config'])}" for n in others]
    rows = [["", *labels, *ratios]]
    figures = {name: [_figures(results["objectives"][name]) for results in found.results] for name in names}
    for figure in dict.fromkeys(figure for name in names for figure in figures[name][0]):
        values = {name: np.array([by_name.get(figure) for by_name in figures[name]], float) for name in names}
        with np.errstate(divide="ignore", invalid="ignore"):
            shown = [*values.values(), *(values[name] / values[str(baseline)] for name in others)]
        rows.append([figure, *(_shown(x) for x in shown)])
    if row := bootstrap_row(names, first["config"]):
        rows.append([*row, *[""] * len(others)])
    return rows


def _shown(x: np.ndarray) -> str:
    if np.isnan(x).all():  # none was taken
        return ""
    return f"{interval(x):#.3g}" if np.isfinite(x).all() else "not finite"


def _figures(found: Mapping[str, Any]) -> dict[str, float]:
    """The figures of an objective in a run, by words for people."""
    errors = found["value_error"]
    figures = {f"value error, σ = {sigma}": error for sigma, error in errors.items()}
    if errors:
        figures["value error, mean"] = mean_error(errors)
    figures |= {f"map error, {key.replace('->', ' → ')}": x for key, x in found.get("map_error", {}).items()}
    figures |= {
        f"{label}, NFE {nfe}": x for label, by_nfe in quality_of(found).items() for nfe, x in by_nfe.items()
    }
    return {**figures, "seconds of training": found["seconds"]}
