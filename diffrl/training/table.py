"""The table of a run, `metrics.csv`: a row is written whenever figures are taken."""

import csv
import io
import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from diffrl.errors import FileError, InputKeyError
from diffrl.text_files import file_errors, read_text

__all__ = ["Table"]


class Table:
    """A CSV file of named columns, empty where a figure was not taken.

    Args:
        path: the file; made with the first row.
        columns: their names; of a table that is only read they need not be given.
        labels: those of them that hold words; the others hold numbers.
        former: names of columns by those that they had in earlier versions, by which they are found too.
    """

    def __init__(
        self,
        path: Path,
        columns: tuple[str, ...],
        labels: tuple[str, ...] = (),
        former: Mapping[str, str] | None = None,
    ) -> None:
        self.path, self.columns, self.labels, self.former = path, columns, labels, former or {}

    def append(self, row: Mapping[str, Any]) -> None:
        """Write one row at the end.

        Raises:
            KeyError: a figure without a column.
            FileError: the row cannot be written.
        """
        if unknown := set(row) - set(self.columns):
            raise InputKeyError(f"no column for {', '.join(sorted(unknown))}")
        with file_errors(self.path, "written"):
            new = not self.path.exists()
            with self.path.open("a", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, self.columns, restval="")
                if new:
                    writer.writeheader()
                writer.writerow(row)

    def rows(self) -> list[dict[str, str]]:
        """All whole rows, as text; where a crash cut the last one short, a warning says that it is left out.

        Raises:
            FileError: the file cannot be read, or something else in it is no row of figures.
        """
        if not self.path.exists():
            return []
        whole, newline, rest = read_text(self.path).rpartition("\n")
        begun = ",".join(self.columns).startswith(rest.rstrip("\r")) or not self.columns
        if rest and (whole or begun):
            warnings.warn(
                f"{self.path} ends with half a row, which is left out", RuntimeWarning, stacklevel=2
            )
        elif rest:  # of somebody else
            whole = rest
        reader = csv.reader(io.StringIO(whole + newline, newline=""), strict=True)
        try:
            header = [self.former.get(name, name) for name in next(reader, [])]
            if self.columns and (unknown := [name for name in header if name not in self.columns]):
                raise ValueError(f"column {unknown[0]!r} is none of this run's")
            return [self._row(header, cells) for cells in reader]
        except (csv.Error, ValueError) as error:
            line = max(reader.line_num, 1)
            raise FileError(
                f"{self.path} is damaged (line {line}: {error}): restore it from a copy, or remove it"
            ) from error

    def _row(self, header: list[str], cells: list[str]) -> dict[str, str]:
        if len(cells) != len(header):
            raise ValueError(f"{len(cells)} cells for {len(header)} columns")
        row = dict(zip(header, cells, strict=True))
        for name in set(self.columns) & set(row) - set(self.labels):
            float(row[name] or 0)
        return row

    def keep(self, wanted: Callable[[dict[str, str]], bool]) -> None:
        """Drop the rows that are not wanted: those that a resumed run writes again.

        Raises:
            FileError: see `rows`; or the file cannot be written.
        """
        kept = Table(self.path.with_name(self.path.name + ".tmp"), self.columns)
        rows = [row for row in self.rows() if wanted(row)]
        with file_errors(self.path, "written"):
            kept.path.unlink(missing_ok=True)
            for row in rows:
                kept.append(row)
            if kept.path.exists():
                os.replace(kept.path, self.path)
            else:
                self.path.unlink(missing_ok=True)
