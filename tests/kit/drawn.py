"""What stands in a figure: caught when it is saved, and looked at without a picture."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


@contextmanager
def drawn() -> Iterator[list[Figure]]:
    """The figures that are saved inside the ``with`` block, each once."""
    found: list[Figure] = []
    save = Figure.savefig

    def savefig(self: Figure, *words: Any, **options: Any) -> None:
        save(self, *words, **options)
        if self not in found:
            found.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", savefig)
        yield found


def cut_off(figure: Figure) -> float:
    """By how many inches something reaches beyond the canvas; panels of equal axes may by a hair."""
    FigureCanvasAgg(figure)
    figure.draw_without_rendering()
    box, (width, height) = figure.get_tightbbox(), figure.get_size_inches()
    return max(-box.x0, -box.y0, box.x1 - width, box.y1 - height)


def points_under_legends(figure: Figure) -> int:
    """How many points of lines lie under a legend."""
    FigureCanvasAgg(figure)
    figure.draw_without_rendering()
    boxes = [a.get_legend().get_window_extent() for a in figure.axes if a.get_legend() is not None]
    boxes += [legend.get_window_extent() for legend in figure.legends]
    count = 0
    for axes in figure.axes:
        for line in axes.lines:
            points = line.get_transform().transform(np.column_stack(line.get_data()).astype(float))
            count += sum(bool(box.contains(x, y)) for box in boxes for x, y in points)
    return count


def title_of(figure: Figure) -> str:
    """The title above all panels, in one line."""
    return " ".join(figure.get_suptitle().split())
