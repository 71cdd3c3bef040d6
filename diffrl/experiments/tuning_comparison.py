"""Fine-tuning methods beside each other: one run folder a method and seed, in worker processes that continue.

out/
index.json    methods, seeds, folders, the commands that were run
cells/…       one run folder a cell; ``error.txt`` in one that failed
"""

import json
import re
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from diffrl.experiments.comparison import Execution, command_record
from diffrl.experiments.finetune import run_finetuning
from diffrl.experiments.train import Interrupted
from diffrl.workers import Failure, run_tasks
from diffrl.training.runs import RunFolder, write_atomically

__all__ = ["TuningCell", "run_tuning_comparison"]


@dataclass(frozen=True)
class TuningCell:
    """One fine-tuning run.

    Args:
        method: name for people.
        seed: of the run.
        config: what `run_finetuning` takes, but for `run_dir` and `resume`.
    """

    method: str
    seed: int
    config: Mapping[str, Any]

    @property
    def folder(self) -> str:
        """Name of its folder."""
        return f"{re.sub(r'[^A-Za-z0-9.=]+', '-', self.method).strip('-')}_s{self.seed}"


def run_tuning_comparison(
    cells: Sequence[TuningCell], out: Path, *, workers: int = 2, progress: bool = True
) -> Execution:
    """Run every cell that is not finished yet, continuing those that were begun.

    Args:
        cells: what to run.
        out: folder of the comparison.
        workers: processes, with one thread each; 0 runs in this one.
        progress: whether to show a bar.

    Raises:
        RunFolderError: a cell's folder holds a run with another configuration.
        ValueError: two cells of one name.
    """
    folders = [out / "cells" / cell.folder for cell in cells]
    if len(set(folders)) < len(folders):
        raise ValueError("two methods have the same name but for its punctuation: rename one")
    for folder, cell in zip(folders, cells, strict=True):
        if (folder / "config.yaml").exists():
            RunFolder.start({**cell.config, "resume": str(folder)})  # refuses another configuration
    index = out / "index.json"
    commands = json.loads(index.read_text())["commands"] if index.exists() else []
    begun = time.perf_counter()
    record = command_record()
    out.mkdir(parents=True, exist_ok=True)
    entries = [{"method": c.method, "seed": c.seed, "folder": c.folder} for c in cells]

    def write_index() -> None:
        whole = {"commands": [*commands, record], "cells": entries}
        write_atomically(index, json.dumps(whole, indent=1, ensure_ascii=False))

    write_index()
    failed, interrupted = _run_all(
        [(f, c) for f, c in zip(folders, cells, strict=True) if not _is_finished(f)], workers, progress
    )
    record["seconds"] = round(time.perf_counter() - begun, 1)
    write_index()
    return Execution(sum(map(_is_finished, folders)), len(cells), failed, interrupted)


def _is_finished(folder: Path) -> bool:
    return bool(RunFolder(folder).results())


def _run_all(
    todo: Sequence[tuple[Path, TuningCell]], workers: int, progress: bool
) -> tuple[dict[str, str], bool]:
    """Errors by cell, and whether it was interrupted."""
    failed: dict[str, str] = {}
    tasks = [(str(folder), dict(cell.config)) for folder, cell in todo]
    with tqdm(total=len(todo), unit="run", desc="fine-tuning", disable=not progress) as bar:
        try:
            with closing(run_tasks(_run_cell, tasks, workers=workers)) as outcomes:
                for i, outcome in outcomes:
                    folder, cell = todo[i]
                    label = f"{cell.method}, seed {cell.seed}"
                    if isinstance(outcome, Failure):
                        failed[label] = outcome.message
                        folder.mkdir(parents=True, exist_ok=True)
                        write_atomically(folder / "error.txt", f"{outcome.message}\n\n{outcome.details}")
                    elif outcome is None and workers == 0:
                        return failed, True
                    else:
                        bar.set_postfix_str(f"{label}: reward {outcome:.3g}", refresh=False)
                    bar.update()
        except KeyboardInterrupt:
            return failed, True
    return failed, False


def _run_cell(task: tuple[str, dict[str, Any]]) -> float | None:
    """Tune a cell from where it stopped; returns its last reward, or None if interrupted."""
    place, config = task
    path = Path(place)
    (path / "error.txt").unlink(missing_ok=True)
    begun = (path / "config.yaml").exists()
    place_of = {"resume": place} if begun else {"resume": None, "run_dir": place}
    try:
        folder = run_finetuning({**config, **place_of}, progress=False)
    except Interrupted:
        return None
    return float(folder.results()["finetuning"]["final"]["eval_reward"])
