"""Do the errors of targets foretell what training comes to? Both over the grid of λ and η of a comparison.

The targets are those that a Monte Carlo network would give: what one can know before choosing λ.
"""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from diffrl.errors import InputError
from diffrl.experiments.grids import grid_scheme
from diffrl.experiments.reports.run_table import data_label
from diffrl.experiments.reports.style import (
    BLUE,
    FAINT,
    INK,
    ORANGE,
    draw_band,
    drawing,
    legend_beside,
    plain_ticks,
    save_figure,
    write_note,
    write_title,
)
from diffrl.experiments.reports.target_figure import run_target_errors
from diffrl.experiments.study_findings import SCORE, Panel, StudyFindings
from diffrl.extras import require
from diffrl.metrics.intervals import interval
from diffrl.metrics.seeds import iqm
from diffrl.training.runs import Run, load

__all__ = ["draw_agreement", "rank_correlation", "target_outcomes"]

KEYS = ("λ", "η")
PARTS = {"bias_sq": "bias_sq", "variance": "variance", "target_error": "total"}
MARKERS = "osD^vP"

Levels = Sequence[Mapping[str, Any]]
"""Entries of `target_errors`, one for each noise level."""


def target_outcomes(
    findings: StudyFindings,
    *,
    study: str = "map",
    case: str = "gmm16",
    states: int = 200,
    draws: int = 32,
    seed: int = 0,
) -> dict[str, Any]:
    """The errors of targets at the baseline's network, and the value error of the network that each target trained.

    Both are given as multiples of the baseline's at the same seed, averaged over the noise levels of the
    comparison's score; a target's error is taken at the level of the chain next to each of them.

    Args:
        findings: a comparison whose cells still have their checkpoints.
        study: one whose two axes are λ and η, and whose baseline is λ = 1 at some η.
        case: one of its cases, with an exact denoiser.
        states: at which target errors are averaged.
        draws: how often the chain goes on from each.
        seed: of states' noise and draws.

    Returns:
        ``study``, ``case``, ``data`` (in words), ``baseline``, ``states``, ``draws``; ``seeds``: those at which all
        schemes that were begun are finished; ``sigmas``: those of the chain's levels; ``cells``: for each λ and η the
        shares ``bias_sq``, ``variance``, ``target_error`` (their sum) and ``value_error``, each by seed;
        ``rank_correlation`` of each share with the value error, by seed, over the cells of "η = 1", whose fixed point
        is exact, and over "all".

    Raises:
        ValueError: no such study or case, other axes, no seed at which all is finished, or data without an
            exact denoiser.
    """
    panel = _panel(findings, study, case)
    grid = _grid(panel)
    seeds = [n for n in panel.seeds(panel.study.baseline) if all(n in panel.seeds(s) for s in grid)]
    if not seeds:
        raise InputError(f"study {study}, case {case}: at no seed are the baseline and all others finished")
    cells: dict[str, dict[str, Any]] = {
        scheme: {"λ": lmbda, "η": eta, **{name: [] for name in PARTS}}
        for scheme, (lmbda, eta) in grid.items()
    }
    for number in seeds:
        run = load(panel.cells[panel.study.baseline][number].path)
        levels = _levels(run, panel, states=states, draws=draws, seed=seed)
        for scheme, parts in _shares(levels, grid, panel.study.baseline).items():
            for name, share in parts.items():
                cells[scheme][name].append(share)
    for scheme, cell in cells.items():
        by_seed = dict(zip(panel.seeds(scheme), panel.ratios(scheme, SCORE).tolist(), strict=True))
        cell["value_error"] = [by_seed[number] for number in seeds]
    return {
        "study": study,
        "case": case,
        "data": data_label(panel.config),
        "baseline": panel.study.baseline,
        "states": states,
        "draws": draws,
        "seeds": seeds,
        "sigmas": [level["sigma"] for level in next(iter(levels.values()))],
        "cells": list(cells.values()),
        "rank_correlation": {
            "η = 1": _correlations([cell for cell in cells.values() if cell["η"] == 1]),
            "all": _correlations(list(cells.values())),
        },
    }


def _grid(panel: Panel) -> dict[str, tuple[float, float]]:
    """λ and η of each scheme of the grid that can be compared with the baseline."""
    lmbdas, etas = (panel.study.axes[label] for label in KEYS)
    points = {grid_scheme({"λ": l, "η": e}): (float(l), float(e)) for l in lmbdas for e in etas}
    return {scheme: point for scheme, point in points.items() if scheme in panel.compared}


def _shares(
    levels: Mapping[float, Levels], grid: Mapping[str, tuple[float, float]], baseline: str
) -> dict[str, dict[str, float]]:
    """Each part of each scheme's target error over the baseline's whole error, a mean over noise levels."""
    base = _parts(levels, *grid[baseline])["target_error"]
    return {
        scheme: {name: float(np.mean(part / base)) for name, part in _parts(levels, *point).items()}
        for scheme, point in grid.items()
    }


def _correlations(cells: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    """The rank correlation of each part of a target's error with the value error, over cells, by seed."""
    if len(cells) < 2:
        return {}
    columns = {
        name: list(zip(*(cell[name] for cell in cells), strict=True)) for name in (*PARTS, "value_error")
    }
    outcome = columns.pop("value_error")
    return {
        name: [rank_correlation(x, y) for x, y in zip(by_seed, outcome, strict=True)]
        for name, by_seed in columns.items()
    }


def rank_correlation(x: Sequence[float], y: Sequence[float]) -> float:
    """Spearman's correlation: that of the ranks of numbers.

    Args:
        x: at least two numbers.
        y: as many others.

    Raises:
        MissingExtra: scipy is not installed.
    """
    return float(require("scipy.stats", "eval").spearmanr(x, y).statistic)


def _panel(findings: StudyFindings, study: str, case: str) -> Panel:
    panels = {(p.study.name, p.case): p for p in findings.panels()}
    if (study, case) not in panels:
        known = ", ".join(f"{s} {c}" for s, c in panels)
        raise InputError(f"no study {study} on case {case} in the comparison: there are {known}")
    panel = panels[study, case]
    if set(panel.study.axes) != set(KEYS):
        raise InputError(f"the axes of study {study} are {list(panel.study.axes)}: λ and η are wanted")
    if panel.schemes and SCORE not in panel.quantities:
        raise InputError(f"case {case} has no exact denoiser, so no error of a target is known")
    return panel


def _levels(run: Run, panel: Panel, **options: int) -> dict[float, Levels]:
    """For each η the errors of targets at the network of a run, at the noise levels next to the score's."""
    lmbdas, etas = ([float(value) for value in panel.study.axes[label]] for label in KEYS)

    def distance(level: Mapping[str, Any], sigma: str) -> float:
        return abs(math.log(level["sigma"] / float(sigma)))

    found: dict[float, Levels] = {}
    for eta in etas:
        levels = run_target_errors(run, coupling=eta, lmbdas=lmbdas, n_steps=(), **options)["levels"]
        found[eta] = [min(levels, key=partial(distance, sigma=sigma)) for sigma in panel.score_sigmas]
    return found


def _parts(found: Mapping[float, Levels], lmbda: float, eta: float) -> dict[str, Any]:
    """Squared bias and variance of a target and their sum, each by noise level."""
    targets = [level["targets"][f"lmbda={lmbda:g}"] for level in found[eta]]
    return {name: np.array([target[part] for target in targets]) for name, part in PARTS.items()}


def draw_agreement(found: Mapping[str, Any], path: str | Path) -> Path:
    """Draw three panels: bias² and variance of targets by λ; value error by λ; value error by bias², all cells.

    Cells of λ = 1, whose targets have no bias, are left out of the third.

    Args:
        found: what `target_outcomes` returns.
        path: where to write, without suffix: a PNG and a PDF.

    Returns:
        Path of the PNG.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    cells = sorted(found["cells"], key=lambda cell: (cell["η"], cell["λ"]))
    markov = [cell for cell in cells if cell["η"] == 1]
    sigmas = ", ".join(f"{sigma:.2g}" for sigma in found["sigmas"])
    with drawing(figsize=(13, 4.3)) as figure:
        targets, outcome, every = figure.subplots(1, 3)
        for name, label, colour, marker in (
            ("variance", "variance", BLUE, "o"),
            ("bias_sq", "bias²", ORANGE, "s"),
            ("target_error", "sum", INK, "D"),
        ):
            _curve(targets, markov, name, color=colour, marker=marker, label=label)
        targets.set(title="Targets at η = 1", ylabel="error of the target, × Monte Carlo's")
        targets.legend()
        _curve(outcome, markov, "value_error", color=INK, marker="D")
        rank = interval(found["rank_correlation"]["η = 1"]["target_error"])
        outcome.set(title=f"Training at η = 1, by the sum\nrank correlation {rank:.2f}")
        for axes in (targets, outcome):
            axes.set(xlabel="λ", ylim=(-0.05, max(1.05, axes.get_ylim()[1])))
        _scatter(every, [cell for cell in cells if cell["λ"] < 1])
        rank = interval(found["rank_correlation"]["all"]["bias_sq"])
        every.set(title=f"Training at every η, by bias²\nrank correlation {rank:.2f}")
        for axes in (outcome, every):
            axes.set_ylabel("value error, × Monte Carlo's")
        legend_beside(figure, every)
        write_title(figure, f"Do the errors of targets foretell those of training? ({found['data']})")
        write_note(
            figure,
            f"Means over σ = {sigmas}; interquartile mean and 95 % interval of {len(found['seeds'])} seeds. "
            f"Targets bootstrap from the network that {found['baseline']} trained; {found['states']} states, "
            f"{found['draws']} continuations of each.",
        )
        return save_figure(figure, Path(path))


def _curve(axes: Any, cells: Sequence[Mapping[str, Any]], name: str, **style: Any) -> None:
    """A figure of the cells, by λ."""
    points = [interval(cell[name]) for cell in cells]
    draw_band(axes, [cell["λ"] for cell in cells], points, linewidth=1.8, markersize=4.5, **style)


def _scatter(axes: Any, cells: Sequence[Mapping[str, Any]]) -> None:
    """Value error by bias², a line for each η; an estimate of bias² that is not above 0 is left out."""
    colours = require("matplotlib", "plot").colormaps["viridis"]
    etas = sorted({cell["η"] for cell in cells})
    for n, eta in enumerate(etas):
        line = [cell for cell in cells if cell["η"] == eta and iqm(cell["bias_sq"]) > 0]
        x, y = ([float(iqm(cell[k])) for cell in line] for k in ("bias_sq", "value_error"))
        shade = colours(0.9 * n / max(len(etas) - 1, 1))
        axes.plot(x, y, color=shade, marker=MARKERS[n % len(MARKERS)], linewidth=0.9, label=f"η = {eta:g}")
    axes.axhline(1, color=FAINT, linewidth=0.8)
    axes.set_xlabel("squared bias of the target, × Monte Carlo's error")
    if any(len(line.get_xdata()) for line in axes.get_lines()[:-1]):
        axes.set(xscale="log", yscale="log")
        for axis in (axes.xaxis, axes.yaxis):
            plain_ticks(axis, most=5)
