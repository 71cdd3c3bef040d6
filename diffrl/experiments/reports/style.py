"""The look of all figures, in one place: colours, lines with bands, ticks, pictures of samples, saving."""

import math
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from diffrl.experiments.image_sheets import image_sheet
from diffrl.extras import require
from diffrl.metrics.intervals import Interval
from diffrl.text_files import write_csv

__all__ = [
    "BLUE",
    "FAINT",
    "GREY",
    "INK",
    "ORANGE",
    "PALETTE",
    "Array",
    "draw_band",
    "draw_points",
    "draw_ratios",
    "drawing",
    "ink_on",
    "name_ticks",
    "legend_beside",
    "plain_ticks",
    "plane_of",
    "save_figure",
    "show_images",
    "show_points",
    "write_note",
    "write_title",
]

Array = NDArray[Any]

INK, GREY, FAINT = "#222222", "#555555", "#8A8A8A"
BLUE, ORANGE = "#0072B2", "#D55E00"
# The palette of Okabe and Ito, which colour-blind people can tell apart; the shapes of markers say the same.
PALETTE = [(BLUE, "o"), (ORANGE, "s"), ("#009E73", "^"), ("#CC79A7", "D"), ("#56B4E9", "v"), ("#E69F00", "P")]
STYLE = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "text.color": INK,
    "text.parse_math": False,  # what a user named may hold dollar signs
    "axes.grid": True,
    "grid.color": "#E6E6E6",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "pdf.fonttype": 42,
}


@contextmanager
def drawing(**options: Any) -> Iterator[Any]:
    """A new figure; what is drawn and saved inside the ``with`` block has the common style.

    Args:
        options: of matplotlib's Figure, such as ``figsize``.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    matplotlib = require("matplotlib", "plot")
    with matplotlib.rc_context(STYLE):
        yield require("matplotlib.figure", "plot").Figure(layout="constrained", **options)


def save_figure(
    figure: Any, path: Path, *, rows: Sequence[Mapping[str, Any]] | None = None, dpi: int = 150
) -> Path:
    """Write a figure as PNG and PDF, and its numbers as CSV if they are given; returns the path of the PNG.

    Args:
        figure: of matplotlib.
        path: where to write; its suffix does not matter, and its folder is made if it is missing.
        rows: the numbers that the figure shows, all with the same columns.
        dpi: of the PNG.
    """
    png = path.with_suffix(".png")
    png.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(png, dpi=dpi)
    figure.set_layout_engine("none")  # it is laid out by now
    figure.savefig(
        png.with_suffix(".pdf"), dpi=dpi, metadata={"CreationDate": None}
    )  # no date: the same each time
    if rows is not None:
        write_csv(png.with_suffix(".csv"), list(rows[0]), rows)
    return png


def name_ticks(axes: Any, values: Sequence[str]) -> None:
    """Put a tick with its name at each of these values of x, and nowhere else."""
    axes.set_xticks([float(value) for value in values], values, minor=False)
    axes.set_xticks([], minor=True)
    axes.margins(x=0.1)


def write_title(figure: Any, text: str) -> None:
    """Write the title of a figure, in as many lines as it needs."""
    lines = textwrap.fill(text, int(11 * figure.get_figwidth()))
    figure.suptitle(lines, x=0.01, ha="left", fontsize=11, fontweight="bold")


def write_note(figure: Any, text: str, **style: Any) -> None:
    """Write what one must know to read a figure small beneath it, in as many lines as it needs."""
    lines = textwrap.fill(text, int(16 * figure.get_figwidth()))
    figure.supxlabel(lines, x=0.01, ha="left", **{"fontsize": 7.5, "color": GREY, **style})


def legend_beside(figure: Any, axes: Any, title: str | None = None) -> None:
    """The legend of these axes to the right of the figure, where it hides nothing."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        loc="outside right center",
        title=title,
        fontsize=8,
        title_fontsize=8,
        alignment="left",
    )


def draw_band(axes: Any, x: Sequence[float] | Array, y: Sequence[Interval], **style: Any) -> None:
    """A line through interquartile means, in the band of their intervals where there are any.

    Args:
        axes: of matplotlib.
        x: where the means lie.
        y: as many intervals.
        style: of the line; its colour is the band's too.
    """
    axes.plot(x, [point.iqm for point in y], **style)
    if y and y[0].low is not None:
        low, high = [point.low for point in y], [point.high for point in y]
        axes.fill_between(x, low, high, color=style["color"], alpha=0.15, linewidth=0)


def draw_ratios(axes: Any, table: Array, most: float, rows: Sequence[str], columns: Sequence[str]) -> Any:
    """A heat map of ratios, on a scale that is symmetric about 1, without its numbers.

    Args:
        axes: of matplotlib.
        table: ratios, [rows, columns]; NaN where there is none.
        most: log2 of the ratio at the end of the scale.
        rows: names of the rows.
        columns: names of the columns.

    Returns:
        The image, for a colour bar.
    """
    image = axes.imshow(np.log2(table), cmap="RdBu_r", vmin=-most, vmax=most, aspect="auto")
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(rows)), rows)
    axes.grid(False)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return image


def ink_on(ratio: float, most: float) -> str:
    """The colour of a number that can be read on the colour of `draw_ratios`."""
    return "white" if abs(math.log2(ratio)) > 0.65 * most else INK


def plain_ticks(axis: Any, most: int = 9) -> None:
    """Put round ticks on a logarithmic axis, two or more: evenly spaced within a decade, else 1, 2, 5.

    Args:
        axis: the x or y axis of matplotlib, whose limits are set.
        most: how many ticks there may be, unless only more can be round.
    """
    low, high = axis.get_view_interval()
    sets = _even_ticks(low, high) if high < 10 * low else _decade_ticks(low, high)
    scales = [ticks for ticks in sets if len(ticks) > 1]  # from many ticks to few; one alone is no scale
    ticks = next((ticks for ticks in scales if len(ticks) <= most), scales[-1])
    axis.set_ticks(ticks, [f"{tick:.4g}" for tick in ticks])
    axis.set_ticks([], minor=True)


def _even_ticks(low: float, high: float) -> Iterator[list[float]]:
    """Ever fewer ticks, evenly spaced by a round step."""
    base = 10.0 ** math.floor(math.log10(high - low))
    for step in (base / 20, base / 10, base / 5, base / 2, base, 2 * base, 2.5 * base, 5 * base):
        yield [k * step for k in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _decade_ticks(low: float, high: float) -> Iterator[list[float]]:
    """Ever fewer ticks: some in each decade, then one in each, then one in every few."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    sets = [(1, (1, 2, 5)), (1, (1, 3)), *((every, (1,)) for every in range(1, len(decades) + 1))]
    for every, mantissas in sets:
        ticks = [m * 10.0**d for d in decades if d % every == 0 for m in mantissas]
        yield [tick for tick in ticks if low <= tick <= high]


def show_images(axes: Any, x: Tensor, *, columns: int) -> None:
    """Draw images [n, 1 or 3, H, W] in [-1, 1] as one sheet."""
    sheet = image_sheet(x.numpy(), columns)
    pixels = sheet if sheet.shape[2] == 3 else sheet[..., 0]
    axes.imshow(pixels, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    axes.set(xticks=[], yticks=[])
    axes.grid(False)
    axes.spines[:].set_visible(False)


def show_points(axes: Any, x: Tensor, beneath: Tensor, colour: str, frame: Tensor) -> None:
    """Draw samples [n, *E] as points over others, which fix the plane; `frame` [m, *E] fixes what is seen."""
    plane, _ = plane_of(beneath.numpy())
    draw_points(axes, plane(x.numpy()), plane(beneath.numpy()), colour, plane(frame.numpy()))


def draw_points(axes: Any, points: Array, beneath: Array | None, colour: str, frame: Array) -> None:
    """Draw points [n, 2], over others if given, in a square a fifth larger than the points `frame` [m, 2].

    How many lie outside is written into the corner.
    """
    if beneath is not None:
        axes.scatter(*beneath.T, s=3, color="#C8C8C8", linewidths=0, rasterized=True)
    axes.scatter(*points.T, s=4, color=colour, alpha=0.55, linewidths=0, rasterized=True)
    low, high = frame.min(0), frame.max(0)
    middle, half = (low + high) / 2, 0.6 * float((high - low).max())
    x, y = ((centre - half, centre + half) for centre in middle)
    axes.set(xlim=x, ylim=y, aspect="equal")
    if outside := int((np.abs(points - middle) > half).any(1).sum()):
        words = f"{outside:,} of {len(points):,} outside"
        axes.text(
            0.98, 0.02, words, transform=axes.transAxes, ha="right", va="bottom", fontsize=7, color=GREY
        )
    axes.grid(False)


def plane_of(real: Array) -> tuple[Callable[[Array], Array], tuple[str, str]]:
    """The plane in which points [n, *E] are seen best.

    Returns:
        The map of points [n, *E] to the plane [n, 2], and the names of its axes: the coordinates of points in the
        plane; of numbers, their value and rank; else the two directions of greatest variance.
    """
    flat = real.reshape(len(real), -1)
    if flat.shape[1] == 2:
        return lambda x: x.reshape(len(x), -1), ("x₁", "x₂")
    if flat.shape[1] == 1:
        return lambda x: np.hstack([x.reshape(len(x), 1), np.linspace(0, 1, len(x))[:, None]]), ("x", "rank")
    centre = flat.mean(0)
    axes = np.linalg.svd(flat - centre, full_matrices=False)[2][:2]
    axes = axes * np.sign(axes[np.arange(2), np.abs(axes).argmax(1)])[:, None]  # either sign would do: fix it
    return lambda x: (x.reshape(len(x), -1) - centre) @ axes.T, (
        "first principal axis",
        "second principal axis",
    )
