"""What the benchmarks print and write: one table, one JSON file."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from timing import Ratio

__all__ = ["Row", "as_json", "shown", "table"]

NEAR = 0.05  # of a promise's bound: from there on a ratio has one digit more


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
        ratio, *rest = r.ratios.values()
        cells = (shown(ratio, r.promise, r.verdict), r.promise, r.verdict, *map(str, rest))
        lines.append(_line("  " + r.name, f"{r.milliseconds:.3g} ms", *cells))
    return "\n".join(lines)


def shown(ratio: Ratio, promise: str, verdict: str) -> str:
    """A ratio and its interval, with as many digits as tell on which side of the promise it lies."""
    digits = 2 if ratio.median < 10 else 1
    if promise:
        bound = float(promise.split()[1])
        digits += abs(ratio.median / bound - 1) < NEAR
        while verdict == "missed" and round(ratio.median, digits) == bound != ratio.median:
            digits += 1
    return ratio.written(digits)


def _line(name: str, *cells: str) -> str:
    widths = (9, 33, 8, 6, 18, 18, 18)
    return f"{name:<36}" + "  ".join(f"{c:>{w}}" for c, w in zip(cells, widths, strict=False)).rstrip()


def as_json(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The rows as plain data, to six digits."""
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
    return float(f"{x:.6g}")
