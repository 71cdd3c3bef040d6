"""Many runs as one comparison: each is a cell, runs once, continues where it stopped, and may fail alone.

out/
index.json    the cells and their folders, the commands that were run
cells/…       one run folder a cell; ``error.txt`` in one that failed
"""

import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from diffrl.experiments import finetune, train
from diffrl.experiments.estimates import Kind, estimate
from diffrl.experiments.finetune import run_finetuning
from diffrl.experiments.run import Interrupted, Job, interruptible
from diffrl.experiments.schemes import planned_objectives
from diffrl.experiments.train import run_experiment
from diffrl.registry import Config
from diffrl.text_files import file_errors, read_json, read_text, write_atomically
from diffrl.training.identity import ACCEPT, flat
from diffrl.training.lock import folder_lock
from diffrl.training.runs import RunFolder, RunFolderError, command_line, versions
from diffrl.workers import Failure, run_tasks

__all__ = [
    "JOBS",
    "PLACE",
    "Cell",
    "Execution",
    "JobKind",
    "cell_error",
    "cell_figures",
    "read_index",
    "run_cells",
    "run_in_folder",
]

PLACE = ("run_dir", "resume", "extend", ACCEPT)
"""Settings that say where a run lies and how it goes on, and not what it is."""
ASCII = str.maketrans({"λ": "lambda", "η": "eta", "γ": "gamma", "τ": "tau", "σ": "sigma", "δ": "delta"})


class JobKind(NamedTuple):
    """A kind of run that a cell can be."""

    run: Callable[..., Any]
    """Takes a configuration and ``progress``; raises `Interrupted` when it is stopped."""
    steps: Callable[[Config], int]
    """How many steps a run has, for the progress bar."""
    opened: Callable[[Config], Job]
    """A run in no folder, to try its pace."""


JOBS = {
    "train": JobKind(
        run_experiment,
        lambda config: int(config["trainer"]["grad_steps"]) * len(planned_objectives(config)),
        train.opened,
    ),
    "finetune": JobKind(run_finetuning, lambda config: int(config["loop"]["iterations"]), finetune.opened),
}


@dataclass(frozen=True)
class Cell:
    """One run of a comparison.

    Args:
        job: what runs it, a name in `JOBS`.
        where: its place in the comparison, such as ``{"study": ..., "case": ..., "scheme": ..., "seed": ...}``.
        names: for people and for its folder, such as ``(case, scheme)``.
        identity: letters and digits that differ where configurations differ.
        config: what the job takes, but for ``run_dir`` and ``resume``.
    """

    job: str
    where: Mapping[str, Any]
    names: tuple[str, ...]
    identity: str
    config: Config

    @property
    def label(self) -> str:
        """Its name for people."""
        return ", ".join([*self.names, f"seed {self.config['seed']}"])

    @property
    def folder(self) -> str:
        """Name of its folder if it is the first cell with this configuration."""
        words = (re.sub(r"[^\w.=]+", "-", w.translate(ASCII), flags=re.ASCII) for w in self.names)
        return "_".join([*(w.strip("-")[:60] for w in words), f"s{self.config['seed']}", self.identity])

    @property
    def steps(self) -> int:
        """How long it is on the progress bar."""
        return JOBS[self.job].steps(self.config)


@dataclass(frozen=True)
class Execution:
    """What a call of `run_cells` came to.

    Args:
        finished: how many cells are finished now, whenever they ran.
        total: how many cells were to run.
        failed: the error of each cell that failed, by its label.
        interrupted: whether it was stopped, or a cell of it was.
    """

    finished: int
    total: int
    failed: Mapping[str, str]
    interrupted: bool


def run_cells(
    cells: Sequence[Cell],
    out: Path,
    *,
    only: Sequence[Cell] | None = None,
    about: Mapping[str, Any] | None = None,
    workers: int = 2,
    progress: bool = True,
) -> Execution:
    """Run every cell that is not finished yet; those that were begun continue where they stopped.

    Cells of one identity are one run.

    Args:
        cells: of the whole comparison: the index lists them all.
        out: folder of the comparison.
        only: those of them that are run now; None: all.
        about: what else the index tells of the comparison.
        workers: processes, with one thread each; 0 runs the cells in this process.
        progress: whether to show one bar, in steps, for all of them.

    Raises:
        RunFolderError: the folder of a cell holds a run with another configuration, or `out` another kind of
            comparison or a run; another process runs it.
        FileError: a file of it is damaged, or cannot be written.
    """
    with folder_lock(out):
        return _run_cells(cells, out, only=only, about=about, workers=workers, progress=progress)


def _run_cells(
    cells: Sequence[Cell],
    out: Path,
    *,
    only: Sequence[Cell] | None,
    about: Mapping[str, Any] | None,
    workers: int,
    progress: bool,
) -> Execution:
    past = _past_index(out, cells)
    folders = _folders(cells, out / "cells")
    wanted: dict[Path, Cell] = {}
    for cell in cells if only is None else only:
        wanted.setdefault(folders[cell.identity], cell)
    for path, cell in wanted.items():
        _refuse_other_configuration(path, cell)
    started = datetime.now().astimezone().isoformat(timespec="seconds")
    command: dict[str, Any] = {"command": command_line(), "started": started, "versions": versions()}
    entries = [{**cell.where, "folder": folders[cell.identity].name} for cell in cells]
    took: dict[str, float] = past.get("seconds", {})
    index = {
        **(about or {}),
        "commands": [*past.get("commands", []), command],
        "cells": entries,
        "seconds": took,
    }
    _write_index(index, out)

    begun = time.perf_counter()
    todo = {path: cell for path, cell in wanted.items() if not cell_figures(path)}
    failed, interrupted = _run_all(todo, wanted, workers, progress, took)
    finished = sum(bool(cell_figures(path)) for path in wanted)
    seconds = round(time.perf_counter() - begun, 1)
    command |= {"seconds": seconds, "cells": finished - (len(wanted) - len(todo))}
    _write_index(index, out)
    return Execution(finished, len(wanted), failed, interrupted)


def run_in_folder(job: str, config: Config, folder: Path, *, progress: bool = False) -> None:
    """Run a job in a folder: from where it stopped if it was begun, as it was begun.

    Args:
        job: a name in `JOBS`.
        config: what the job takes, but for ``run_dir`` and ``resume``.
        folder: where the run lies.
        progress: whether the job shows its own bars.

    Raises:
        Interrupted: it was stopped, and is saved.
    """
    with file_errors(folder / "error.txt", "removed"):
        (folder / "error.txt").unlink(missing_ok=True)
    if (folder / "config.yaml").exists():
        config = {**RunFolder.open(folder).config(), "resume": str(folder)}
    else:
        config = {**config, "resume": None, "run_dir": str(folder)}
    JOBS[job].run(config, progress=progress)


def cell_figures(folder: Path) -> Mapping[str, Any]:
    """What the run in a folder measured, from its results.json; empty until the run is finished."""
    results = RunFolder(folder).results()
    found: list[Mapping[str, Any]] = [*results.get("objectives", {}).values(), results.get("finetuning", {})]
    if "objectives" in results and len(found) <= len(planned_objectives(results["config"])):
        return {}
    return found[0]


def cell_error(folder: Path) -> str | None:
    """One line on why the run in a folder failed; None if it did not."""
    file = folder / "error.txt"
    return (read_text(file) or "no reason was written").splitlines()[0] if file.exists() else None


def read_index(out: Path, keys: Sequence[str], about: Sequence[str] = ()) -> dict[str, Any]:
    """The index of a comparison.

    Args:
        out: folder of the comparison.
        keys: what places a cell in this kind of comparison, such as study, case, scheme and seed.
        about: what else the index must tell.

    Raises:
        RunFolderError: there is no comparison in the folder, or one of another kind, or the index is damaged.
    """
    file = out / "index.json"
    if not file.is_file():
        raise RunFolderError(f"{out} holds no comparison: there is no {file.name} in it")
    index: dict[str, Any] = read_json(file)
    cells = index.get("cells")
    listed = isinstance(index.get("commands"), list) and isinstance(index.get("seconds", {}), dict)
    if not listed or not isinstance(cells, list) or not all(map(_is_entry, cells)):
        raise RunFolderError(
            f"{file} is damaged: it lists no cells: remove it, and the comparison's own command writes it anew"
        )
    for cell in cells:
        if set(cell) != {*keys, "folder"}:
            found, wanted = ", ".join(key for key in cell if key != "folder"), ", ".join(keys)
            raise RunFolderError(
                f"{out} holds another kind of comparison, with one run for each {found} and not for each {wanted}: "
                "choose another out"
            )
    if lacking := [key for key in about if key not in index]:
        raise RunFolderError(
            f"{file} is damaged: it lacks {', '.join(lacking)}: the comparison's own command writes it anew"
        )
    return index


def _is_entry(cell: Any) -> bool:
    """Whether it can be the place of a cell in an index."""
    return isinstance(cell, dict) and isinstance(cell.get("folder"), str)


def _past_index(out: Path, cells: Sequence[Cell]) -> dict[str, Any]:
    """The index of this comparison as it was run before; empty if it was not."""
    if (out / "config.yaml").exists():
        raise RunFolderError(f"{out} holds a run, and not a comparison: choose another folder")
    if not cells or not (out / "index.json").exists():
        return {}
    return read_index(out, tuple(cells[0].where))


def _folders(cells: Sequence[Cell], root: Path) -> dict[str, Path]:
    """Folder of each identity: the one that is there, else named after the first cell that has it."""
    there = {path.name.rpartition("_")[2]: path for path in sorted(root.glob("*_*"))}
    for cell in cells:
        there.setdefault(cell.identity, root / cell.folder)
    return there


def _refuse_other_configuration(path: Path, cell: Cell) -> None:
    """The run in a folder must have the cell's configuration, in all settings that both know."""
    if not (path / "config.yaml").exists():
        return
    stored, asked = flat(RunFolder.open(path).config()), flat(cell.config)
    for key in sorted((stored.keys() & asked.keys()) - {*PLACE}):
        if stored[key] != asked[key]:
            raise RunFolderError(
                f"{path} was run with {key}={stored[key]}, but now it is {asked[key]}: "
                "delete that folder to run the cell again, or choose another out"
            )


def _write_index(index: Mapping[str, Any], out: Path) -> None:
    write_atomically(out / "index.json", json.dumps(index, indent=1, ensure_ascii=False))


def _run_all(
    todo: Mapping[Path, Cell],
    wanted: Mapping[Path, Cell],
    workers: int,
    progress: bool,
    took: dict[str, float],
) -> tuple[dict[str, str], bool]:
    """Run cells; returns the errors by label, and whether it or a cell was interrupted.

    `took` has the seconds of finished cells by folder, and gets those of more.
    """
    with interruptible() as asked:
        if progress and (line := estimate(_kinds(todo, wanted, took), workers=workers, stop=asked)):
            print(line, flush=True)
        return _run_under_bar(todo, [*wanted.values()], workers, progress, took, asked)


def _kinds(todo: Mapping[Path, Cell], wanted: Mapping[Path, Cell], took: Mapping[str, float]) -> list[Kind]:
    """The cells by what they are but for their seed."""
    kinds: dict[tuple[str, ...], list[Path]] = {}
    for path, cell in wanted.items():
        kinds.setdefault((cell.job, *cell.names), []).append(path)
    return [
        Kind(
            JOBS[wanted[paths[0]].job].opened,
            wanted[paths[0]].config,
            wanted[paths[0]].steps,
            sum(path in todo for path in paths),
            [took[path.name] for path in paths if path.name in took and path not in todo],
        )
        for paths in kinds.values()
    ]


def _run_under_bar(
    todo: Mapping[Path, Cell],
    wanted: Sequence[Cell],
    workers: int,
    progress: bool,
    took: dict[str, float],
    asked: Callable[[], bool],
) -> tuple[dict[str, str], bool]:
    cells, failed, done = list(todo.values()), dict[str, str](), len(wanted) - len(todo)
    tasks = [(str(path), cell.job, dict(cell.config)) for path, cell in todo.items()]
    total, left = (sum(cell.steps for cell in group) for group in (wanted, cells))
    bar = tqdm(total=total, initial=total - left, unit="step", unit_scale=True, disable=not progress)
    bar.set_description(f"{done}/{len(wanted)} cells")
    stopped = False
    with bar:
        with closing(run_tasks(_run_cell, tasks, workers=workers, stop=asked)) as outcomes:
            for i, outcome in outcomes:
                cell, time_of_it = cells[i], ""
                if _is_stopped(outcome):
                    stopped = True
                    bar.write(f"interrupted: {cell.label}")
                    if workers == 0:  # the signal was for all of it
                        break
                    continue
                if isinstance(outcome, Failure):
                    failed[cell.label] = outcome.message
                    _write_error(Path(tasks[i][0]), outcome)
                    bar.write(f"failed: {cell.label}: {outcome.message}")
                else:
                    time_of_it = f" {outcome:.1f} s"
                    took[Path(tasks[i][0]).name] = round(outcome, 1)
                done += 1
                bar.set_description(f"{done}/{len(wanted)} cells", refresh=False)
                bar.set_postfix_str(f"last: {cell.label}{time_of_it}", refresh=False)
                bar.update(cell.steps)
        return failed, stopped or asked()


def _is_stopped(outcome: float | Failure | None) -> bool:
    """Whether a cell was asked to end, and did nothing wrong."""
    return outcome is None or (isinstance(outcome, Failure) and outcome.stopped)


def _run_cell(task: tuple[str, str, dict[str, Any]]) -> float | None:
    """Run a cell in its folder; returns the seconds that it took, or None if it was interrupted."""
    folder, job, config = task
    begun = time.perf_counter()
    try:
        run_in_folder(job, config, Path(folder))
    except (Interrupted, KeyboardInterrupt):
        return None
    return time.perf_counter() - begun


def _write_error(folder: Path, failure: Failure) -> None:
    with file_errors(folder, "made"):
        folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "error.txt", f"{failure.message}\n\n{failure.details}")
