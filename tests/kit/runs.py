"""Small runs, and what their folders hold."""

from pathlib import Path

from torch import Tensor

from diffrl.experiments.train import run_experiment
from diffrl.training.checkpoints import latest_checkpoint, load_checkpoint
from diffrl.training.runs import RunFolder
from tests.kit.configs import small


def run(path: Path, *overrides: str) -> RunFolder:
    return run_experiment(small(f"run_dir={path}", *overrides), progress=False)


def checkpoint(folder: RunFolder, objective: str = "td") -> dict[str, Tensor]:
    newest = latest_checkpoint(folder.checkpoints(objective))
    assert newest is not None
    read = load_checkpoint(newest)
    found = {f"{name}.{k}": v for name, tensors in read.weights.items() for k, v in tensors.items()}
    for i, moments in read.training["optimiser"]["state"].items():
        found |= {f"optimiser.{i}.{k}": v for k, v in moments.items()}
    return found
