"""What the finished runs of a fine-tuning comparison say: curves by seed over three costs, and how they end."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffrl.experiments.comparison import cell_error, read_index
from diffrl.training.runs import RunFolder
from diffrl.training.table import Table

__all__ = ["AXES", "Method", "Tuning"]

Array = NDArray[np.float64]
AXES = {"trajectories": "trajectories", "queries": "reward queries", "updates": "optimiser updates"}
FIGURES = {
    "eval_reward": "reward, held-out noise",
    "heldout_reward": "held-out reward",
    "diversity": "diversity",
    "distance_to_base": "distance to base",
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

    def curve(self, figure: str, axis: str) -> tuple[Array, Array]:
        """The axis [n], a mean over seeds, and the figure [seeds, n], at the evaluations that all runs have."""
        n = min(len(rows) for rows in self.rows)
        x = np.array([[row[axis] for row in rows[:n]] for rows in self.rows]).mean(0)
        return x, np.array([[row[figure] for row in rows[:n]] for rows in self.rows])

    def at(self, figure: str, axis: str, x: float) -> Array:
        """The figure at a place of the axis, interpolated between evaluations: [seeds]."""
        return np.array(
            [np.interp(x, [r[axis] for r in rows], [r[figure] for r in rows]) for rows in self.rows]
        )

    def last(self, figure: str) -> Array:
        """The figure at the end: [seeds]."""
        return np.array([rows[-1][figure] for rows in self.rows])

    def first(self, figure: str) -> Array:
        """The figure before tuning: [seeds]."""
        return np.array([rows[0][figure] for rows in self.rows])


class Tuning:
    """Everything in the folder of a fine-tuning comparison.

    Args:
        out: the folder.

    Raises:
        RunFolderError: there is no comparison in it.
    """

    def __init__(self, out: Path) -> None:
        index = read_index(out)
        self.commands: list[dict[str, Any]] = index["commands"]
        self.unfinished: list[tuple[str, str]] = []
        found: dict[str, list[tuple[int, Path]]] = {}
        for cell in index["cells"]:
            path = out / "cells" / cell["folder"]
            if RunFolder(path).results():
                found.setdefault(cell["method"], []).append((cell["seed"], path))
            else:
                self.unfinished.append((cell["folder"], cell_error(path) or "not finished"))
        self.methods = [_method(name, runs) for name, runs in found.items()]
        self.config: dict[str, Any] = {}
        if self.methods:
            self.config = RunFolder(self.methods[0].folders[0]).config()

    @property
    def figures(self) -> dict[str, str]:
        """What every run measured: name → words for it."""
        rows = [run[-1] for method in self.methods for run in method.rows]
        return {name: words for name, words in FIGURES.items() if rows and all(name in row for row in rows)}

    def common(self, axis: str) -> float:
        """How far all runs went on an axis."""
        return min(rows[-1][axis] for method in self.methods for rows in method.rows)


def _method(name: str, runs: Sequence[tuple[int, Path]]) -> Method:
    rows, spread, costs = [], [], []
    for _, path in runs:
        table = Table(path / "metrics.csv", ()).rows()
        rows.append([{k: float(v) for k, v in row.items() if v} for row in table if row["eval_reward"]])
        spread.append([float(row["raw_advantage_std"]) for row in table if row["raw_advantage_std"]])
        costs.append(RunFolder(path).results()["finetuning"])
    seeds, folders = (tuple(column) for column in zip(*runs, strict=True))
    return Method(name, seeds, tuple(rows), tuple(spread), tuple(costs), folders)
