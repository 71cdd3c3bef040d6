"""The table of a run, `metrics.csv`: a row is written whenever figures are taken."""

import csv
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from diffrl.errors import InputKeyError

__all__ = ["Table"]


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
            raise InputKeyError(f"no column for {', '.join(sorted(unknown))}")
        new = not self.path.exists()
        with self.path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self.columns, restval="")
            if new:
                writer.writeheader()
            writer.writerow(row)

    def rows(self) -> list[dict[str, str]]:
        """All whole rows, as text; a crash may have cut the last one short."""
        if not self.path.exists():
            return []
        with self.path.open(newline="", encoding="utf-8") as file:
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
