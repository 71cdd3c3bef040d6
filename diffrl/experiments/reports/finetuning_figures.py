"""Figures of fine-tuning methods: reward by each cost, what it costs in likeness, samples before and after."""

from itertools import cycle
from pathlib import Path
from typing import Any

from diffrl.experiments.method_findings import AXES, Method, MethodFindings
from diffrl.experiments.reports.style import (
    GREY,
    PALETTE,
    draw_band,
    drawing,
    save_figure,
    show_images,
    show_points,
)
from diffrl.metrics.intervals import interval
from diffrl.training.runs import RunFolder

__all__ = ["draw_curves", "draw_pictures"]

REWARDS = ("eval_reward", "heldout_reward")
LIKENESS = ("diversity", "distance_to_base", "kl_to_base")


def draw_curves(found: MethodFindings, folder: Path) -> list[tuple[str, Path]]:
    """Draw reward over each cost, a figure each, and likeness to the base over reward.

    Args:
        found: the comparison.
        folder: for PNG and PDF; made if missing.

    Returns:
        Title and PNG of each figure.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    rewards = [name for name in REWARDS if name in found.figures]
    drawn = []
    for axis, words in AXES.items():
        title = f"Reward by {words}"
        with drawing() as figure:
            panels = _panels(figure, len(rewards), f"{title}: the same for all is {words}; the others differ")
            for panel, name in zip(panels, rewards, strict=True):
                _draw_reward(panel, found, name, axis)
            _legend(figure, panels[0])
            drawn.append((title, save_figure(figure, folder / f"reward_by_{axis}")))
    title = "What the reward costs: diversity and distance to the base"
    likeness = [name for name in LIKENESS if name in found.figures]
    with drawing() as figure:
        panels = _panels(figure, len(likeness), title)
        for panel, name in zip(panels, likeness, strict=True):
            _draw_likeness(panel, found, name)
        _legend(figure, panels[0])
        return [*drawn, (title, save_figure(figure, folder / "likeness_by_reward"))]


def draw_pictures(found: MethodFindings, folder: Path) -> tuple[str, Path]:
    """Draw samples of the base and of each method's first seed, all from the same noise.

    Args:
        found: the comparison.
        folder: for PNG and PDF; made if missing.

    Returns:
        Title and PNG.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    base = next(iter(RunFolder(found.methods[0].folders[0]).samples()["base"].values()))
    parts = [("base", base, GREY)]
    for method, (colour, _) in zip(found.methods, cycle(PALETTE), strict=False):
        tuned = next(iter(RunFolder(method.folders[0]).samples()["tuned"].values()))
        parts.append((f"{method.name}, seed {method.seeds[0]}", tuned, colour))
    title = "Samples before and after, from the same noise"
    with drawing() as figure:
        panels = _panels(figure, len(parts), title, width=2.8, columns=4)
        for panel, (name, x, colour) in zip(panels, parts, strict=True):
            if x.ndim == 4:
                show_images(panel, x, columns=8)
            else:
                show_points(panel, x, base, colour)
            panel.set_title(name, color=colour)
        return title, save_figure(figure, folder / "before_and_after")


def _draw_reward(panel: Any, found: MethodFindings, name: str, axis: str) -> None:
    """A reward of each method over one cost; a dotted line shows how far all runs went."""
    for method, (colour, marker) in zip(found.methods, cycle(PALETTE), strict=False):
        x, by_seed = method.curve(name, axis)
        points = [interval(values) for values in by_seed.T]
        style = {"color": colour, "marker": marker, "markersize": 3, "linewidth": 1.5}
        draw_band(panel, x, points, label=_label(method), **style)
    panel.set(xlabel=AXES[axis], ylabel=found.figures[name])
    panel.axvline(found.common(axis), color=GREY, linewidth=0.8, linestyle=":")


def _draw_likeness(panel: Any, found: MethodFindings, name: str) -> None:
    """How like the base each method's samples are, over the reward that they have at the same evaluation."""
    for method, (colour, marker) in zip(found.methods, cycle(PALETTE), strict=False):
        x, y = (
            [interval(values).iqm for values in method.curve(figure, "trajectories")[1].T]
            for figure in ("eval_reward", name)
        )
        panel.plot(x, y, color=colour, marker=marker, markersize=3, linewidth=1, label=method.name)
    panel.set(xlabel=found.figures["eval_reward"], ylabel=found.figures[name])


def _label(method: Method) -> str:
    return f"{method.name}, {len(method.seeds)} seed{'s' if len(method.seeds) > 1 else ''}"


def _panels(figure: Any, count: int, title: str, *, width: float = 4.2, columns: int = 9) -> list[Any]:
    """So many panels, in rows of at most `columns`, under a title."""
    across = min(count, columns)
    down = -(-count // across)
    figure.set_size_inches(width * across, 0.4 + (width if down > 1 else 3.4) * down)
    grid = list(figure.subplots(down, across, squeeze=False).flat)
    for empty in grid[count:]:
        empty.set_axis_off()
    figure.suptitle(title, x=0.01, ha="left", fontsize=10, fontweight="bold")
    return grid[:count]


def _legend(figure: Any, panel: Any) -> None:
    """Under all panels, where it hides nothing."""
    handles, labels = panel.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower left", ncols=min(len(labels), 5), fontsize=8)
