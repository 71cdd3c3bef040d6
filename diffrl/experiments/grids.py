"""Grids of settings: axes with values, and the points that are their product."""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["Grid", "grid_scheme"]


@dataclass(frozen=True)
class Grid:
    """Axes and what they set.

    Args:
        keys: the setting of each axis, such as ``{"λ": "objective.lmbda"}``.
        axes: the values of each axis, as they are written, such as ``{"λ": ("0", "0.5", "1")}``.
    """

    keys: Mapping[str, str]
    axes: Mapping[str, tuple[str, ...]]

    @property
    def points(self) -> dict[str, dict[str, str]]:
        """The value of each axis at each point of the grid, by the point's name; none if there is no axis."""
        products = itertools.product(*self.axes.values()) if self.axes else ()
        points = [dict(zip(self.axes, values, strict=True)) for values in products]
        return {grid_scheme(point): point for point in points}

    def words(self, point: str) -> list[str]:
        """The overrides at a point, by its name."""
        return [f"{self.keys[label]}={value}" for label, value in self.points[point].items()]

    def ends(self, point: str) -> list[str]:
        """The axes at whose first or last value a point lies, of those that have values in between."""
        at, axes = self.points[point], self.axes
        return [label for label, v in axes.items() if len(v) > 2 and at[label] in (v[0], v[-1])]


def grid_scheme(axes: Mapping[str, str]) -> str:
    """Name of the scheme at a point of a grid, such as "λ=0.5, η=1.0", from the value of each axis."""
    return ", ".join(f"{label}={value}" for label, value in axes.items())
