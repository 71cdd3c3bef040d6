"""Many runs as one comparison: each is a cell, runs once, continues where it stopped, and may fail alone.

out/
index.json    the cells and their folders, the commands that were run
cells/…       one run folder a cell; ``error.txt`` in one that failed
"""

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
from diffrl.experiments.index import past_index, write_index
from diffrl.experiments.run import Interrupted, Job, interruptible
from diffrl.experiments.schemes import planned_objectives
from diffrl.experiments.train import run_experiment
from diffrl.ranks import refuse_several_processes
from diffrl.registry import Config
from diffrl.text_files import file_errors, read_text, write_atomically
from diffrl.training.identity import ACCEPT, flat
from diffrl.training.lock import folder_lock
from diffrl.training.provenance import command_line, versions
from diffrl.training.runs import RunFolder, RunFolderError
from diffrl.workers import Failure, run_tasks

__all__ = [
    "JOBS",
    "PLACE",
    "Cell",
    "Execution",
    "JobKind",
    "Stage",
    "cell_error",
    "cell_figures",
    "cell_folders",
    "run_cells",
    "run_in_folder",
]

PLACE = ("run_dir", "rank_timeout", "first_timeout", "resume", "extend", ACCEPT)
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
        details: further names of one that costs what others of its `names` do, such as ``("lr=1e-3",)``.
    """

    job: str
    where: Mapping[str, Any]
    names: tuple[str, ...]
    identity: str
    config: Config
    details: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        """Its name for people."""
        return ", ".join([*self.names, *self.details, f"seed {self.config['seed']}"])

    @property
    def folder(self) -> str:
        """Name of its folder if it is the first cell with this configuration."""
        words = (
            re.sub(r"[^\w.=]+", "-", w.translate(ASCII), flags=re.ASCII) for w in (*self.names, *self.details)
        )
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


def _is_finished(folder: Path) -> bool:
    return bool(cell_figures(folder))


@dataclass(frozen=True)
class Stage:
    """One of several calls of `run_cells` that make a comparison.

    Args:
        later: what a later call runs at most: the estimate of time counts it in.
        settled: whether what lies in a folder is not to be run again.
        tries: whether the estimate tries kinds of which no run is finished.
    """

    later: Sequence[Cell] = ()
    settled: Callable[[Path], bool] = _is_finished
    tries: bool = True


def run_cells(
    cells: Sequence[Cell],
    out: Path,
    *,
    only: Sequence[Cell] | None = None,
    stage: Stage = Stage(),
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
        stage: which of several calls it is.
        about: what else the index tells of the comparison.
        workers: processes, with one thread each; 0 runs the cells in this process.
        progress: whether to show one bar, in steps, for all of them.

    Raises:
        RunFolderError: the folder of a cell holds a run with another configuration, or `out` another kind of
            comparison or a run; another process runs it.
        FileError: a file of it is damaged, or cannot be written.
        ValueError: torchrun started several of these.
    """
    refuse_several_processes("a comparison")
    with folder_lock(out):
        wanted = cells if only is None else only
        return _run_cells(cells, wanted, out, stage, about or {}, workers, progress)


def _run_cells(
    cells: Sequence[Cell],
    only: Sequence[Cell],
    out: Path,
    stage: Stage,
    about: Mapping[str, Any],
    workers: int,
    progress: bool,
) -> Execution:
    past = past_index(out, [cell.where for cell in cells])
    folders = cell_folders(cells, out)
    wanted: dict[Path, Cell] = {}
    for cell in only:
        wanted.setdefault(folders[cell.identity], cell)
    for path, cell in wanted.items():
        _refuse_other_configuration(path, cell)
    started = datetime.now().astimezone().isoformat(timespec="seconds")
    command: dict[str, Any] = {"command": command_line(), "started": started, "versions": versions()}
    entries = [{**cell.where, "folder": folders[cell.identity].name} for cell in cells]
    took: dict[str, float] = past.get("seconds", {})
    index = {
        **about,
        "commands": [*past.get("commands", []), command],
        "cells": entries,
        "seconds": took,
    }
    write_index(index, out)

    begun = time.perf_counter()
    todo = {path: cell for path, cell in wanted.items() if not stage.settled(path)}
    kinds = _kinds({folders[cell.identity]: cell for cell in cells}, todo, stage.later, took)
    how = {"at_most": bool(stage.later), "tries": stage.tries}
    with interruptible() as asked:
        if progress and (line := estimate(kinds, workers=workers, stop=asked, **how)):
            print(line, flush=True)
        failed, interrupted = _run_under_bar(todo, [*wanted.values()], workers, progress, took, asked)
    finished = sum(stage.settled(path) for path in wanted)
    seconds = round(time.perf_counter() - begun, 1)
    command |= {"seconds": seconds, "cells": finished - (len(wanted) - len(todo))}
    write_index(index, out)
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


def cell_folders(cells: Sequence[Cell], out: Path) -> dict[str, Path]:
    """Folder of each identity: the one that is there, else named after the first cell that has it."""
    root = out / "cells"
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


def _kinds(
    cells: Mapping[Path, Cell], todo: Mapping[Path, Cell], later: Sequence[Cell], took: Mapping[str, float]
) -> list[Kind]:
    """What is left by what it is but for its seed and its details, and how long finished cells of that kind took."""
    found: dict[tuple[Any, ...], list[Cell]] = {}
    known: dict[tuple[Any, ...], list[float]] = {}
    for cell in (*todo.values(), *later):
        found.setdefault((cell.job, *cell.names, cell.steps), []).append(cell)
    for path, cell in cells.items():
        if path.name in took and path not in todo:
            known.setdefault((cell.job, *cell.names, cell.steps), []).append(took[path.name])
    return [
        Kind(JOBS[alike[0].job].opened, alike[0].config, alike[0].steps, len(alike), known.get(kind, []))
        for kind, alike in found.items()
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
