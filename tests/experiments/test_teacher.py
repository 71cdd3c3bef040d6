"""A teacher by configuration: whose weights, that a run goes on without its file, and that another one is refused."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import diffrl
from diffrl.experiments.train import TrainingJob, run_experiment
from diffrl.objectives.distillation import DistillationPairs
from diffrl.training.build import build_data
from diffrl.training.identity import RunChanged
from diffrl.training.runs import RunFolder
from tests.kit.configs import small

WORDS = ["objective=cd", "objective.num_scales=6", "denoiser.prediction_type=consistency"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("trained") / "run"
    words = ["objective=edm", "compare=false", "trainer.grad_steps=4", f"run_dir={path}"]
    run_experiment(small(*words), progress=False)
    return path


def test_it_is_the_averaged_denoiser_of_the_run_and_frozen(trained: Path, tmp_path: Path) -> None:
    expected = diffrl.load(trained).denoiser
    file = diffrl.save(expected, tmp_path / "model.safetensors")
    for source in (trained, file):
        config = small(*WORDS, f"objective.teacher={source}")
        job = TrainingJob(config, build_data(config), "cd")
        draw, teacher = job.trainer.objective.draw, job.teacher
        assert isinstance(draw, DistillationPairs) and teacher is not None and not teacher.training
        used: Any = draw.transition.teacher
        assert used is teacher
        assert not any(p.requires_grad for p in teacher.parameters())
        found, wanted = teacher.state_dict(), expected.state_dict()
        assert all(torch.equal(found[key], wanted[key]) for key in wanted)


def test_a_run_goes_on_without_its_file_and_with_no_other(trained: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(trained, source)
    config = small(*WORDS, f"objective.teacher={source}", "compare=false", f"run_dir={tmp_path / 'run'}")
    folder = run_experiment(config, progress=False)
    shutil.rmtree(source)
    again = {**folder.config(), "resume": str(folder.path), "extend": 40}
    run_experiment(again, progress=False)
    assert RunFolder(folder.path).results()["objectives"]["cd"]["grad_steps"] == 40
    other = diffrl.load(trained).denoiser
    with torch.no_grad():
        next(other.parameters()).add_(1)
    (file,) = (folder.path / "teachers").iterdir()
    file.unlink()
    diffrl.save(other, file)
    with pytest.raises(RunChanged, match=r"objective\.teacher\.fingerprint"):
        run_experiment({**again, "extend": 50}, progress=False)


def test_what_does_not_fit_is_named(trained: Path) -> None:
    for word, message in (
        ("objective.teacher=/nowhere", "/nowhere holds no run"),
        ("objective.teacher=null", r"objective\.teacher is None: give a run folder"),
        ("objective.solver=rk4", r"objective\.solver is 'rk4'"),
    ):
        with pytest.raises(diffrl.errors.DiffrlError, match=message):
            run_experiment(small(*WORDS, "objective.teacher=exact", word), progress=False)
