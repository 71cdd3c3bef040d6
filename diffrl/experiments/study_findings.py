"""What the finished cells of training studies say: each scheme against the baseline at the same seeds."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from diffrl.data import files
from diffrl.experiments.findings import Finding, Findings
from diffrl.experiments.rates import Choice
from diffrl.experiments.studies import WHERE, Study
from diffrl.metrics.intervals import Interval, interval
from diffrl.metrics.seeds import iqm, probability_of_improvement
from diffrl.training.runs import RunFolder

__all__ = [
    "COSTS",
    "HELD_OUT",
    "MEANS",
    "SCORE",
    "STEP_COST",
    "Curve",
    "Effort",
    "Estimate",
    "Panel",
    "Quantity",
    "StudyFindings",
]

Array = NDArray[np.float64]

COSTS = ("grad_steps", "samples", "network_evaluations", "seconds")
STEP_COST = "forward_equivalents"
"""Of one step, not of a run: see `diffrl.training.step_cost`."""


class Quantity(NamedTuple):
    """Something measured, of which less is better."""

    kind: str
    """"score", "value_error", "denoising_error" or "sample_distance"."""
    at: str
    """σ or the number of network evaluations, as keys of results.json; empty for a mean over σ."""


SCORE = Quantity("score", "")
"""Mean over σ of the value errors, each over the baseline's."""

HELD_OUT = Quantity("denoising_error", "")
"""The same of the denoising errors on held-out points; on real data alone, where the value error is that of training
rows. Of a known law it is the value error plus a constant, and says nothing new."""

MEANS = {SCORE: "value_error", HELD_OUT: "denoising_error"}
"""Means over σ, and of what."""


@dataclass(frozen=True)
class Estimate:
    """What a figure of a scheme comes to over seeds.

    Args:
        seeds: those at which both the scheme and the baseline are finished.
        value: of the figure itself; None for a mean over σ, which is of ratios.
        ratio: of the figure over the baseline's at the same seed.
        probability: of improvement over the baseline: the share of seeds at which the scheme is better. At one seed
            the two share data, noise and first weights.
    """

    seeds: tuple[int, ...]
    value: Interval | None
    ratio: Interval
    probability: float


class Curve(NamedTuple):
    """A run's score at each evaluation: the mean over σ of its errors, each over the baseline's *last* one."""

    grad_steps: Array
    network_evaluations: Array
    score: Array


@dataclass(frozen=True)
class Effort:
    """What a scheme spends until it is as good as the baseline in the end, as a share of all the baseline spent.

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


@dataclass(frozen=True, eq=False)
class Panel:
    """What the finished cells of a study on one case say.

    Args:
        study: the study.
        case: the case.
        score_sigmas: σ whose errors make the means.
        cells: finished cells by scheme and seed.
        rate: "tuned" if each scheme is at its own best values, "fixed" if all are at the plan's.
    """

    study: Study
    case: str
    score_sigmas: tuple[str, ...]
    cells: Mapping[str, Mapping[int, Finding]]
    rate: str = "fixed"

    @property
    def config(self) -> dict[str, Any]:
        """The configuration of the first finished cell; data and process are those of all."""
        cell = next(cell for cells in self.cells.values() for cell in cells.values())
        return RunFolder(cell.path).config()

    @property
    def is_real(self) -> bool:
        """Whether the data are a finite set that is read, and not draws from a law."""
        return self.config["data"]["name"] in files.__all__

    @property
    def schemes(self) -> list[str]:
        """The schemes with a finished cell, in the study's order."""
        return [scheme for scheme in self.study.schemes if self.cells.get(scheme)]

    @property
    def compared(self) -> list[str]:
        """The schemes that share a finished seed with the baseline, the baseline among them."""
        return [scheme for scheme in self.schemes if self.seeds(scheme)]

    @cached_property
    def quantities(self) -> list[Quantity]:
        """What was measured at every finished cell; the score first, if its value errors were.

        Schemes whose network is no denoiser have no value error, and hide it of no other: see `has`.
        """
        figures = [cell.figures for cells in self.cells.values() for cell in cells.values()]
        if not figures:
            return []
        found: list[Quantity] = []
        for mean, kind in MEANS.items():
            taken = [f.get(kind, {}) for f in figures]
            errors = _common(
                [e for e in taken if e] if kind == "value_error" and self._baseline_has(kind) else taken
            )
            if mean != HELD_OUT or self.is_real:
                found += [mean] if errors and set(self.score_sigmas) <= set(errors) else []
                found += [Quantity(kind, sigma) for sigma in errors]
        nfes = _common([f["sample_distance"]["by_nfe"] for f in figures])
        return [*found, *(Quantity("sample_distance", nfe) for nfe in nfes)]

    def _baseline_has(self, kind: str) -> bool:
        """Whether the baseline was measured so, where it is finished."""
        return all(cell.figures.get(kind) for cell in self.cells.get(self.study.baseline, {}).values())

    def has(self, scheme: str, quantity: Quantity) -> bool:
        """Whether the quantity is one of a scheme's network."""
        kind = MEANS.get(quantity, quantity.kind)
        return all(cell.figures.get(kind) for cell in self.cells[scheme].values())

    @cached_property
    def map_keys(self) -> list[str]:
        """The pairs "t->r" at which some scheme's map was compared with the exact one."""
        figures = [cell.figures for cells in self.cells.values() for cell in cells.values()]
        return list(dict.fromkeys(key for f in figures for key in f.get("map_error", {})))

    def map_error(self, scheme: str, key: str) -> Interval | None:
        """A scheme's map error, over its finished seeds; None where one of them has none."""
        found = [cell.figures.get("map_error", {}).get(key, math.nan) for cell in self.cells[scheme].values()]
        return interval(np.array(found)) if np.isfinite(found).all() else None

    @property
    def metric(self) -> str:
        """Name of the sample distance and how many samples it takes, as in results.json."""
        return next(
            cell.figures["sample_distance"]["metric"]
            for cells in self.cells.values()
            for cell in cells.values()
        )

    def seeds(self, scheme: str) -> tuple[int, ...]:
        """The seeds at which both the scheme and the baseline are finished."""
        baseline = self.cells.get(self.study.baseline, {})
        return tuple(
            seed for seed in self.study.seeds if seed in self.cells.get(scheme, {}) and seed in baseline
        )

    def values(self, scheme: str, quantity: Quantity) -> Array:
        """The figure at each of `seeds`; NaN where it was not taken."""
        return np.array([_figure(self.cells[scheme][seed], quantity) for seed in self.seeds(scheme)])

    def ratios(self, scheme: str, quantity: Quantity) -> Array:
        """The figure over the baseline's, at each of `seeds`; the score is the mean of value errors' ratios."""
        if kind := MEANS.get(quantity):
            errors = [Quantity(kind, sigma) for sigma in self.score_sigmas]
            return np.mean([self.ratios(scheme, error) for error in errors], axis=0)
        baseline = self.cells[self.study.baseline]
        return self.values(scheme, quantity) / [
            _figure(baseline[seed], quantity) for seed in self.seeds(scheme)
        ]

    @cached_property
    def estimates(self) -> dict[tuple[str, Quantity], Estimate | None]:
        """The estimate of each quantity of each compared scheme; None where a figure is not finite."""
        return {(s, q): self._estimate(s, q) for s in self.compared for q in self.quantities}

    def _estimate(self, scheme: str, quantity: Quantity) -> Estimate | None:
        ratios = self.ratios(scheme, quantity)
        if not np.isfinite(ratios).all():
            return None
        value = None if quantity in MEANS else interval(self.values(scheme, quantity))
        better = probability_of_improvement(np.ones((1, len(ratios))), ratios[None])  # each seed is a task
        return Estimate(self.seeds(scheme), value, interval(ratios), better)

    def costs(self, scheme: str) -> dict[str, float]:
        """What a run of the scheme spent: the interquartile mean over seeds."""
        cells = self.cells[scheme].values()
        return {cost: float(iqm([cell.figures[cost] for cell in cells])) for cost in COSTS}

    def step_cost(self, scheme: str) -> float | None:
        """What a step of the scheme costs in forward passes: the interquartile mean over seeds, where it was timed."""
        found = [cell.figures.get(STEP_COST) for cell in self.cells[scheme].values()]
        return None if None in found else float(iqm([float(cost) for cost in found if cost is not None]))

    def is_matched(self, scheme: str) -> bool:
        """Whether the scheme spent what the baseline did, by 1 % (seconds: 10 %), on the study's axis."""
        axis = self.study.matched
        spent, baseline = (self.costs(s)[axis] for s in (scheme, self.study.baseline))
        return abs(spent - baseline) <= (0.1 if axis == "seconds" else 0.01) * baseline

    def curve(self, scheme: str, seed: int, mean: Quantity = SCORE) -> Curve:
        """A mean over σ of a run's errors while it trains."""
        cell, baseline = self.cells[scheme][seed], self.cells[self.study.baseline][seed]
        kind = MEANS[mean]
        names = [f"{kind}_{s}" for s in self.score_sigmas]
        rows = [row for row in cell.rows() if all(row.get(name) for name in names)]
        level = np.array([baseline.figures[kind][s] for s in self.score_sigmas])

        def columns(*names: str) -> Array:
            return np.array([[float(row[name]) for name in names] for row in rows]).reshape(-1, len(names))

        steps, evaluations = columns("grad_steps", "network_evaluations").T
        return Curve(steps, evaluations, (columns(*names) / level).mean(1))

    def effort(self, scheme: str) -> Effort:
        """What the scheme spends until the first evaluation at which its score is at most 1."""
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


def _common(found: Sequence[Mapping[str, Any]]) -> list[str]:
    """The keys of the first that all have; none of none."""
    return [key for key in found[0] if all(key in other for other in found)] if found else []


def _figure(cell: Finding, quantity: Quantity) -> float:
    """What was measured; NaN where it was not."""
    found = cell.figures[quantity.kind]
    by_key = found["by_nfe"] if quantity.kind == "sample_distance" else found
    return float(by_key.get(quantity.at, math.nan))


class StudyFindings(Findings):
    """Everything in the folder of a comparison of training studies.

    Args:
        out: the folder.

    Raises:
        RunFolderError: there is no comparison in it, or one of another kind.
    """

    where = WHERE
    about = ("plan", "score_sigmas", "studies")

    def __init__(self, out: Path) -> None:
        super().__init__(out)
        self.plan: str = self.index["plan"]
        self.score_sigmas = tuple(self.index["score_sigmas"])
        self.studies = [Study.read(entry) for entry in self.index["studies"]]
        self.folder = out / "cells"

        points = {study.name: study.tuning.grid.points for study in self.studies if study.tuning is not None}
        entries = self.index.get("tuning") or []
        self.tuning: list[Choice] = [Choice.read(entry, points) for entry in entries]
        self.cells += self._without_a_point()

    def panels(self) -> Iterator[Panel]:
        """Every study on each of its cases: at each scheme's own best values if such cells are finished."""
        for study in self.studies:
            for case in study.cases:
                tuned = self.panel(study, case, "tuned")
                yield tuned if tuned.schemes else self.panel(study, case, "fixed")

    def panel(self, study: Study, case: str, rate: str) -> Panel:
        """A study on a case, at one kind of values.

        Args:
            study: one of `studies`.
            case: one of its cases.
            rate: "tuned" or "fixed".
        """
        cells: dict[str, dict[int, Finding]] = {}
        for cell in self.finished(study=study.name, case=case, rate=rate):
            cells.setdefault(cell.where["scheme"], {})[cell.seed] = cell
        return Panel(study, case, self.score_sigmas, cells, rate)

    def choices(self, study: Study, case: str) -> list[Choice]:
        """What each scheme of a study takes on a case, in its order; one that is not known yet is missing."""
        found = {c.scheme: c for c in self.tuning if (c.study, c.case) == (study.name, case)}
        return [found[scheme] for scheme in study.schemes if scheme in found]

    def tuning_runs(self, study: Study, case: str) -> list[Finding]:
        """The runs that a study was tuned by on a case, each once."""
        place = {"study": study.name, "case": case, "rate": "tuning"}
        return list({cell.path: cell for cell in self.cells if place.items() <= cell.where.items()}.values())

    def _without_a_point(self) -> list[Finding]:
        """The cells of schemes that no point of the tuning grid trains: they failed before they were begun."""
        seeds = {study.name: study.seeds for study in self.studies}
        found = []
        for choice in self.tuning:
            if choice.point is None:
                place = (choice.study, choice.case, choice.scheme, "tuned", "")
                wheres = [dict(zip(WHERE, (*place, seed), strict=True)) for seed in seeds[choice.study]]
                path = self.folder / (choice.folder or "")
                found += [Finding(where, path, "failed", choice.reason, {}) for where in wheres]
        return found
