"""The check of a training run: right runs pass, and each mistake is found by the check that is for it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tensordict import TensorDict
from torch import Generator, Tensor

from diffrl import keys
from diffrl.configs.commands import COMMANDS
from diffrl.diffusion.trajectories import draw_chain
from diffrl.experiments import check_run as module
from diffrl.experiments.check_run import check_run
from diffrl.experiments.train import run_experiment
from diffrl.finetuning.check_report import Report
from diffrl.training.build import build_data
from diffrl.training.trainer import Trainer
from tests.kit.configs import small


def failed(report: Report) -> set[str]:
    return {check.name.partition(":")[0] for check in report.failed}


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["process=ddpm", "sampler=ddim"],
        ["process=vp", "objective.n_steps=2", "objective.lmbda=null"],
        ["process=flow", "objective=monte_carlo"],
        ["chain.coupling=shared", "objective.lmbda=0", "chain.value=clean"],
        ["objective=ct", "denoiser.prediction_type=consistency", "sampler=consistency"],
        ["objective=td_edm", "chain.window=1"],
        ["dtype=float64", "objective.bootstrap=target", "chain.window=1", "starts=loss_aware"],
        ["chain.num_steps=1", "chain.jitter=false"],
    ],
    ids=" ".join,
)
def test_right_runs_pass(words: list[str]) -> None:
    report = check_run(small(*words))
    assert report.passed, str(report)
    assert len(report.checks) >= 9


@pytest.mark.parametrize(
    ("words", "name"),
    [
        (["denoiser.sigma_data=0.01"], "data"),
        (["process.sigma_max=1"], "first level"),
        (["objective.gamma=0.9"], "fixed point"),
    ],
)
def test_wrong_settings_are_found(words: list[str], name: str) -> None:
    report = check_run(small(*words))
    assert failed(report) == {name}, str(report)


@pytest.mark.parametrize(("factor", "fits"), [(0.32, False), (0.34, True), (2.9, True), (3.1, False)])
def test_check_and_train_tell_the_same_of_the_scale(
    factor: float, fits: bool, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    config = small(f"run_dir={tmp_path / 'run'}")
    config["denoiser"]["sigma_data"] = build_data(config).sigma_data / factor
    checked = {check.cause for check in check_run(config).failed if check.name.startswith("data")}
    assert not recwarn.list  # the table says it
    run_experiment(config, progress=False)
    assert {str(w.message) for w in recwarn if "sigma_data" in str(w.message)} == checked
    assert len(checked) == (not fits)


def twice_the_reward(drawn: TensorDict) -> None:
    drawn[keys.NEXT, keys.REWARD] = 2 * drawn[keys.NEXT, keys.REWARD]


def ended_early(drawn: TensorDict) -> None:
    drawn[keys.NEXT, keys.TERMINATED] = torch.ones_like(drawn[keys.NEXT, keys.TERMINATED])


def another_value(drawn: TensorDict) -> None:
    drawn[keys.X_T] = drawn[keys.X_T] + 0.1


@pytest.mark.parametrize(
    ("mistake", "names"),
    [
        (twice_the_reward, {"rewards"}),
        (ended_early, {"flags"}),
        (another_value, {"rewards"}),
    ],
)
def test_a_wrong_chain_is_found(
    mistake: Callable[[TensorDict], None], names: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(*args: Any, **options: Any) -> TensorDict:
        drawn = draw_chain(*args, **options)
        mistake(drawn)
        return drawn

    monkeypatch.setattr(module, "draw_chain", wrong)
    assert names <= failed(check_run(small()))


def test_a_value_that_is_not_the_denoiser_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    class Halved(module.ValueLoss):
        def forward(self, tensordict: TensorDict) -> TensorDict:
            tensordict[keys.X0] = 0.5 * tensordict[keys.X0]
            return super().forward(tensordict)

    monkeypatch.setattr(module, "ValueLoss", Halved)
    assert failed(check_run(small())) == {"λ = 1"}


def test_random_numbers_without_a_seed_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = Trainer.batch

    def unseeded(self: Trainer, step: int) -> tuple[Tensor, Tensor | None, Generator]:
        x0, labels, generator = batch(self, step)
        return x0 + 0.1 * torch.randn(x0.shape), labels, generator

    monkeypatch.setattr(Trainer, "batch", unseeded)
    assert failed(check_run(small())) == {"determinism", "resuming"}


def test_a_state_that_is_not_saved_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    restore = Trainer._restore

    def forgetful(self: Trainer, *args: Any) -> None:
        restore(self, *args)
        self.optimiser.algorithm.state.clear()

    monkeypatch.setattr(Trainer, "_restore", forgetful)
    assert failed(check_run(small())) == {"resuming"}


def test_the_command_prints_a_table_and_fails_with_the_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["data=rings", "network=mlp", "trainer.batch_size=8", "chain.num_steps=4", "eval.points=8"]
    monkeypatch.setattr("sys.argv", ["-m diffrl check", *words])
    COMMANDS["check"]()
    assert "the run is right as far as can be told" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["-m diffrl check", *words, "objective.gamma=0.5"])
    with pytest.raises(SystemExit, match="error: 1 checks failed"):
        COMMANDS["check"]()
    assert "fixed point: bias of the target (s.e.): the exact denoiser is not" in capsys.readouterr().out


@pytest.mark.parametrize("rows", [10, 30])
def test_a_small_folder_of_pictures_is_no_mistake(tmp_path: Path, rows: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (rows, 8, 8), np.uint8)
    for number, picture in enumerate(pixels):
        Image.fromarray(picture).save(tmp_path / f"{number:02}.png")
    for seed in range(3):
        report = check_run(small("data=folder", f"data.path={tmp_path}", f"seed={seed}"))
        assert report.passed, str(report)
