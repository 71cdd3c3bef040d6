"""What the benchmarks print and write: one table, one JSON file."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from timing import Ratio

__all__ = ["Row", "as_json", "table"]


@dataclass(frozen=True)
class Row:
    """What was measured of one thing.

    Args:
        name: of the thing.
        milliseconds: what one call of diffrl's takes, the median.
        ratios: of times, by what diffrl was compared with; the promise is about the first.
        promise: "≤ 1.25" or "≥ 10"; "" for none.
    """

    name: str
    milliseconds: float
    ratios: Mapping[str, Ratio]
    promise: str = ""

    @staticmethod
    def milliseconds_of(seconds: NDArray[np.float64]) -> float:
        """The median in milliseconds."""
        return 1e3 * float(np.median(seconds))

    @property
    def verdict(self) -> str:
        """Whether the median keeps the promise."""
        if not self.promise:
            return ""
        sign, bound = self.promise.split()
        ratio = next(iter(self.ratios.values())).median
        return "kept" if (ratio <= float(bound) if sign == "≤" else ratio >= float(bound)) else "missed"


def table(title: str, direction: str, rows: Sequence[Row]) -> str:
    """A part of the table: its title and the heads of its columns, then a line for each row.

    Args:
        title: what the rows are about.
        direction: how a ratio reads, "time over" or "times as fast as".
        rows: all compared with the same things.
    """
    first, *others = rows[0].ratios
    lines = [_line(title, "diffrl", f"{direction} {first}", "promise", "", *others)]
    for r in rows:
        ratio, *rest = map(str, r.ratios.values())
        lines.append(_line("  " + r.name, f"{r.milliseconds:.3g} ms", ratio, r.promise, r.verdict, *rest))
    return "\n".join(lines)


def _line(name: str, *cells: str) -> str:
    widths = (9, 33, 8, 6, 18, 18, 18)
    return f"{name:<36}" + "  ".join(f"{c:>{w}}" for c, w in zip(cells, widths, strict=False)).rstrip()


def as_json(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The rows as plain data, to four digits."""
    return [
        {
            "name": r.name,
            "milliseconds": _rounded(r.milliseconds),
            "ratios": {
                other: {k: _rounded(v) for k, v in asdict(x).items()} for other, x in r.ratios.items()
            },
            "promise": r.promise,
            "verdict": r.verdict,
        }
        for r in rows
    ]


def _rounded(x: float) -> float:
    return float(f"{x:.4g}")
