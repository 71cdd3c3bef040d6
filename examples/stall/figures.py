"""The figures of the study, from what is finished."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from diffrl.experiments.reports.style import FAINT, GREY, PALETTE, drawing, plain_ticks
from stall.ground import Run
from stall.runs import MC, OWN, SLOW, Kept, kept_rows
from stall.tables import ratios

LINES: list[tuple[str, dict[str, Any]]] = [
    ("Monte Carlo, β1 .9", {"target": "monte_carlo"}),
    ("own, β1 .9: the stall", {}),
    ("own, β1 .5", {"beta1": 0.5}),
    ("own, β1 0", {"beta1": 0.0}),
    ("momentum corrected: diagonal", {"correction": "diagonal"}),
    ("momentum corrected: full", {"correction": "first order"}),
    ("momentum corrected: transport", {"correction": "transport"}),
    ("target copied every 2 steps", {"target": "slow", "every": 2}),
    ("every 5", {"target": "slow", "every": 5}),
    ("target average, decay .5", {"target": "slow", "decay": 0.5}),
    ("decay .8", {"target": "slow", "decay": 0.8}),
    ("decay .98", {"target": "slow", "decay": 0.98}),
    ("a network a level, β1 .9", {"levels": "apart"}),
    ("a network a level, β1 0", {"levels": "apart", "beta1": 0.0}),
    ("a network a level, Monte Carlo", {"levels": "apart", "target": "monte_carlo"}),
    ("own, β1 .5, with Monte Carlo's v", {"moment_of": "monte_carlo", "beta1": 0.5}),
    ("Monte Carlo, β1 .5, with own's v", {"moment_of": "own", "target": "monte_carlo", "beta1": 0.5}),
    ("own, β1 .9 for 400 steps, then .5", {"then": 0.5, "at": 400}),
    ("own, β1 .5 for 400 steps, then .9", {"beta1": 0.5, "at": 400}),
    ("own, β1 .9 for 400 steps, then Monte Carlo", {"after": "monte_carlo", "at": 400}),
    ("exact x0, own, β1 .9", {"exact": True}),
    ("exact x0, own, β1 .5", {"exact": True, "beta1": 0.5}),
    ("exact x0, Monte Carlo", {"exact": True, "target": "monte_carlo"}),
]
NAMES = {
    "own": "own, β1 .9",
    "own, beta1=0.5": "own, β1 .5",
    "monte_carlo": "Monte Carlo, β1 .9",
    "own, beta1=0.5, steps=1500, process=flow, dim=16": "flow, own, β1 .5",
}


def interventions(kept: Kept, path: Path) -> None:
    """Error of each intervention as a multiple of Monte Carlo's, a dot for each mixture."""
    shown = [(label, found) for label, options in LINES if (found := ratios(kept, Run(**options)))]
    with drawing(figsize=(6.4, 0.22 * len(shown) + 0.9)) as figure:
        axes = figure.subplots()
        for y, (_, found) in enumerate(shown):
            axes.plot(found, [y] * len(found), "o", color=PALETTE[0][0], ms=4.5, alpha=0.8)
        axes.axvline(1, color=FAINT, lw=1)
        axes.set(xscale="log", yticks=range(len(shown)), xlabel="error, as a multiple of Monte Carlo's")
        axes.set_yticklabels([label for label, _ in shown])
        axes.invert_yaxis()
        plain_ticks(axes.xaxis)
        figure.savefig(path.with_suffix(".png"), dpi=150)


def _linear(out: Path, part: str) -> dict[str, Any]:
    return {row["name"]: row["found"] for row in kept_rows(out / "linear.jsonl") if row["part"] == part}


def spectrum(found: dict[str, Any], path: Path, at: int = 200) -> None:
    """Eigenvalues of own TD times the step, with what is stable at β = .9 and .5."""
    with drawing(figsize=(6.4, 3.1)) as figure:
        both = figure.subplots(1, 2, sharex=True, sharey=True)
        for axes, name in zip(both, ("own", "own, beta1=0.5"), strict=True):
            row = next(row for row in found[name] if row["step"] == at)
            mu = np.array(row["mu"]) * row["rate"]
            axes.plot(mu[:, 0], mu[:, 1], ".", color=GREY, ms=4)
            for beta, (colour, _) in ((0.9, PALETTE[1]), (0.5, PALETTE[0])):
                c, phase = (1 - beta) / (1 + beta), np.linspace(0, np.pi, 400)
                a, b = (1 - np.cos(phase)) / c, np.sin(phase)
                for sign in (1, -1):
                    label = f"stable inside, β {beta:g}" if sign > 0 else None
                    axes.plot(a, sign * b, color=colour, lw=1.2, label=label)
            axes.set(xlim=(0.005, 40), ylim=(-1.1, 1.1), xscale="log", title=f"{NAMES[name]}, step {at}")
            axes.set_xlabel("η Re μ")
        both[0].set_ylabel("η Im μ")
        figure.legend(*both[0].get_legend_handles_labels(), fontsize=7.5, loc="outside lower center", ncols=2)
        plain_ticks(both[0].xaxis)
        figure.savefig(path.with_suffix(".png"), dpi=150)


def edge(found: dict[str, Any], path: Path) -> None:
    """The largest stable rate over the rate in use, along the training."""
    with drawing(figsize=(5.2, 2.8)) as figure:
        axes = figure.subplots()
        for (name, rows), (colour, marker) in zip(found.items(), PALETTE, strict=False):
            for beta, style in (("0.9", "-"), ("0.5", ":")):
                x, y = [row["step"] for row in rows], [row["allowed"][beta] for row in rows]
                axes.plot(
                    x, y, style, marker=marker, ms=4, color=colour, label=f"{NAMES[name]}; for β {beta}"
                )
        axes.axhline(1, color=FAINT, lw=1)
        axes.set(yscale="log", xlabel="step", ylabel="largest stable rate / rate in use")
        axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
        plain_ticks(axes.yaxis)
        figure.savefig(path.with_suffix(".png"), dpi=150)


def oscillation(found: dict[str, Any], path: Path) -> None:
    """The leading mode of the weights in time, and its autocorrelation."""
    with drawing(figsize=(6.4, 2.6)) as figure:
        left, right = figure.subplots(1, 2)
        for (name, row), (colour, _) in zip(found.items(), (PALETTE[1], PALETTE[0]), strict=False):
            path_ = np.array(row["path"])
            left.plot(path_[:, 0], color=colour, lw=1, label=NAMES[name])
            right.plot(row["correlation"], color=colour, lw=1.2)
            angle, factor = row["predicted_turn"], row["predicted_factor"]
            lag = np.arange(len(row["correlation"]))
            right.plot(lag, factor**lag * np.cos(angle * lag), "--", color=colour, lw=0.8)
        left.set(xlabel="step", ylabel="leading mode, moved outputs")
        right.set(xlabel="lag in steps", ylabel="autocorrelation", ylim=(-1.2, 1.2))
        left.legend(fontsize=7.5)
        figure.savefig(path.with_suffix(".png"), dpi=150)


def tangent(found: dict[str, Any], path: Path) -> None:
    """Errors of the linearised network, trained on from a healthy one."""
    with drawing(figsize=(5.6, 2.6)) as figure:
        axes = figure.subplots()
        for row, (colour, marker) in zip(found["own, beta1=0.5"], PALETTE, strict=False):
            words = f"{row['target'].replace('_', ' ')}, β {row['beta1']:g}" + (
                ", exact x0" if row["exact"] else ""
            )
            axes.plot(*zip(*row["curve"], strict=True), color=colour, marker=marker, ms=3, label=words)
        axes.set(yscale="log", ylim=(10, 1e5), xlabel="steps of the tangent", ylabel="error")
        axes.legend(fontsize=7.5, loc="upper left", bbox_to_anchor=(1, 1))
        plain_ticks(axes.yaxis)
        figure.savefig(path.with_suffix(".png"), dpi=150)


def draw_all(kept: Kept, out: Path) -> None:
    """All figures whose runs are there."""
    if all(kept.look(run) is not None for run in (MC, OWN, SLOW)):
        interventions(kept, out / "interventions")
    parts: list[tuple[str, str, Callable[[dict[str, Any], Path], None]]] = [
        ("kernel", "spectrum", spectrum),
        ("kernel", "edge", edge),
        ("oscillation", "oscillation", oscillation),
        ("tangent", "tangent", tangent),
    ]
    for part, file, draw in parts:
        if found := _linear(out, part):
            draw(found, out / file)
