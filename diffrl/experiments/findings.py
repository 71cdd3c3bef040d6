"""What the finished cells of a comparison say: figures by seed, intervals, effort to reach a level."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from diffrl.experiments.comparison import Study, cell_error, read_index
from diffrl.metrics.seeds import bootstrap_interval, iqm, probability_of_improvement
from diffrl.training.runs import RunFolder
from diffrl.training.table import Table

__all__ = ["Curve", "Effort", "Estimate", "Finding", "Findings", "Interval", "Panel", "Quantity", "interval"]

COSTS = ("grad_steps", "samples", "network_evaluations", "seconds")


class Quantity(NamedTuple):
    """Something measured, of which less is better."""

    kind: str
    """"score", "value_error" or "sample_distance"."""
    at: str
    """σ or the number of network evaluations, as keys of results.json; empty for the score."""


SCORE = Quantity("score", "")


class Interval(NamedTuple):
    """Interquartile mean over seeds and its 95 % bootstrap interval; the ends are None for one seed."""

    iqm: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Estimate:
    """A scheme's figure over seeds.

    Args:
        seeds: those at which both the scheme and the baseline are finished.
        value: of the figure itself; None for the score, which is a ratio.
        ratio: of the figure over the baseline's at the same seed.
        probability: of improvement over the baseline, seed by seed, as the two share data, noise and weights.
    """

    seeds: tuple[int, ...]
    value: Interval | None
    ratio: Interval
    probability: float


class Curve(NamedTuple):
    """A run's score while it trains: mean over σ of value error over the baseline's *last* at that seed."""

    grad_steps: NDArray[np.float64]
    network_evaluations: NDArray[np.float64]
    score: NDArray[np.float64]


@dataclass(frozen=True)
class Effort:
    """What a scheme spends until its score is the baseline's last, as a share of all that the baseline spent.

    Args:
        seeds: how many were looked at.
        reached: at how many of them the level was reached.
        grad_steps: share of gradient steps; None unless reached at every seed.
        network_evaluations: share of network evaluations; None unless reached at every seed.
    """

    seeds: int
    reached: int
    grad_steps: Interval | None
    network_evaluations: Interval | None


@dataclass(frozen=True)
class Finding:
    """A cell and, if it is finished, its figures.

    Args:
        study: name of the study.
        case: name of the case.
        scheme: name of the scheme.
        seed: of the run.
        path: the cell's folder.
        status: "finished", "failed", "stopped" (begun, not finished) or "missing".
        error: one line on why it failed.
        figures: the objective's entry in results.json.
    """

    study: str
    case: str
    scheme: str
    seed: int
    path: Path
    status: str
    error: str | None
    figures: Mapping[str, Any]

    @classmethod
    def read(cls, entry: Mapping[str, Any], root: Path) -> "Finding":
        """From an entry of the index."""
        path = root / entry["folder"]
        objectives = RunFolder(path).results().get("objectives")
        error = cell_error(path)
        if objectives:
            status = "finished"
        elif error is not None:
            status = "failed"
        else:
            status = "stopped" if (path / "config.yaml").exists() else "missing"
        figures = next(iter(objectives.values())) if objectives else {}
        where = (entry["study"], entry["case"], entry["scheme"], entry["seed"])
        return cls(*where, path, status, error, figures)

    def get(self, quantity: Quantity) -> float:
        """A figure; NaN where it was not taken."""
        entry = self.figures[quantity.kind]
        return float(
            (entry["by_nfe"] if quantity.kind == "sample_distance" else entry).get(quantity.at, math.nan)
        )

    def row(self) -> dict[str, Any]:
        """All figures under flat names."""
        row = {k: getattr(self, k) for k in ("study", "case", "scheme", "seed", "status")}
        row |= {cost: self.figures.get(cost) for cost in COSTS}
        row |= {f"value_error_{s}": e for s, e in self.figures.get("value_error", {}).items()}
        distance = self.figures.get("sample_distance", {"by_nfe": {}})
        row |= {f"sample_distance_nfe_{n}": d for n, d in distance["by_nfe"].items()}
        return {**row, "metric": distance.get("metric"), "folder": self.path.name, "error": self.error}


@dataclass(frozen=True, eq=False)
class Panel:
    """A study on one case.

    Args:
        study: the study.
        case: the case.
        score_sigmas: σ whose value errors make the score.
        cells: finished cells by scheme and seed.
    """

    study: Study
    case: str
    score_sigmas: tuple[str, ...]
    cells: Mapping[str, Mapping[int, Finding]]

    @property
    def schemes(self) -> list[str]:
        """Those with a finished cell, in the study's order."""
        return [scheme for scheme in self.study.schemes if self.cells.get(scheme)]

    @property
    def compared(self) -> list[str]:
        """Those that share a finished seed with the baseline, the baseline among them."""
        return [scheme for scheme in self.schemes if self.seeds(scheme)]

    @cached_property
    def quantities(self) -> list[Quantity]:
        """What was measured at every finished cell; the score first, if its value errors were."""
        figures = [cell.figures for cells in self.cells.values() for cell in cells.values()]
        if not figures:
            return []
        errors = [s for s in figures[0]["value_error"] if all(s in f["value_error"] for f in figures)]
        nfes = figures[0]["sample_distance"]["by_nfe"]
        nfes = [n for n in nfes if all(n in f["sample_distance"]["by_nfe"] for f in figures)]
        found = [
            *(Quantity("value_error", s) for s in errors),
            *(Quantity("sample_distance", n) for n in nfes),
        ]
        return [SCORE, *found] if set(self.score_sigmas) <= set(errors) else found

    @property
    def metric(self) -> str:
        """Of the sample distance, as in results.json."""
        return next(
            cell.figures["sample_distance"]["metric"]
            for cells in self.cells.values()
            for cell in cells.values()
        )

    def seeds(self, scheme: str) -> tuple[int, ...]:
        """Those at which both the scheme and the baseline are finished."""
        baseline = self.cells.get(self.study.baseline, {})
        return tuple(
            seed for seed in self.study.seeds if seed in self.cells.get(scheme, {}) and seed in baseline
        )

    def values(self, scheme: str, quantity: Quantity) -> NDArray[np.float64]:
        """The figure at each of `seeds`."""
        return np.array([self.cells[scheme][seed].get(quantity) for seed in self.seeds(scheme)])

    def ratios(self, scheme: str, quantity: Quantity) -> NDArray[np.float64]:
        """The figure over the baseline's, at each of `seeds`; the score is the mean over its σ of these."""
        if quantity == SCORE:
            return np.mean(
                [self.ratios(scheme, Quantity("value_error", s)) for s in self.score_sigmas], axis=0
            )
        baseline = [self.cells[self.study.baseline][seed].get(quantity) for seed in self.seeds(scheme)]
        return self.values(scheme, quantity) / np.array(baseline)

    @cached_property
    def estimates(self) -> dict[tuple[str, Quantity], Estimate | None]:
        """Of every compared scheme and every quantity; None where a figure is not finite."""
        return {(s, q): self._estimate(s, q) for s in self.compared for q in self.quantities}

    def _estimate(self, scheme: str, quantity: Quantity) -> Estimate | None:
        ratios = self.ratios(scheme, quantity)
        if not np.isfinite(ratios).all():
            return None
        value = None if quantity == SCORE else interval(self.values(scheme, quantity))
        better = probability_of_improvement(np.ones((1, len(ratios))), ratios[None])  # each seed is a task
        return Estimate(self.seeds(scheme), value, interval(ratios), better)

    def costs(self, scheme: str) -> dict[str, float]:
        """Interquartile mean of what a run of the scheme spent."""
        cells = self.cells[scheme].values()
        return {cost: float(iqm([cell.figures[cost] for cell in cells])) for cost in COSTS}

    def is_matched(self, scheme: str) -> bool:
        """Whether the scheme spent what the baseline did, by 1 % (seconds: 10 %), on the study's axis."""
        axis = self.study.matched
        spent, baseline = (self.costs(s)[axis] for s in (scheme, self.study.baseline))
        return abs(spent - baseline) <= (0.1 if axis == "seconds" else 0.01) * baseline

    def curve(self, scheme: str, seed: int) -> Curve:
        """The score of a run while it trains."""
        cell, baseline = self.cells[scheme][seed], self.cells[self.study.baseline][seed]
        names = [f"value_error_{s}" for s in self.score_sigmas]
        rows = [r for r in Table(cell.path / "metrics.csv", ()).rows() if all(r.get(name) for name in names)]
        level = np.array([baseline.figures["value_error"][s] for s in self.score_sigmas])
        errors = np.array([[float(row[name]) for name in names] for row in rows]).reshape(
            len(rows), len(names)
        )
        steps, evaluations = (
            np.array([float(row[c]) for row in rows]) for c in ("grad_steps", "network_evaluations")
        )
        return Curve(steps, evaluations, (errors / level).mean(1))

    def effort(self, scheme: str) -> Effort:
        """Until the first evaluation at which the score is at most 1."""
        shares = []
        for seed in self.seeds(scheme):
            curve, spent = self.curve(scheme, seed), self.cells[self.study.baseline][seed].figures
            hit = np.flatnonzero(curve.score <= 1 + 1e-9)
            if len(hit):
                first = hit[0]
                steps = curve.grad_steps[first] / spent["grad_steps"]
                shares.append((steps, curve.network_evaluations[first] / spent["network_evaluations"]))
        seeds = len(self.seeds(scheme))
        if len(shares) < seeds:
            return Effort(seeds, len(shares), None, None)
        steps, evaluations = np.array(shares).T
        return Effort(seeds, len(shares), interval(steps), interval(evaluations))


class Findings:
    """Everything in the folder of a comparison.

    Args:
        out: the folder.

    Raises:
        RunFolderError: there is no comparison in it.
    """

    def __init__(self, out: Path) -> None:
        index = read_index(out)
        self.plan: str = index["plan"]
        self.commands: list[dict[str, Any]] = index["commands"]
        self.score_sigmas = tuple(index["score_sigmas"])
        self.studies = [_study(study) for study in index["studies"]]
        self.cells = [Finding.read(entry, out / "cells") for entry in index["cells"]]

    def panels(self) -> Iterator[Panel]:
        """Every study on each of its cases."""
        for study in self.studies:
            for case in study.cases:
                cells: dict[str, dict[int, Finding]] = {}
                for cell in self.cells:
                    if (cell.study, cell.case, cell.status) == (study.name, case, "finished"):
                        cells.setdefault(cell.scheme, {})[cell.seed] = cell
                yield Panel(study, case, self.score_sigmas, cells)

    def unfinished(self) -> list[Finding]:
        """Cells without figures, each folder once."""
        return list({cell.path: cell for cell in self.cells if cell.status != "finished"}.values())


def interval(x: Sequence[float] | NDArray[np.float64]) -> Interval:
    """Of figures by seed."""
    if len(x) < 2:
        return Interval(float(iqm(x)), None, None)
    return Interval(float(iqm(x)), *bootstrap_interval(x))


def _study(entry: Mapping[str, Any]) -> Study:
    lists = {k: tuple(entry[k]) for k in ("cases", "schemes", "seeds")}
    axes = {label: tuple(values) for label, values in entry["axes"].items()}
    return Study(entry["name"], entry["title"], entry["baseline"], entry["matched"], **lists, axes=axes)
