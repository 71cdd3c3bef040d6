"""Figures of a fine-tuning comparison: reward by each cost, what it costs in likeness, samples before and after."""

from pathlib import Path
from typing import Any

import numpy as np

from diffrl.experiments.findings import interval
from diffrl.experiments.reports.run_figure import REAL, STYLE, show_images, show_points
from diffrl.experiments.reports.training_figures import STYLES
from diffrl.experiments.tuning_findings import AXES, Method, Tuning
from diffrl.extras import require
from diffrl.training.runs import RunFolder

__all__ = ["draw_curves", "draw_pictures"]


def draw_curves(tuning: Tuning, folder: Path) -> list[tuple[str, Path]]:
    """Reward over trajectories, queries and updates, a figure each; and likeness to the base beside reward.

    Args:
        tuning: the comparison.
        folder: for PNG and PDF; made if missing.

    Returns:
        Title and PNG of each figure.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    names = tuning.figures
    heldout = "heldout_reward" in names
    drawn = []
    for axis, words in AXES.items():
        title = f"Reward by {words}"
        figure, panels = _figure(1 + heldout, f"{title}: the same for all is {words}; the others differ")
        for panel, name in zip(panels, ["eval_reward", "heldout_reward"], strict=False):
            _lines(panel, tuning, name, axis)
            panel.set(xlabel=words, ylabel=names[name])
            panel.axvline(tuning.common(axis), color=REAL, linewidth=0.8, linestyle=":")
        _legend(figure, panels[0])
        drawn.append((title, _save(figure, folder, f"reward_by_{axis}")))
    title = "What the reward costs: diversity and distance to the base"
    others = [name for name in ("diversity", "distance_to_base", "kl_to_base") if name in names]
    figure, panels = _figure(len(others), title)
    for panel, name in zip(panels, others, strict=True):
        for method, (colour, marker) in zip(tuning.methods, STYLES, strict=False):
            x = np.array([interval(y).iqm for y in method.curve("eval_reward", "trajectories")[1].T])
            y = np.array([interval(y).iqm for y in method.curve(name, "trajectories")[1].T])
            panel.plot(x, y, color=colour, marker=marker, markersize=3, linewidth=1, label=method.name)
        panel.set(xlabel=names["eval_reward"], ylabel=names[name])
    _legend(figure, panels[0])
    return [*drawn, (title, _save(figure, folder, "likeness_by_reward"))]


def draw_pictures(tuning: Tuning, folder: Path) -> tuple[str, Path]:
    """Samples of the base and of each method's first seed, from the same noise.

    Args:
        tuning: the comparison.
        folder: for PNG and PDF; made if missing.

    Returns:
        Title and PNG.
    """
    base = next(iter(RunFolder(tuning.methods[0].folders[0]).samples()["base"].values()))
    parts = [("base", base, REAL)]
    for method, (colour, _) in zip(tuning.methods, STYLES, strict=False):
        tuned = next(iter(RunFolder(method.folders[0]).samples()["tuned"].values()))
        parts.append((f"{method.name}, seed {method.seeds[0]}", tuned, colour))
    title = "Samples before and after, from the same noise"
    figure, panels = _figure(len(parts), title, width=2.8, columns=4)
    for panel, (name, x, colour) in zip(panels, parts, strict=True):
        if x.ndim == 4:
            show_images(panel, x, columns=8)
        else:
            show_points(panel, x, base, colour)
        panel.set_title(name, color=colour)
    return title, _save(figure, folder, "before_and_after")


def _lines(panel: Any, tuning: Tuning, name: str, axis: str) -> None:
    """The interquartile mean over seeds of each method, in its 95 % interval."""
    for method, (colour, marker) in zip(tuning.methods, STYLES, strict=False):
        x, y = method.curve(name, axis)
        found = [interval(column) for column in y.T]
        mean = [f.iqm for f in found]
        panel.plot(x, mean, color=colour, marker=marker, markersize=3, linewidth=1.5, label=_label(method))
        if len(method.seeds) > 1:
            low, high = ([getattr(f, end) for f in found] for end in ("low", "high"))
            panel.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0)


def _label(method: Method) -> str:
    return f"{method.name}, {len(method.seeds)} seed{'s' if len(method.seeds) > 1 else ''}"


def _figure(panels: int, title: str, width: float = 4.2, columns: int = 9) -> tuple[Any, list[Any]]:
    """A figure of so many panels, in rows of at most `columns`."""
    matplotlib = require("matplotlib", "plot")
    across = min(panels, columns)
    down = -(-panels // across)
    with matplotlib.rc_context(STYLE):
        size = (width * across, 0.4 + (width if down > 1 else 3.4) * down)
        figure = require("matplotlib.figure", "plot").Figure(figsize=size, layout="constrained")
        grid = list(figure.subplots(down, across, squeeze=False).flat)
        for empty in grid[panels:]:
            empty.set_axis_off()
        figure.suptitle(title, x=0.01, ha="left", fontsize=10, fontweight="bold")
    return figure, grid[:panels]


def _legend(figure: Any, panel: Any) -> None:
    """Under all panels, where it hides nothing."""
    handles, labels = panel.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower left", ncols=min(len(labels), 5), fontsize=8)


def _save(figure: Any, folder: Path, name: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    matplotlib = require("matplotlib", "plot")
    with matplotlib.rc_context(STYLE):
        figure.savefig(folder / f"{name}.png", dpi=150)
        figure.savefig(folder / f"{name}.pdf")
    return folder / f"{name}.png"
