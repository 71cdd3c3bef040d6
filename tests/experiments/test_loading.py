"""Runs loaded again: their denoisers, samples and grids."""

from pathlib import Path

import pytest
import torch

import diffrl
from diffrl.configs.commands import COMMANDS
from diffrl.diffusion.samplers.counting import grid_for
from diffrl.diffusion.samplers.ddim import DDIM
from diffrl.diffusion.samplers.ode import Euler, Heun
from diffrl.training import runs
from diffrl.training.checkpoints import CheckpointError
from diffrl.training.evaluation import Evaluation, draw_samples
from diffrl.training.runs import RunFolder, RunFolderError
from tests.kit.runs import checkpoint


def test_load(whole: RunFolder) -> None:
    for name in ("td", "monte_carlo"):
        loaded = diffrl.load(whole.path, None if name == "td" else name)
        assert loaded.objective == name and loaded.results == whole.results()
        assert not loaded.denoiser.training
        weights = checkpoint(whole, name)
        for key, value in loaded.denoiser.state_dict().items():
            assert torch.equal(value, weights[f"ema.{key}"])


def test_loaded_samples_are_those_that_were_evaluated(whole: RunFolder) -> None:
    loaded = diffrl.load(whole.path)
    x, nfe = draw_samples(loaded.denoiser, loaded.data, Heun(), num_steps=4, samples=40)
    assert nfe == 7 and torch.equal(x, whole.samples()["td"]["7"])
    distance = Evaluation(samples=40).sample_distance(x, loaded.data)
    assert distance == loaded.results["objectives"]["td"]["sample_distance"]["by_nfe"]["7"]


def test_samples_do_not_depend_on_the_batch_they_are_drawn_in(whole: RunFolder) -> None:
    loaded = diffrl.load(whole.path)
    together = loaded.sample(10, num_steps=4, seed=0)
    torch.testing.assert_close(together[5:6], loaded.sample(1, num_steps=4, seed=5))
    few, _ = draw_samples(loaded.denoiser, loaded.data, Heun(), num_steps=4, samples=10, seed=0, batch_size=4)
    torch.testing.assert_close(few, together)


def test_there_is_nothing_to_load(whole: RunFolder, tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="holds no run"):
        diffrl.load(tmp_path)
    with pytest.raises(CheckpointError, match="has nope been trained"):
        diffrl.load(whole.path, "nope")


@pytest.mark.parametrize("nfe", [1, 3, 9, 35])
def test_grid_for_heun(nfe: int) -> None:
    assert grid_for(Heun(), diffrl.EDM(), nfe) == (nfe + 1) // 2


def test_grid_for_others() -> None:
    assert grid_for(Euler(), diffrl.EDM(), 8) == grid_for(DDIM(), diffrl.DDPM(), 8) == 8
    with pytest.raises(ValueError, match="Heun cannot sample with 10 evaluations, but 9 or 11"):
        grid_for(Heun(), diffrl.EDM(), 10)


def test_the_command_draws_samples_without_the_data(
    whole: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(runs, "build_data", lambda config: pytest.fail("the data were built"))
    out = tmp_path / "x.png"
    words = [str(whole.path), "--nfe", "3", "--samples", "4", "--out", str(out)]
    monkeypatch.setattr("sys.argv", ["sample", *words])
    COMMANDS["sample"]()
    assert str(out) in capsys.readouterr().out and out.stat().st_size > 0
