"""What lies in the folder of a comparison, cell by cell: which runs are finished, and what they measured."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from diffrl.experiments.comparison import cell_error, cell_figures
from diffrl.experiments.index import read_index
from diffrl.training.table import Table

__all__ = ["Finding", "Findings"]


@dataclass(frozen=True)
class Finding:
    """A cell and, if it is finished, its figures.

    Args:
        where: its place in the comparison, such as its study, case, scheme and seed.
        path: its folder.
        status: "finished", "failed", "stopped" (begun, but not finished) or "missing".
        error: one line on why it failed.
        figures: what it measured, from its results.json; empty unless it is finished.
    """

    where: Mapping[str, Any]
    path: Path
    status: str
    error: str | None
    figures: Mapping[str, Any]

    @classmethod
    def read(cls, entry: Mapping[str, Any], root: Path) -> "Finding":
        """The cell of an entry of the index, whose folder lies in `root`."""
        path = root / entry["folder"]
        figures, error = cell_figures(path), cell_error(path)
        if figures:
            status = "finished"
        elif error is not None:
            status = "failed"
        else:
            status = "stopped" if (path / "config.yaml").exists() else "missing"
        where = {key: value for key, value in entry.items() if key != "folder"}
        return cls(where, path, status, error, figures)

    @property
    def seed(self) -> int:
        """Seed of the run."""
        return int(self.where["seed"])

    def rows(self) -> list[dict[str, str]]:
        """What it measured while it ran: the rows of its metrics.csv, as text."""
        return Table(self.path / "metrics.csv", ()).rows()


class Findings:
    """Everything in the folder of a comparison.

    Args:
        out: the folder.

    Raises:
        RunFolderError: there is no comparison in it, or one of another kind.
    """

    where: ClassVar[tuple[str, ...]]
    """What places a cell in this kind of comparison."""
    about: ClassVar[tuple[str, ...]] = ()
    """What else the index of this kind tells."""

    def __init__(self, out: Path) -> None:
        self.index = read_index(out, self.where, self.about)
        self.commands: list[dict[str, Any]] = self.index["commands"]
        self.cells = [Finding.read(entry, out / "cells") for entry in self.index["cells"]]

    def finished(self, **where: Any) -> list[Finding]:
        """Finished cells at a place, such as those with ``study="map", case="rings"``."""
        return [c for c in self.cells if c.status == "finished" and where.items() <= c.where.items()]

    def unfinished(self) -> list[Finding]:
        """Cells without figures, each run once."""
        return list({(c.path, c.seed): c for c in self.cells if c.status != "finished"}.values())
