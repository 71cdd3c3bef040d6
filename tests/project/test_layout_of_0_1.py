"""What becomes of version 0.1: its import paths, and the run folders that it wrote."""

import shutil
from pathlib import Path

import pytest
import torch

import diffrl
from diffrl.experiments.finetune import run_finetuning
from diffrl.experiments.train import run_experiment
from diffrl.moved import ALIASES, MOVED
from diffrl.training.checkpoints import CheckpointError
from diffrl.training.runs import RunFolder
from tests.kit.paths import ROOT

OLD = ROOT / "tests" / "kit" / "runs_of_0_1"


@pytest.mark.parametrize("old", sorted(ALIASES))
def test_public_modules_have_their_old_names_too(old: str) -> None:
    module = __import__(f"diffrl.{old}", fromlist=["x"])
    assert module is getattr(diffrl, old) and module.__name__ == f"diffrl.{ALIASES[old]}"
    assert module.__spec__ is not None and module.__spec__.name == module.__name__


@pytest.mark.parametrize("old", sorted(MOVED))
def test_other_modules_are_refused_with_their_new_path(old: str) -> None:
    with pytest.raises(ModuleNotFoundError, match=f"diffrl.{old} is diffrl.{MOVED[old]} since version 0.2"):
        __import__(f"diffrl.{old}")
    __import__(f"diffrl.{MOVED[old]}")


def test_nothing_else_is_refused() -> None:
    with pytest.raises(ModuleNotFoundError, match="No module named 'diffrl.nothing'"):
        __import__("diffrl.nothing")


def test_a_trained_run_is_loaded_and_continued(tmp_path: Path) -> None:
    path = shutil.copytree(OLD / "trained", tmp_path / "run")
    run = diffrl.load(path)
    assert run.sample(4, num_steps=2).isfinite().all()
    (path / "results.json").unlink()
    with pytest.warns(RuntimeWarning, match=r"was written elsewhere \(diffrl 0\.1\.0 → "):
        folder = run_experiment({**RunFolder.open(path).config(), "resume": str(path)}, progress=False)
    old = RunFolder(OLD / "trained").results()["objectives"]["td"]
    assert folder.results()["objectives"]["td"]["value_error"] == pytest.approx(old["value_error"])


def test_a_tuned_run_is_loaded_and_its_training_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = shutil.copytree(OLD / "tuned", tmp_path / "tuned")
    shutil.copytree(OLD / "trained", tmp_path / "trained")
    monkeypatch.chdir(tmp_path)  # the run names the model by its path
    tuned = diffrl.load_tuned(path)
    x = tuned.sample(8)
    assert x.shape == (8, 2) and x.isfinite().all() and torch.equal(x, tuned.sample(8))
    (path / "results.json").unlink()
    refused = pytest.raises(
        CheckpointError, match="was written by diffrl 0.1: load it with diffrl.load_tuned"
    )
    with pytest.warns(RuntimeWarning, match="was written elsewhere"), refused:
        run_finetuning({**RunFolder.open(path).config(), "resume": str(path)}, progress=False)
