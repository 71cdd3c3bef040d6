"""The picture of the map: what is learned downwards, how far the target looks to the right, a box an objective."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffrl.extras import require
from diffrl.objectives.place import Place
from docs.map_places import WORDS, description, placed

__all__ = ["draw_map", "map_figure", "slots"]

COLOURS = {
    "nothing": "#dddddd",
    "own": "#a6cee3",
    "residual": "#cab2d6",
    "target": "#b2df8a",
    "teacher": "#fdbf6f",
}
MARKS = {"none": "", "forward": "→", "posterior": "⇉", "reference": "≈", "own": "↻", "teacher": "◆"}
EDGES: dict[str, Any] = {"markov": (0, (5, 2)), "shared": "-", "any": (0, (1, 1.5)), "none": "none"}
DOTS = {"chains": "●●●", "pairs": "●●", "states": "●"}
COLUMNS = list(WORDS["look"])
LEFT = -0.92  # where the names of rows begin, in columns
HALF = 0.36  # of a box's height, in slots
LEGEND = 5.4  # slots below the last row


def slots(places: Mapping[str, Place]) -> dict[str, tuple[str, int]]:
    """The row of each objective, what it learns, and a slot in it that is free in all columns that its box covers.

    The box of one whose target changes along the training reaches from where it begins to where it ends.
    """
    found: dict[str, tuple[str, int]] = {}
    taken: set[tuple[str, int, int]] = set()
    for name in sorted(places, key=lambda name: -_columns(places[name])[1] + _columns(places[name])[0]):
        row, (first, last) = places[name].learns, _columns(places[name])
        slot = 0
        while any((row, x, slot) in taken for x in range(first, last + 1)):
            slot += 1
        taken |= {(row, x, slot) for x in range(first, last + 1)}
        found[name] = row, slot
    return found


def _columns(place: Place) -> tuple[int, int]:
    """First and last column of its box."""
    end = COLUMNS.index(place.look)
    begin = end if place.begins is None else COLUMNS.index(place.begins)
    return min(begin, end), max(begin, end)


def draw_map(path: Path) -> None:
    """Draw every objective that has coordinates.

    Args:
        path: of a PNG, whose metadata hold names and coordinates.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    map_figure().savefig(path, metadata={"Description": description()})


def map_figure() -> Any:  # noqa: ANN401
    """The figure of `draw_map`."""
    places = placed()
    at = slots(places)
    rows = [row for row in WORDS["learns"] if any(r == row for r, _ in at.values())]
    heights = {row: 1 + max(slot for r, slot in at.values() if r == row) for row in rows}
    total = sum(heights.values()) + 0.5 * len(heights)
    figure = require("matplotlib.figure", "plot").Figure(figsize=(10, 0.3 * (total + 1.2 + LEGEND)), dpi=150)
    axes = figure.add_axes((0.005, 0, 0.99, 1))
    axes.set(xlim=(LEFT, len(COLUMNS)), ylim=(total + LEGEND, -1.2))
    axes.axis("off")
    axes.text(LEFT + 0.03, -0.6, "target looks  →", va="center", fontsize=11)
    for x, look in enumerate(WORDS["look"].values()):
        axes.text(x + 0.5, -0.6, look, ha="center", va="center", fontsize=11, weight="bold")
    tops, top = {}, 0.0
    for row, height in heights.items():
        tops[row] = top
        axes.axhline(top, color="#888888", linewidth=0.8)
        words = re.sub(r"X_\{t→(.)\}, ", r"$X_{t\\to \1}$\n", WORDS["learns"][row])
        axes.text(LEFT + 0.03, top + (height + 0.5) / 2, words, va="center", fontsize=11, weight="bold")
        top += height + 0.5
    axes.axhline(total, color="#888888", linewidth=0.8)
    for name, place in places.items():
        row, slot = at[name]
        _box(axes, name, place, tops[row] + 0.75 + slot)
    _legend(axes, total)
    return figure


def _box(axes: Any, name: str, place: Place, y: float) -> None:
    first, last = _columns(place)
    _rectangle(axes, first + 0.03, y, last - first + 0.94, COLOURS[place.bootstrap], EDGES[place.coupling])
    x = COLUMNS.index(place.look)
    axes.text(x + 0.1, y, MARKS[place.next_state], ha="center", va="center", fontsize=11)
    axes.text(x + 0.17, y, name, va="center", fontsize=9, family="monospace")
    axes.text(x + 0.955, y, DOTS[place.states], ha="right", va="center", fontsize=4.5)
    if place.begins is not None:
        start = COLUMNS.index(place.begins) + 0.3
        arrow = {"arrowstyle": "->", "color": "#555555"}
        axes.annotate("", (x + 0.02, y), (start, y), arrowprops=arrow)


def _rectangle(axes: Any, x: float, y: float, width: float, colour: str, edge: Any) -> None:
    rectangle = require("matplotlib.patches", "plot").Rectangle
    axes.add_patch(
        rectangle((x, y - HALF), width, 2 * HALF, facecolor=colour, edgecolor="black", linestyle=edge)
    )


def _legend(axes: Any, total: float) -> None:
    """Lines of samples of colours, marks, edges and dots, each with its words."""
    for k, (title, key, samples) in enumerate(
        (
            ("bootstraps from", "bootstrap", COLOURS),
            ("next state", "next_state", MARKS),
            ("coupling", "coupling", EDGES),
            ("states", "states", DOTS),
        )
    ):
        x, y = 0.03, total + 1.0 + 1.2 * k
        axes.text(LEFT + 0.03, y, title, va="center", fontsize=10, weight="bold")
        for value, words in WORDS[key].items():
            if words == "—":
                continue
            sample = samples[value]
            if key in ("bootstrap", "coupling"):
                colour, edge = (sample, "none") if key == "bootstrap" else ("white", sample)
                _rectangle(axes, x, y, 0.12, colour, edge)
            else:
                size = 5 if key == "states" else 12
                axes.text(x + 0.06, y, sample, ha="center", va="center", fontsize=size)
            axes.text(x + 0.16, y, words, va="center", fontsize=9)
            x += 0.25 + 0.0315 * len(words)
