"""The figure of one fine-tuning run, drawn from the files in its folder."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from diffrl.experiments.reports.finetuning_figures import samples_of, show_samples
from diffrl.experiments.reports.parts import reward_label
from diffrl.experiments.reports.style import (
    BLUE,
    FAINT,
    GREY,
    ORANGE,
    drawing,
    save_figure,
    write_note,
    write_title,
)
from diffrl.finetuning.evaluation import TO_BASE, to_base_of
from diffrl.training.runs import RunFolder
from diffrl.training.table import Table

__all__ = ["draw_tuning"]

LIKENESS = {"diversity": "diversity", TO_BASE: "distance to the base"}


def draw_tuning(folder: str | Path) -> Path:
    """Draw what a fine-tuning run did: reward and likeness to the base by iteration, samples before and after.

    Writes plots/summary.png and .pdf.

    Args:
        folder: of a finished fine-tuning run.

    Returns:
        The png's path.

    Raises:
        MissingExtra: matplotlib is not installed.
        RunFolderError: there is no run in the folder.
    """
    run = RunFolder.open(Path(folder))
    config, found = run.config(), run.results()["finetuning"]
    rows = Table(run.path / "metrics.csv", ()).rows()
    base, tuned = (samples_of(run.path, name) for name in ("base", "tuned"))
    pictures = (
        ("before tuning", base, found["base"]["eval_reward"], GREY),
        ("after", tuned, found["final"]["eval_reward"], BLUE),
    )
    with drawing(figsize=(11, 7.6)) as figure:
        (rewards, likeness), panels = figure.subplots(2, 2, height_ratios=(1, 1.4))
        _draw_rewards(rewards, rows, config)
        _draw_likeness(likeness, rows)
        for panel, (name, x, reward, colour) in zip(panels, pictures, strict=True):
            show_samples(panel, x, base, colour, torch.cat([base, tuned]))
            panel.set_title(f"Samples {name}: reward {reward:.3g}", color=colour)
        iterations = config["loop"]["iterations"]
        write_title(
            figure,
            f"Tuned for {reward_label(config['reward'])}: {iterations} iterations, seed {config['seed']}",
        )
        write_note(figure, "Samples before and after are from the same noise, which no training saw.")
        return save_figure(figure, run.path / "plots" / "summary.png")


def _curve(rows: list[dict[str, str]], name: str) -> tuple[list[float], list[float]]:
    """The iterations at which a figure was taken, and the figure."""
    taken = [row for row in rows if row.get(name)]
    return [float(row["iteration"]) for row in taken], [float(row[name]) for row in taken]


def _draw_rewards(axes: Any, rows: list[dict[str, str]], config: Mapping[str, Any]) -> None:
    """The reward on training noise and on held-out noise, and the reward that is never trained on, if there is one."""
    axes.plot(*_curve(rows, "reward"), color=FAINT, linewidth=1, label="training noise")
    axes.plot(*_curve(rows, "eval_reward"), color=BLUE, marker="o", markersize=3, label="held-out noise")
    steps, held_out = _curve(rows, "heldout_reward")
    if steps:
        label = f"never trained on: {reward_label(config['heldout_reward'])}"
        axes.plot(steps, held_out, color=ORANGE, marker="s", markersize=3, label=label)
    axes.set(title="Reward", xlabel="iteration", ylabel="mean reward")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend()


def _draw_likeness(axes: Any, rows: list[dict[str, str]]) -> None:
    """Diversity of the samples, and their distance to those of the base."""
    for (name, label), style in zip(LIKENESS.items(), ((BLUE, "o"), (ORANGE, "s")), strict=True):
        column = to_base_of(rows[0] if rows else ()) if name == TO_BASE else name
        axes.plot(*_curve(rows, column), color=style[0], marker=style[1], markersize=3, label=label)
    axes.set(title="Likeness to what was tuned", xlabel="iteration", ylabel="in units of the data")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend()
