"""Do the errors of targets foretell what training comes to? Both over the grid of λ and η of a comparison.

The targets are those that a Monte Carlo network would give: what one can know before choosing λ.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from diffrl.experiments.comparison import grid_scheme
from diffrl.experiments.findings import SCORE, Findings, Panel, interval
from diffrl.experiments.reports.run_figure import FAINT, INK, REAL, STYLE
from diffrl.experiments.reports.training_figures import plain_ticks
from diffrl.extras import require
from diffrl.metrics.diagnostics import target_errors
from diffrl.metrics.seeds import iqm
from diffrl.training.build import build_oracle
from diffrl.training.runs import Run, load

__all__ = ["draw_agreement", "rank_correlation", "target_outcomes"]

KEYS = ("λ", "η")
PARTS = {"bias_sq": "bias_sq", "variance": "variance", "target_error": "total"}
BIAS, VARIANCE = "#D55E00", "#0072B2"
MARKERS = "osD^vP"


def target_outcomes(
    findings: Findings,
    *,
    study: str = "map",
    case: str = "gmm16",
    states: int = 200,
    draws: int = 32,
    seed: int = 0,
) -> dict[str, Any]:
    """Target errors at the baseline's network, and the value error of the network that each target trained.

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
        ``study``, ``case``, ``baseline``, ``states``, ``draws``, ``seeds`` (those at which all schemes that
        were begun are finished), ``sigmas`` (those of the chain's
        levels), ``cells``: for each λ and η the shares ``bias_sq``, ``variance``, ``target_error`` (their
        sum) and ``value_error``, each by seed; and ``rank_correlation`` of each share with the value error, by
        seed, over the cells of "η = 1", whose fixed point is exact, and over "all".

    Raises:
        ValueError: no such study or case, other axes, no seed at which all is finished, or data without an
            exact denoiser.
    """
    panel = _panel(findings, study, case)
    lmbdas, etas = (panel.study.axes[label] for label in KEYS)
    grid = {
        scheme: (float(lmbda), float(eta))
        for lmbda in lmbdas
        for eta in etas
        if (scheme := grid_scheme({"λ": lmbda, "η": eta})) in panel.compared
    }
    seeds = [n for n in panel.seeds(panel.study.baseline) if all(n in panel.seeds(s) for s in grid)]
    if not seeds:
        raise ValueError(f"study {study}, case {case}: at no seed are the baseline and all others finished")
    cells: dict[str, dict[str, Any]] = {
        scheme: {"λ": lmbda, "η": eta, **{name: [] for name in PARTS}}
        for scheme, (lmbda, eta) in grid.items()
    }
    for number in seeds:
        run = load(panel.cells[panel.study.baseline][number].path)
        found = {
            eta: _errors_at(run, panel.score_sigmas, eta, [*map(float, lmbdas)], states, draws, seed)
            for eta in map(float, etas)
        }
        base = _parts(found, *grid[panel.study.baseline])["target_error"]
        for scheme, point in grid.items():
            for name, errors in _parts(found, *point).items():
                cells[scheme][name].append(float(np.mean(errors / base)))
    for scheme, cell in cells.items():
        by_seed = dict(zip(panel.seeds(scheme), panel.ratios(scheme, SCORE).tolist(), strict=True))
        cell["value_error"] = [by_seed[number] for number in seeds]
    return {
        "study": study,
        "case": case,
        "baseline": panel.study.baseline,
        "states": states,
        "draws": draws,
        "seeds": seeds,
        "sigmas": [level["sigma"] for level in found[float(etas[0])]],
        "cells": list(cells.values()),
        "rank_correlation": {
            "η = 1": _correlations([cell for cell in cells.values() if cell["η"] == 1]),
            "all": _correlations(list(cells.values())),
        },
    }


def _correlations(cells: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    """Of each part of a target's error with the value error, over cells, by seed."""
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
    """Spearman's: the correlation of ranks, of numbers without ties."""
    first, second = (np.argsort(np.argsort(values)) for values in (x, y))
    return float(np.corrcoef(first, second)[0, 1])


def _panel(findings: Findings, study: str, case: str) -> Panel:
    panels = {(p.study.name, p.case): p for p in findings.panels()}
    if (study, case) not in panels:
        known = ", ".join(f"{s} {c}" for s, c in panels)
        raise ValueError(f"no study {study} on case {case} in the comparison: there are {known}")
    panel = panels[study, case]
    if set(panel.study.axes) != set(KEYS):
        raise ValueError(f"the axes of study {study} are {list(panel.study.axes)}: λ and η are wanted")
    if panel.schemes and SCORE not in panel.quantities:
        raise ValueError(f"case {case} has no exact denoiser, so no error of a target is known")
    return panel


def _errors_at(
    run: Run,
    sigmas: Sequence[str],
    eta: float,
    lmbdas: Sequence[float],
    states: int,
    draws: int,
    seed: int,
) -> list[dict[str, Any]]:
    """The levels of `target_errors` next to each σ, at a run's network."""
    oracle, chain = build_oracle(run.data, run.denoiser.process), run.config["chain"]
    assert oracle is not None  # the score was measured with it
    levels = target_errors(
        run.denoiser,
        oracle,
        run.data.test[:states].to(next(run.denoiser.parameters())),
        run.denoiser.process,
        num_steps=chain["num_steps"],
        coupling=eta,
        lmbdas=lmbdas,
        n_steps=(),
        sigma_data=run.denoiser.sigma_data,
        draws=draws,
        generator=torch.Generator().manual_seed(seed),
        **{key: chain[key] for key in ("span", "stride", "value", "t_max")},
    )["levels"]

    def distance(level: Mapping[str, Any], sigma: str) -> float:
        return abs(math.log(level["sigma"] / float(sigma)))

    return [min(levels, key=partial(distance, sigma=sigma)) for sigma in sigmas]


def _parts(found: Mapping[float, Sequence[Mapping[str, Any]]], lmbda: float, eta: float) -> dict[str, Any]:
    """Squared bias, variance and their sum of a target, by noise level."""
    targets = [level["targets"][f"lmbda={lmbda:g}"] for level in found[eta]]
    return {name: np.array([target[part] for target in targets]) for name, part in PARTS.items()}


def draw_agreement(found: Mapping[str, Any], path: str | Path) -> Path:
    """Three panels: bias² and variance of targets by λ; value error by λ; value error by bias², all cells.

    Cells of λ = 1, whose targets have no bias, are left out of the third.

    Args:
        found: what `target_outcomes` returns.
        path: where to write, without suffix: a png and a pdf.

    Returns:
        The png's path.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    matplotlib = require("matplotlib", "plot")
    cells = sorted(found["cells"], key=lambda cell: (cell["η"], cell["λ"]))
    markov = [cell for cell in cells if cell["η"] == 1]
    lmbdas = [cell["λ"] for cell in markov]
    sigmas = ", ".join(f"{sigma:.2g}" for sigma in found["sigmas"])
    with matplotlib.rc_context(STYLE):
        figure = require("matplotlib.figure", "plot").Figure(figsize=(12, 4.3), layout="constrained")
        targets, outcome, every = figure.subplots(1, 3)
        for name, label, colour, marker in (
            ("variance", "variance", VARIANCE, "o"),
            ("bias_sq", "bias²", BIAS, "s"),
            ("target_error", "sum", INK, "D"),
        ):
            _curve(targets, lmbdas, [cell[name] for cell in markov], color=colour, marker=marker, label=label)
        targets.set(title="Targets at η = 1", ylabel="error of the target, × Monte Carlo's")
        targets.legend()
        _curve(outcome, lmbdas, [cell["value_error"] for cell in markov], color=INK, marker="D")
        rho = _said(found["rank_correlation"]["η = 1"]["target_error"])
        outcome.set(title=f"Training at η = 1\nrank correlation with the sum {rho}")
        for axis in (targets, outcome):
            axis.set(xlabel="λ", ylim=(-0.05, max(1.05, axis.get_ylim()[1])))
        biased = [cell for cell in cells if cell["λ"] < 1]
        _scatter(every, biased, matplotlib.colormaps["viridis"])
        rho = _said(found["rank_correlation"]["all"]["bias_sq"])
        every.set(title=f"Training at every η, by bias²\nrank correlation {rho}")
        for axis in (outcome, every):
            axis.set_ylabel("value error, × Monte Carlo's")
        figure.supxlabel(
            f"{found['study']}, {found['case']}; means over σ = {sigmas}; interquartile mean and 95 % interval of "
            f"{len(found['seeds'])} seeds.\nTargets bootstrap from the network that {found['baseline']} trained; "
            f"{found['states']} states, {found['draws']} continuations of each.",
            x=0.01, ha="left", fontsize=7.5, color=REAL,
        )  # fmt: skip
        png = Path(path).with_suffix(".png")
        png.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(png, dpi=150)
        figure.savefig(png.with_suffix(".pdf"), metadata={"CreationDate": None})
    return png


def _said(by_seed: Sequence[float]) -> str:
    found = interval(by_seed)
    return f"{found.iqm:.2f}" if found.low is None else f"{found.iqm:.2f} [{found.low:.2f}, {found.high:.2f}]"


def _scatter(axis: Any, cells: Sequence[Mapping[str, Any]], colours: Callable[[float], Any]) -> None:
    """Value error by bias², a line for each η; an estimate of bias² that is not above 0 is left out."""
    etas = sorted({cell["η"] for cell in cells})
    for n, eta in enumerate(etas):
        line = [cell for cell in cells if cell["η"] == eta and iqm(cell["bias_sq"]) > 0]
        x, y = ([float(iqm(cell[k])) for cell in line] for k in ("bias_sq", "value_error"))
        shade = colours(0.9 * n / max(len(etas) - 1, 1))
        axis.plot(x, y, color=shade, marker=MARKERS[n % len(MARKERS)], linewidth=0.9, label=f"η = {eta:g}")
    axis.axhline(1, color=FAINT, linewidth=0.8)
    axis.set_xlabel("squared bias of the target, × Monte Carlo's error")
    axis.legend()
    if any(len(line.get_xdata()) for line in axis.get_lines()[:-1]):
        axis.set(xscale="log", yscale="log")
        for which in (axis.xaxis, axis.yaxis):
            plain_ticks(which, most=5)


def _curve(axis: Any, x: Sequence[float], by_seed: Sequence[Sequence[float]], **style: Any) -> None:
    points = [interval(values) for values in by_seed]
    axis.plot(x, [p.iqm for p in points], linewidth=1.8, markersize=4.5, **style)
    if points and points[0].low is not None:
        low, high = [p.low for p in points], [p.high for p in points]
        axis.fill_between(x, low, high, color=style["color"], alpha=0.15, linewidth=0)
