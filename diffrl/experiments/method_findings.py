"""What the finished runs of fine-tuning methods say: figures by seed, over three costs and at the end."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffrl.experiments.findings import Finding, Findings
from diffrl.finetuning.evaluation import TO_BASE, TuningEvaluation, to_base_of
from diffrl.training.runs import RunFolder

__all__ = ["AXES", "Method", "MethodFindings"]

Array = NDArray[np.float64]
AXES = {"trajectories": "trajectories", "queries": "reward queries", "updates": "optimiser updates"}
FIGURES = {
    "eval_reward": "reward, held-out noise",
    "heldout_reward": "held-out reward",
    "diversity": "diversity",
    TO_BASE: "distance to base",
    "kl_to_base": "KL to base, nats",
}


@dataclass(frozen=True)
class Method:
    """The finished runs of a method.

    Args:
        name: of the method.
        seeds: of the runs.
        rows: of each run, its evaluations in order: figures by name.
        spread: of each run, the standard deviation of its advantages before scaling, by iteration.
        costs: of each run, its counts at the end.
        folders: of the runs.
    """

    name: str
    seeds: tuple[int, ...]
    rows: tuple[list[dict[str, float]], ...]
    spread: tuple[list[float], ...]
    costs: tuple[Mapping[str, float], ...]
    folders: tuple[Path, ...]

    @classmethod
    def read(cls, name: str, runs: Sequence[Finding]) -> "Method":
        """A method from its finished runs."""
        tables = [_rows(run) for run in runs]
        return cls(
            name,
            seeds=tuple(run.seed for run in runs),
            rows=tuple([_numbers(row) for row in table if row["eval_reward"]] for table in tables),
            spread=tuple(
                [float(row["raw_advantage_std"]) for row in table if row["raw_advantage_std"]]
                for table in tables
            ),
            costs=tuple(run.figures for run in runs),
            folders=tuple(run.path for run in runs),
        )

    def curve(self, figure: str, axis: str) -> tuple[Array, Array]:
        """At the evaluations that all runs have: the axis [n], a mean over seeds, and the figure [seeds, n]."""
        n = min(len(rows) for rows in self.rows)
        x = np.array([[row[axis] for row in rows[:n]] for rows in self.rows]).mean(0)
        return x, np.array([[row[figure] for row in rows[:n]] for rows in self.rows])

    def at(self, figure: str, axis: str, x: float) -> Array:
        """The figure at a place of the axis, interpolated between evaluations, by seed."""
        return np.array(
            [np.interp(x, [r[axis] for r in rows], [r[figure] for r in rows]) for rows in self.rows]
        )

    def last(self, figure: str) -> Array:
        """The figure at the end, by seed."""
        return np.array([rows[-1][figure] for rows in self.rows])

    def first(self, figure: str) -> Array:
        """The figure before tuning, by seed."""
        return np.array([rows[0][figure] for rows in self.rows])


def _rows(run: Finding) -> list[dict[str, str]]:
    """Of metrics.csv, the distance to the base by the name that it has now."""
    rows = run.rows()
    if rows and TO_BASE in rows[0]:
        name = TuningEvaluation(**RunFolder(run.path).config()["evaluation"]).to_base
        rows = [{name if key == TO_BASE else key: value for key, value in row.items()} for row in rows]
    return rows


def _numbers(row: Mapping[str, str]) -> dict[str, float]:
    """The figures that a row of metrics.csv has."""
    return {key: float(value) for key, value in row.items() if value}


class MethodFindings(Findings):
    """Everything in the folder of a comparison of fine-tuning methods.

    Args:
        out: the folder.

    Raises:
        RunFolderError: there is no comparison in it, or one of another kind.
    """

    where = ("method", "seed")

    def __init__(self, out: Path) -> None:
        super().__init__(out)
        names = dict.fromkeys(cell.where["method"] for cell in self.cells)
        found = {name: self.finished(method=name) for name in names}
        self.methods = [Method.read(name, cells) for name, cells in found.items() if cells]
        self.config: dict[str, Any] = {}
        """The configuration of the first finished run."""
        if self.methods:
            self.config = RunFolder(self.methods[0].folders[0]).config()

    @property
    def figures(self) -> dict[str, str]:
        """What every run measured: name, and words for it."""
        rows = [run[-1] for method in self.methods for run in method.rows]
        named = {
            to_base_of(rows[-1]) if key == TO_BASE else key: words for key, words in FIGURES.items() if rows
        }
        return {name: words for name, words in named.items() if all(name in row for row in rows)}

    def common(self, axis: str) -> float:
        """How far all runs went on an axis."""
        return min(rows[-1][axis] for method in self.methods for rows in method.rows)
