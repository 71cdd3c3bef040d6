"""Tables: `metrics.csv`, written row by row while a run goes on, and aligned text for a terminal."""

import csv
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["Table", "aligned", "markdown_table"]


class Table:
    """A CSV file of named columns, empty where a figure was not taken.

    Args:
        path: the file; made with the first row.
        columns: their names.
    """

    def __init__(self, path: Path, columns: tuple[str, ...]) -> None:
        self.path, self.columns = path, columns

    def append(self, row: Mapping[str, Any]) -> None:
        """Write one row at the end.

        Raises:
            KeyError: a figure without a column.
        """
        if unknown := set(row) - set(self.columns):
            raise KeyError(f"no column for {', '.join(sorted(unknown))}")
        new = not self.path.exists()
        with self.path.open("a", newline="") as file:
            writer = csv.DictWriter(file, self.columns, restval="")
            if new:
                writer.writeheader()
            writer.writerow(row)

    def rows(self) -> list[dict[str, str]]:
        """All whole rows, as text; a crash may have cut the last one short."""
        if not self.path.exists():
            return []
        with self.path.open(newline="") as file:
            return [row for row in csv.DictReader(file) if None not in row.values()]

    def keep(self, wanted: Callable[[dict[str, str]], bool]) -> None:
        """Drop the rows that are not wanted: those that a resumed run writes again."""
        kept = Table(self.path.with_name(self.path.name + ".tmp"), self.columns)
        kept.path.unlink(missing_ok=True)
        for row in self.rows():
            if wanted(row):
                kept.append(row)
        if kept.path.exists():
            os.replace(kept.path, self.path)
        else:
            self.path.unlink(missing_ok=True)


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Text in columns: the first flush left, the others flush right. An empty row is a rule.

    >>> print(aligned([["", "TD", "MC"], [], ["seconds", "1.84", "12"]]))
               TD  MC
    -----------------
    seconds  1.84  12
    """
    widths = [max(map(len, column)) for column in zip(*(row for row in rows if row), strict=True)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
        if row
        else "-" * (sum(widths) + 2 * (len(widths) - 1))
        for row in rows
    ]
    return "\n".join(line.rstrip() for line in lines)


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown; the first row is its head."""
    escaped = ([cell.replace("|", "\\|") for cell in row] for row in rows)
    lines = [f"| {' | '.join(row)} |" for row in escaped]
    return "\n".join([lines[0], f"|{'---|' * len(rows[0])}", *lines[1:], ""])
