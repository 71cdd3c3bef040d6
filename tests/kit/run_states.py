"""Everything that a finished run holds but for its clock and its place, to compare two runs by."""

import csv
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from diffrl.training.checkpoints import latest_checkpoint, load_checkpoint

CLOCKS_AND_PLACES = ("seconds", "forward_equivalents", "run_dir", "resume", "versions")


def state(run: Path) -> dict[str, Any]:
    """Weights of the newest checkpoints, samples, rows and results; equal by `assert_equal` alone."""
    found: dict[str, Any] = {
        "results": _timeless(json.loads((run / "results.json").read_text(encoding="utf-8")))
    }
    with (run / "metrics.csv").open(newline="", encoding="utf-8") as table:
        found["rows"] = [_timeless(row) for row in csv.DictReader(table)]
    for folder in sorted((run / "checkpoints").iterdir()):
        newest = latest_checkpoint(folder)
        assert newest is not None
        read = load_checkpoint(newest)
        found[folder.name] = {"step": read.step, **read.weights, "optimiser": read.training.get("optimiser")}
    for file in sorted((run / "samples").glob("*.safetensors")):
        found[f"samples {file.stem}"] = load_file(file)
    return found


def assert_equal(one: Any, two: Any, where: str = "run") -> None:
    """The same numbers, bit for bit."""
    if isinstance(one, dict):
        assert one.keys() == two.keys(), where
        for key in one:
            assert_equal(one[key], two[key], f"{where}.{key}")
    elif isinstance(one, Tensor):
        assert one.dtype == two.dtype and torch.equal(one, two), where
    else:
        assert one == two, where


def _timeless(given: Any) -> Any:
    if isinstance(given, dict):
        return {key: _timeless(value) for key, value in given.items() if key not in CLOCKS_AND_PLACES}
    return given
