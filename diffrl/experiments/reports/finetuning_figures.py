"""Figures of fine-tuning methods: reward by each cost, what it costs in likeness, samples before and after."""

from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffrl.experiments.image_sheets import square_columns
from diffrl.experiments.method_findings import AXES, Method, MethodFindings
from diffrl.experiments.reports.parts import reward_label
from diffrl.experiments.reports.style import (
    FAINT,
    GREY,
    INK,
    PALETTE,
    draw_band,
    drawing,
    legend_beside,
    save_figure,
    show_images,
    show_points,
    write_note,
    write_title,
)
from diffrl.finetuning.evaluation import TO_BASE
from diffrl.metrics.intervals import interval
from diffrl.training.runs import RunFolder

__all__ = ["draw_curves", "draw_pictures"]

REWARDS = ("eval_reward", "heldout_reward")
STYLES = [*PALETTE, (INK, "X"), (FAINT, "*")]
LIKENESS = ("diversity", TO_BASE, "kl_to_base")


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
    reward, drawn = reward_label(found.config["reward"]), []
    for axis, words in AXES.items():
        title = f"{reward[0].upper()}{reward[1:]} by {words}"
        with drawing() as figure:
            panels = _panels(figure, len(rewards))
            for panel, name in zip(panels, rewards, strict=True):
                _draw_reward(panel, found, name, axis)
            legend_beside(figure, panels[0])
            write_title(figure, title)
            note = (
                f"Interquartile mean and 95 % interval over seeds. Dotted: as many {words} as all runs had."
            )
            if "heldout_reward" in rewards:
                note += f" Held-out reward, never trained on: {reward_label(found.config['heldout_reward'])}."
            write_note(figure, note)
            drawn.append((title, save_figure(figure, folder / f"reward_by_{axis}")))
    title = f"What tuning for {reward} costs in diversity and distance"
    likeness = [name for name in found.figures if name.startswith(LIKENESS)]
    with drawing() as figure:
        panels = _panels(figure, len(likeness))
        for panel, name in zip(panels, likeness, strict=True):
            _draw_likeness(panel, found, name)
        legend_beside(figure, panels[0])
        write_title(figure, title)
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
    first = found.methods[0]
    base = samples_of(first.folders[0], "base")
    parts = [("before tuning", base, first.first("eval_reward")[0], GREY)]
    for method, (colour, _) in zip(found.methods, cycle(STYLES), strict=False):
        tuned, reward = samples_of(method.folders[0], "tuned"), method.last("eval_reward")[0]
        parts.append((f"{method.name}, seed {method.seeds[0]}", tuned, reward, colour))
    title = f"Samples before and after tuning for {reward_label(found.config['reward'])}, from the same noise"
    frame = torch.cat([x for _, x, _, _ in parts])
    with drawing() as figure:
        panels = _panels(figure, len(parts), width=2.8, columns=2 if len(parts) == 4 else 3)
        for panel, (name, x, reward, colour) in zip(panels, parts, strict=True):
            show_samples(panel, x, base, colour, frame)
            panel.set_title(f"{name}\nreward {reward:.2f}", color=colour)
        write_title(figure, title)
        return title, save_figure(figure, folder / "before_and_after")


def samples_of(folder: Path, name: str) -> Tensor:
    """The samples [n, *E] of that name in the folder of a fine-tuning run: "base" or "tuned"."""
    return next(iter(RunFolder(folder).samples()[name].values()))


def show_samples(panel: Any, x: Tensor, base: Tensor, colour: str, frame: Tensor) -> None:
    """Draw samples [n, *E]: images as a sheet, points over those of the base, where all of `frame` is seen."""
    if x.ndim == 4:
        show_images(panel, x, columns=square_columns(len(x)))
    else:
        show_points(panel, x, base, colour, frame)


def _draw_reward(panel: Any, found: MethodFindings, name: str, axis: str) -> None:
    """A reward of each method over one cost; a dotted line shows how far all runs went."""
    for method, (colour, marker) in zip(found.methods, cycle(STYLES), strict=False):
        x, by_seed = method.curve(name, axis)
        points = [interval(values) for values in by_seed.T]
        style = {"color": colour, "marker": marker, "markersize": 3, "linewidth": 1.5}
        draw_band(panel, x, points, label=_label(method), **style)
    panel.set(xlabel=AXES[axis], ylabel=found.figures[name])
    panel.axvline(found.common(axis), color=GREY, linewidth=0.8, linestyle=":")


def _draw_likeness(panel: Any, found: MethodFindings, name: str) -> None:
    """How like the base each method's samples are, over the reward that they have at the same evaluation."""
    for method, (colour, marker) in zip(found.methods, cycle(STYLES), strict=False):
        x, y = (
            [interval(values).iqm for values in method.curve(figure, "trajectories")[1].T]
            for figure in ("eval_reward", name)
        )
        panel.plot(x, y, color=colour, marker=marker, markersize=3, linewidth=1, label=method.name)
    panel.set(xlabel=found.figures["eval_reward"], ylabel=found.figures[name])


def _label(method: Method) -> str:
    return f"{method.name}, {len(method.seeds)} seed{'s' if len(method.seeds) > 1 else ''}"


def _panels(figure: Any, count: int, *, width: float = 4.2, columns: int = 9) -> list[Any]:
    """So many panels, in rows of at most `columns`; room is left for a title and a legend."""
    across = min(count, columns)
    down = -(-count // across)
    figure.set_size_inches(width * across + 1.8, 0.7 + (width if down > 1 else 3.4) * down)
    grid = list(figure.subplots(down, across, squeeze=False).flat)
    for empty in grid[count:]:
        empty.set_axis_off()
    return grid[:count]
