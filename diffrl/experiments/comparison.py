"""A comparison: studies of schemes on cases over seeds; its cells run once each, or from where they stopped.

    out/
      index.json    studies, cells and their folders, the commands that were run
      cells/…       one run folder a cell; ``error.txt`` in one that failed

A *cell* is one training run: a scheme on a case with a seed. Cells that several studies share are run once.
"""

import json
import re
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from tqdm import tqdm

from diffrl.experiments.train import Interrupted, run_experiment
from diffrl.workers import Failure, run_tasks
from diffrl.training.runs import RunFolder, RunFolderError, versions, write_atomically

__all__ = [
    "Cell",
    "Comparison",
    "Execution",
    "Study",
    "cell_error",
    "command_record",
    "grid_scheme",
    "read_index",
    "run_comparison",
]

MATCHED = ("grad_steps", "network_evaluations", "seconds")
ASCII = str.maketrans({"λ": "lambda", "η": "eta", "γ": "gamma", "τ": "tau", "σ": "sigma", "δ": "delta"})
PLACE = ("run_dir", "resume")  # where a cell lies is no part of what it is


@dataclass(frozen=True)
class Study:
    """One question: schemes against a baseline.

    Args:
        name: of the study.
        title: the question, in words.
        baseline: the scheme that the others are measured by.
        matched: what all schemes have in common: "grad_steps", "network_evaluations" or "seconds".
        cases: names, in the order of the report.
        schemes: names, in the order of the report.
        seeds: of every cell.
        axes: where schemes form a grid, the values of each axis by its label.

    Raises:
        ValueError: the baseline is none of the schemes, or `matched` is unknown.
    """

    name: str
    title: str
    baseline: str
    matched: str
    cases: tuple[str, ...]
    schemes: tuple[str, ...]
    seeds: tuple[int, ...]
    axes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.baseline not in self.schemes:
            known = "; ".join(self.schemes)
            raise ValueError(
                f"study {self.name}: the baseline {self.baseline!r} is none of its schemes: {known}"
            )
        if self.matched not in MATCHED:
            raise ValueError(
                f"study {self.name}: matched is {self.matched!r}: give one of {', '.join(MATCHED)}"
            )
        for what, values in (("case", self.cases), ("seed", self.seeds)):
            if not values:
                raise ValueError(f"study {self.name} has no {what}")


@dataclass(frozen=True)
class Cell:
    """One training run.

    Args:
        study: name of the study.
        case: name of the case.
        scheme: name of the scheme.
        seed: of the run.
        identity: letters that differ where the configurations do.
        config: what `run_experiment` takes, but for `run_dir`.
    """

    study: str
    case: str
    scheme: str
    seed: int
    identity: str
    config: Mapping[str, Any]

    @property
    def label(self) -> str:
        """Name for people."""
        return f"{self.case}, {self.scheme}, seed {self.seed}"

    @property
    def folder(self) -> str:
        """Name of its folder if it is the first to have this configuration."""
        words = (
            re.sub(r"[^\w.=]+", "-", w.translate(ASCII), flags=re.ASCII) for w in (self.case, self.scheme)
        )
        return "_".join([*(w.strip("-")[:60] for w in words), f"s{self.seed}", self.identity])


@dataclass(frozen=True)
class Comparison:
    """Studies and their cells.

    Args:
        name: of the plan.
        score_sigmas: noise levels, as keys of ``value_error``, whose errors make the score.
        studies: what is asked.
        cells: all of them.
    """

    name: str
    score_sigmas: tuple[str, ...]
    studies: tuple[Study, ...]
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Execution:
    """What a call of `run_comparison` came to.

    Args:
        finished: cells that are finished now, whenever they ran.
        total: cells that were to run.
        failed: error of each cell that failed, by its label.
        interrupted: whether it was stopped.
    """

    finished: int
    total: int
    failed: Mapping[str, str]
    interrupted: bool


def grid_scheme(axes: Mapping[str, str]) -> str:
    """Name of the scheme at a point of a grid, such as "λ=0.5, η=1.0", from the value of each axis."""
    return ", ".join(f"{label}={value}" for label, value in axes.items())


def run_comparison(
    comparison: Comparison,
    out: Path,
    *,
    studies: Sequence[str] = (),
    workers: int = 2,
    progress: bool = True,
) -> Execution:
    """Run every cell that is not finished yet, continuing those that were begun.

    Args:
        comparison: what to run.
        out: folder of the comparison.
        studies: run only these; all if empty.
        workers: processes, with one thread each; 0 runs in this one.
        progress: whether to show one bar, in gradient steps, for the whole grid.

    Raises:
        RunFolderError: a cell's folder holds a run with another configuration.
        ValueError: no study of that name.
    """
    names = [study.name for study in comparison.studies]
    if unknown := [s for s in studies if s not in names]:
        raise ValueError(f"no study {unknown[0]!r} in plan {comparison.name}: there are {', '.join(names)}")
    folders = _folders(comparison.cells, out / "cells")
    wanted: dict[Path, Cell] = {}
    for cell in comparison.cells:
        if not studies or cell.study in studies:
            wanted.setdefault(folders[cell.identity], cell)
    _refuse_changed(wanted)
    commands = json.loads(index.read_text())["commands"] if (index := out / "index.json").exists() else []
    begun = time.perf_counter()
    record = command_record()
    _write_index(comparison, folders, out, [*commands, record])

    todo = {path: cell for path, cell in wanted.items() if not _is_finished(path)}
    failed, interrupted = _run_all(todo, [*wanted.values()], workers, progress)
    finished = sum(map(_is_finished, wanted))
    record |= {
        "seconds": round(time.perf_counter() - begun, 1),
        "cells": len(todo) - (len(wanted) - finished),
    }
    _write_index(comparison, folders, out, [*commands, record])
    return Execution(finished, len(wanted), failed, interrupted)


def command_record() -> dict[str, Any]:
    """What an index tells of the command that runs now, at its start."""
    return {
        "command": shlex.join(["python", *sys.argv]),
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
        "versions": versions(),
    }


def read_index(out: Path) -> dict[str, Any]:
    """The index of a comparison.

    Raises:
        RunFolderError: there is no comparison in the folder.
    """
    file = out / "index.json"
    if not file.is_file():
        raise RunFolderError(f"{out} holds no comparison: there is no {file.name} in it")
    index: dict[str, Any] = json.loads(file.read_text())
    return index


def cell_error(folder: Path) -> str | None:
    """One line on why a cell failed; None if it did not."""
    file = folder / "error.txt"
    return file.read_text().splitlines()[0] if file.exists() else None


def _run_all(
    todo: Mapping[Path, Cell], wanted: Sequence[Cell], workers: int, progress: bool
) -> tuple[dict[str, str], bool]:
    """Run cells; returns errors by label, and whether it was interrupted."""
    cells, failed, ended = list(todo.values()), {}, 0
    tasks = [(str(path), dict(cell.config)) for path, cell in todo.items()]
    total, left = (sum(cell.config["trainer"]["grad_steps"] for cell in group) for group in (wanted, cells))
    bar = tqdm(total=total, initial=total - left, unit="step", unit_scale=True, disable=not progress)
    bar.set_description(f"{len(wanted) - len(cells)}/{len(wanted)} cells")
    try:
        with closing(run_tasks(_run_cell, tasks, workers=workers)) as outcomes:
            for i, outcome in outcomes:
                cell = cells[i]
                if isinstance(outcome, Failure):
                    failed[cell.label] = outcome.message
                    folder = Path(tasks[i][0])
                    folder.mkdir(parents=True, exist_ok=True)
                    write_atomically(folder / "error.txt", f"{outcome.message}\n\n{outcome.details}")
                    bar.write(f"failed: {cell.label}: {outcome.message}")
                elif outcome is None and workers == 0:
                    return failed, True
                ended += 1
                bar.set_description(f"{len(wanted) - len(cells) + ended}/{len(wanted)} cells", refresh=False)
                took = f" {outcome:.1f} s" if isinstance(outcome, float) else ""
                bar.set_postfix_str(f"last: {cell.label}{took}", refresh=False)
                bar.update(cell.config["trainer"]["grad_steps"])
    except KeyboardInterrupt:
        return failed, True
    finally:
        bar.close()
    return failed, False


def _run_cell(task: tuple[str, dict[str, Any]]) -> float | None:
    """Train and evaluate a cell, from where it stopped; returns the seconds, or None if interrupted."""
    place, config = task
    path = Path(place)
    begun = time.perf_counter()
    (path / "error.txt").unlink(missing_ok=True)
    if (path / "config.yaml").exists():
        config = {**RunFolder.open(path).config(), "resume": place}
    else:
        config = {**config, "resume": None, "run_dir": place}
    try:
        run_experiment(config, progress=False)
    except Interrupted:
        return None
    return time.perf_counter() - begun


def _folders(cells: Sequence[Cell], root: Path) -> dict[str, Path]:
    """Folder of each identity: the one that is there, else named after the first cell that has it."""
    there = {path.name.rpartition("_")[2]: path for path in sorted(root.glob("*_*"))}
    for cell in cells:
        there.setdefault(cell.identity, root / cell.folder)
    return there


def _is_finished(path: Path) -> bool:
    return bool(RunFolder(path).results().get("objectives"))


def _refuse_changed(cells: Mapping[Path, Cell]) -> None:
    """A folder's run must have the cell's configuration, in all keys that both know."""
    for path, cell in cells.items():
        if not (path / "config.yaml").exists():
            continue
        stored = _flat({k: v for k, v in RunFolder.open(path).config().items() if k not in PLACE})
        asked = _flat(cell.config)
        for key in sorted(stored.keys() & asked.keys()):
            if stored[key] != asked[key]:
                raise RunFolderError(
                    f"{path} was run with {key}={stored[key]}, but now it is {asked[key]}: "
                    "delete that folder to run the cell again, or choose another out"
                )


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in config.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def _write_index(
    comparison: Comparison, folders: Mapping[str, Path], out: Path, commands: Sequence[Mapping[str, Any]]
) -> None:
    out.mkdir(parents=True, exist_ok=True)
    cells = [
        {
            **{k: getattr(c, k) for k in ("study", "case", "scheme", "seed")},
            "folder": folders[c.identity].name,
        }
        for c in comparison.cells
    ]
    index = {
        "plan": comparison.name,
        "score_sigmas": comparison.score_sigmas,
        "studies": [asdict(study) for study in comparison.studies],
        "commands": commands,
        "cells": cells,
    }
    write_atomically(out / "index.json", json.dumps(index, indent=1, ensure_ascii=False))
