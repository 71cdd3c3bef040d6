"""Samples of several schemes side by side: a row for each, a column for each number of network evaluations."""

import itertools
import textwrap
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from diffrl.experiments.reports.style import GREY, show_images, show_points

__all__ = ["COLUMNS", "draw_scheme_samples"]

COLUMNS = 3
"""Numbers of evaluations shown: the fewest."""
ACROSS, DOWN = 5, 2
"""Images in a cell."""
BESIDE = 3
"""Real images in a row."""


def draw_scheme_samples(
    part: Any,
    letter: str,
    samples: Mapping[str, Mapping[str, Tensor]],
    names: Mapping[str, str],
    colours: Mapping[str, str],
) -> None:
    """Draw the data at the left, and beside them what each scheme makes of the same noise.

    Args:
        part: a figure, or part of one, of matplotlib.
        letter: of the panel.
        samples: scheme, and "data" → network evaluations → [n, *E].
        names: scheme → its name for people; only these are shown.
        colours: of the schemes' names.
    """
    real = next(iter(samples["data"].values()))
    images = real.ndim == 4
    nfes = sorted(samples[next(iter(names))], key=int)[:COLUMNS]
    widths = [BESIDE / ACROSS if images else 1.0, *[1.0] * len(nfes)]
    grid = part.add_gridspec(len(names), 1 + len(nfes), width_ratios=widths)
    data = part.add_subplot(grid[:, 0] if images else grid[0, 0])
    data.set_title(f"{letter}  Real data", color=GREY)
    if images:
        show_images(data, real[: BESIDE * (DOWN * len(names) + (len(names) - 1) // 2)], columns=BESIDE)
    else:
        show_points(data, real, real, GREY, real)
    for (row, name), (column, nfe) in itertools.product(enumerate(names), enumerate(nfes, 1)):
        axes, x = part.add_subplot(grid[row, column]), samples[name][nfe]
        if images:
            show_images(axes, x[: ACROSS * DOWN], columns=ACROSS)
        else:
            show_points(axes, x, real, colours[name], real)
        if row == 0:
            axes.set_title(f"Samples, NFE {nfe}")
        if column == 1:
            axes.set_ylabel(textwrap.fill(names[name], 16), color=colours[name], weight="bold", fontsize=8)
