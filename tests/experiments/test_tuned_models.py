"""A tuned denoiser as the model of a next run: teacher, fake score and weights are those of the run before."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import diffrl
from diffrl.__main__ import main
from diffrl.configs.cli import settings
from diffrl.errors import InputError
from diffrl.experiments.finetune import opened, run_finetuning
from diffrl.experiments.train import run_experiment
from diffrl.finetuning.models.tuned import latest_tuned, tuned_model
from diffrl.finetuning.run_checks import check_tuner
from diffrl.training.checkpoints import load_weights, weight_sets
from diffrl.training.identity import RunFolderError
from diffrl.training.runs import RunFolder
from tests.kit.configs import composed, small

FEW_STEPS = ("sampler=ddim", "policy.num_steps=2", "policy.std_floor=0")
QUICK = (
    "compare=[]",
    "reward=mode_distance",
    "reward.point=[0.8,0]",
    "heldout_reward=none",
    "rollouts.trajectories=16",
    "loop.iterations=2",
    "evaluation.samples=16",
    *FEW_STEPS,
)


def tuning(*words: Any) -> dict[str, Any]:
    chosen = {str(word).partition("=")[0] for word in words}
    kept = [word for word in QUICK if word.partition("=")[0] not in chosen]
    return settings(composed(*kept, *map(str, words), name="finetune"), [])


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("base") / "run"
    run_experiment(small("compare=false", f"run_dir={path}"), progress=False)
    return path


@pytest.fixture(scope="module")
def student(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("student") / "run"
    config = tuning(
        "recipe=tdm", f"model.path={base}", f"run_dir={path}", "optim.lr=1e-3", "surrogate.fake_lr=1e-3"
    )
    return run_finetuning(config, progress=False).path


def flat(module: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in module.parameters()])


def test_a_student_learns_from_its_base_and_keeps_its_fake_score(base: Path, student: Path) -> None:
    model, before = tuned_model(str(student)), diffrl.load(base).denoiser
    assert model.teacher is not None
    torch.testing.assert_close(flat(model.teacher), flat(before), rtol=0, atol=0)
    torch.testing.assert_close(flat(model.denoiser), flat(diffrl.load_tuned(student).policy), rtol=0, atol=0)
    assert not torch.equal(flat(model.denoiser), flat(before))
    assert RunFolder(student).results()["finetuning"]["untaught"] is None  # though nobody pays
    kept = load_weights(max((student / "checkpoints" / "policy").iterdir()), "reference_fake")
    fake = model.twins["fake"].state_dict()
    assert kept.keys() == fake.keys() and all(torch.equal(kept[name], fake[name]) for name in kept)

    tuner = opened(
        tuning("recipe=tdm_r1", "rollouts.group_size=8", "model=tuned", f"model.path={student}")
    ).tuner
    assert torch.equal(flat(tuner.policy.denoiser), flat(model.denoiser))
    assert torch.equal(flat(tuner.references("teacher").denoiser), flat(before))
    assert torch.equal(flat(tuner.references.twin("fake").denoiser), flat(model.twins["fake"]))
    assert torch.equal(flat(tuner.references.twin("surrogate").denoiser), flat(before))
    assert torch.equal(flat(tuner.base.denoiser), flat(model.denoiser))  # what evaluations compare with


def test_a_tuned_denoiser_can_be_its_own_teacher(student: Path) -> None:
    model = tuned_model(str(student), teacher="itself")
    assert model.teacher is None and not model.twins
    tuner = opened(tuning("recipe=tdm", "model=tuned", f"model.path={student}", "model.teacher=itself")).tuner
    assert torch.equal(flat(tuner.references("teacher").denoiser), flat(model.denoiser))


def test_runs_follow_each_other(base: Path, student: Path, tmp_path: Path) -> None:
    words = (
        "recipe=tdm_r1",
        "rollouts.group_size=8",
        "model=tuned",
        f"model.path={student}",
        "optim.lr=1e-3",
    )
    run = run_finetuning(tuning(*words, f"run_dir={tmp_path / 'r1'}"), progress=False)
    loaded = diffrl.load_tuned(run.path)
    assert loaded.sample(3).shape == (3, 2)
    third = tuned_model(str(run.path))  # its teacher is the first of all
    assert third.teacher is not None and torch.equal(flat(third.teacher), flat(diffrl.load(base).denoiser))
    ddpo = tuning(
        "recipe=ddpo_is",
        "model=tuned",
        f"model.path={student}",
        "policy.std_floor=0.1",
        f"run_dir={tmp_path / 'd'}",
    )
    assert run_finetuning(ddpo, progress=False).results()["finetuning"]["queries"] > 0


def test_a_run_that_took_a_fake_score_along_goes_on(student: Path, tmp_path: Path) -> None:
    words = (
        "recipe=tdm_r1",
        "rollouts.group_size=8",
        "model=tuned",
        f"model.path={student}",
        "optim.decay=none",
    )
    whole = run_finetuning(
        tuning(*words, "loop.iterations=3", f"run_dir={tmp_path / 'whole'}"), progress=False
    )
    part = run_finetuning(tuning(*words, f"run_dir={tmp_path / 'part'}"), progress=False)
    config = {**part.config(), "resume": str(part.path), "extend": 3}
    assert run_finetuning(config, progress=False).path == part.path
    found, wanted = (latest_tuned(run) for run in (part, whole))
    assert found.name == wanted.name == "step_000003"
    for name in weight_sets(wanted):
        a, b = load_weights(found, name), load_weights(wanted, name)
        assert all(torch.equal(a[key], b[key]) for key in b), name


def test_what_is_no_tuned_run_is_refused(base: Path) -> None:
    with pytest.raises(InputError, match="model.path is null: give the folder of a fine-tuning run"):
        tuned_model()
    with pytest.raises(InputError, match="model.teacher is 'nobody': give 'base' or 'itself'"):
        tuned_model("x", teacher="nobody")
    with pytest.raises(RunFolderError, match="holds a run of the command train"):
        tuned_model(str(base))


def test_a_judge_of_a_target_wants_one(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["compare=[]", "reward=ink", f"model.path={base}"]
    monkeypatch.setattr("sys.argv", ["diffrl", "finetune", *words])
    with pytest.raises(SystemExit, match="set heldout_reward=none"):
        main()


def test_a_recipe_without_a_reward_is_not_told_that_it_learns_nothing(base: Path) -> None:
    tuner = opened(tuning("recipe=tdm", f"model.path={base}")).tuner
    assert "advantages" not in str(check_tuner(tuner))
    asked = opened(tuning("recipe=awm", "rollouts.group_size=8", f"model.path={base}")).tuner
    assert "advantages" in str(check_tuner(asked))
