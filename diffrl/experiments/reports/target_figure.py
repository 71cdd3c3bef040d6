"""The errors of targets at the network of a run, and their figure: bias, variance and best λ by noise level."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from diffrl.errors import InputError, InputKeyError
from diffrl.experiments.reports.style import INK, ORANGE, drawing, plain_ticks, save_figure, write_title
from diffrl.extras import require
from diffrl.metrics.diagnostics import target_errors
from diffrl.training.build import build_oracle
from diffrl.training.runs import Run

__all__ = ["draw_target_errors", "run_target_errors"]

SHOWN = ("lmbda=0", "lmbda=0.5", "lmbda=0.9", "monte_carlo")
LABELS = {"monte_carlo": "Monte Carlo"}
PANELS = {
    "bias_sq": "Squared bias of the target",
    "variance": "Variance of the target",
    "total": "Total error",
}


def run_target_errors(
    run: Run, *, states: int = 200, draws: int = 32, seed: int = 0, **options: Any
) -> dict[str, Any]:
    """What `target_errors` finds at the network of a run, on the chain that the run was trained with.

    Args:
        run: a training run, on data whose exact denoiser is known.
        states: how many noisy states the errors are averaged over.
        draws: how often the chain goes on from each state.
        seed: of the states' noise and of the draws.
        options: of `target_errors`, in place of the run's own: ``coupling``, ``lmbdas``, ``n_steps``.

    Raises:
        ValueError: the data have no exact denoiser.
    """
    oracle, chain = build_oracle(run.data, run.denoiser.process), run.config["chain"]
    if oracle is None:
        raise InputError(f"{run.data.name} has no exact denoiser, so no error of a target is known")
    given = {key: chain[key] for key in ("num_steps", "coupling", "span", "stride", "value", "t_max")}
    return target_errors(
        run.denoiser,
        oracle,
        run.data.test[:states].to(next(run.denoiser.parameters())),
        run.denoiser.process,
        sigma_data=run.denoiser.sigma_data,
        draws=draws,
        generator=torch.Generator().manual_seed(seed),
        **{**given, **options},
    )


def draw_target_errors(
    errors: Mapping[str, Any],
    path: str | Path,
    *,
    targets: Sequence[str] = SHOWN,
    title: str = "Errors of targets by noise level",
) -> Path:
    """Draw four panels by σ: squared bias, variance and total of the targets; value error, residual and best λ.

    A squared bias within two standard errors of 0 is not drawn.

    Args:
        errors: what `target_errors` or `run_target_errors` returns.
        path: where to write, without suffix: a PNG and a PDF.
        targets: which to show, names of the table.
        title: above the panels.

    Returns:
        Path of the PNG.

    Raises:
        MissingExtra: matplotlib is not installed.
        KeyError: a target that the table does not have.
    """
    levels = [level for level in errors["levels"] if math.isfinite(level["sigma"])]
    if missing := [name for name in targets if name not in levels[0]["targets"]]:
        raise InputKeyError(
            f"no target {', '.join(missing)}: the table has {', '.join(levels[0]['targets'])}"
        )
    sigma = [level["sigma"] for level in levels]
    with drawing(figsize=(10.5, 6.4)) as figure:
        axes = figure.subplots(2, 2, sharex=True)
        colours = require("matplotlib", "plot").colormaps["viridis"]
        for axis, (quantity, heading) in zip(axes.flat, PANELS.items(), strict=False):
            for n, name in enumerate(targets):
                rows = [level["targets"][name] for level in levels]
                colour = colours(0.9 * n / max(len(targets) - 1, 1))
                _line(axis, sigma, rows, quantity, color=colour, label=_label(name))
            axis.set_title(heading)
        last = axes.flat[3]
        _line(last, sigma, levels, "value_error", color=INK, label="value error")
        _line(last, sigma, levels, "bellman_residual", color=INK, linestyle="--", label="Bellman residual")
        last.set_title("The denoiser, and the λ of least total")
        choice = last.twinx()
        best = [level["best_lmbda"] for level in levels]
        choice.plot(sigma, best, color=ORANGE, drawstyle="steps-mid", label="best λ")
        choice.set(ylim=(-0.05, 1.05), ylabel="best λ")
        choice.yaxis.label.set_color(ORANGE)
        choice.grid(visible=False)
        lines = [*last.get_lines(), *choice.get_lines()]
        names = [line.get_label() for line in lines]
        figure.legend(*axes.flat[0].get_legend_handles_labels(), loc="outside right upper")
        figure.legend(lines, names, loc="outside right lower")
        axes.flat[0].set_xscale("log")
        for axis in (
            axes.flat[0].xaxis,
            *(panel.yaxis for panel in axes.flat if panel.get_yscale() == "log"),
        ):
            plain_ticks(axis)
        for axis in axes[1]:
            axis.set_xlabel("noise level σ/α")
        axes.flat[0].set_ylabel("in units of the network's output")
        axes.flat[2].set_ylabel("in units of the network's output")
        write_title(figure, title)
        return save_figure(figure, Path(path), dpi=200)


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
