"""The figure of `diffrl.metrics.diagnostics.target_errors`: bias, variance and the best λ, by noise level."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffrl.experiments.reports.run_figure import INK, STYLE
from diffrl.extras import require

__all__ = ["draw_target_errors"]

SHOWN = ("lmbda=0", "lmbda=0.5", "lmbda=0.9", "monte_carlo")
CHOICE = "#D55E00"
LABELS = {"monte_carlo": "Monte Carlo"}
PANELS = {
    "bias_sq": "Squared bias of the target",
    "variance": "Variance of the target",
    "total": "Total error",
}


def draw_target_errors(
    errors: Mapping[str, Any],
    path: str | Path,
    *,
    targets: Sequence[str] = SHOWN,
    title: str = "",
) -> Path:
    """Four panels by σ: squared bias, variance and total of the targets; value error, residual and best λ.

    A squared bias within two standard errors of 0 is not drawn.

    Args:
        errors: what `diffrl.metrics.diagnostics.target_errors` returns.
        path: where to write, without suffix: a png and a pdf.
        targets: which to show, names of the table.
        title: above the panels.

    Returns:
        The png's path.

    Raises:
        MissingExtra: matplotlib is not installed.
        KeyError: a target that the table does not have.
    """
    matplotlib = require("matplotlib", "plot")
    levels = [level for level in errors["levels"] if math.isfinite(level["sigma"])]
    if missing := [name for name in targets if name not in levels[0]["targets"]]:
        raise KeyError(f"no target {', '.join(missing)}: the table has {', '.join(levels[0]['targets'])}")
    sigma = [level["sigma"] for level in levels]
    with matplotlib.rc_context(STYLE):
        figure = require("matplotlib.figure", "plot").Figure(figsize=(9, 6.4), layout="constrained")
        axes = figure.subplots(2, 2, sharex=True)
        colours = matplotlib.colormaps["viridis"]
        for axis, (quantity, heading) in zip(axes.flat, PANELS.items(), strict=False):
            for n, name in enumerate(targets):
                rows = [level["targets"][name] for level in levels]
                colour = colours(0.9 * n / max(len(targets) - 1, 1))
                _line(axis, sigma, rows, quantity, color=colour, label=_label(name))
            axis.set_title(heading)
        axes.flat[1].legend()
        last = axes.flat[3]
        _line(last, sigma, levels, "value_error", color=INK, label="value error")
        _line(last, sigma, levels, "bellman_residual", color=INK, linestyle="--", label="Bellman residual")
        last.set_title("The denoiser, and the λ of least total")
        choice = last.twinx()
        best = [level["best_lmbda"] for level in levels]
        choice.plot(sigma, best, color=CHOICE, drawstyle="steps-mid", label="best λ")
        choice.set(ylim=(-0.05, 1.05), ylabel="best λ")
        choice.yaxis.label.set_color(CHOICE)
        choice.grid(visible=False)
        lines = [*last.get_lines(), *choice.get_lines()]
        choice.legend(lines, [line.get_label() for line in lines], loc="upper left")
        axes.flat[0].set_xscale("log")
        for axis in axes[1]:
            axis.set_xlabel("noise level σ/α")
        axes.flat[0].set_ylabel("in units of the network's output")
        axes.flat[2].set_ylabel("in units of the network's output")
        if title:
            figure.suptitle(title)
        png = Path(path).with_suffix(".png")
        png.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(png, dpi=200)
        figure.savefig(png.with_suffix(".pdf"))
    return png


def _line(
    axis: Any, sigma: Sequence[float], rows: Sequence[Mapping[str, Any]], name: str, **style: Any
) -> None:
    """A line through the figures that can be told from 0; where none can, its label alone."""
    seen = [row[name] if row[name] > 2 * row.get(f"{name}_error", 0.0) else math.nan for row in rows]
    axis.plot(sigma, seen, marker="o", markersize=3, **style)
    if any(math.isfinite(value) for value in seen):
        axis.set_yscale("log")


def _label(name: str) -> str:
    if name in LABELS:
        return LABELS[name]
    kind, _, number = name.partition("=")
    return f"TD(λ={number})" if kind == "lmbda" else f"{number}-step TD"
