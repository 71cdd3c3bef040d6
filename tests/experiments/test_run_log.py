"""Sheets of samples in TensorBoard and W&B: the images of the run, under a name that says how they were drawn."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from diffrl.experiments import run_log
from diffrl.experiments.image_sheets import image_sheet
from diffrl.experiments.run_log import RunLog, check_log
from diffrl.extras import MissingExtra

X = torch.rand(5, 3, 4, 6, generator=torch.Generator().manual_seed(0)) * 2 - 1
SHEET = image_sheet(X.numpy(), 3)
TAG = "td/samples_nfe_9_n_5_seed_7"


def test_tensorboard_shows_the_sheet(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = RunLog("tensorboard", str(tmp_path), "td")
    log.sheet("td", X, nfe="9", seed=7, step=40)
    log.sheet("points", X[:, 0, 0], nfe="9", seed=7, step=40)
    (file,) = tmp_path.rglob("events.out.tfevents.*")
    found = EventAccumulator(str(file)).Reload()
    assert found.Tags()["images"] == [TAG]
    (event,) = found.Images(TAG)
    assert (event.step, event.height, event.width) == (40, *SHEET.shape[:2])


@pytest.mark.parametrize("channels", [1, 3])
def test_wandb_is_given_the_sheet(channels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """By stand-ins of `wandb.Image(array)` and `run.log(dict)`, whose documentation asks for [H, W] or [H, W, 3]."""
    logged: list[dict[str, Any]] = []
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(Image=lambda pixels: pixels))
    run = SimpleNamespace(experiment=SimpleNamespace(log=logged.append))
    monkeypatch.setattr(run_log, "_opened", lambda *_: run)
    RunLog("wandb", "here", "td").sheet("td", X[:, :channels], nfe="9", seed=7, step=40)
    (row,) = logged
    assert row.keys() == {TAG, "td/step"} and row["td/step"] == 40
    expected = SHEET if channels == 3 else image_sheet(X[:, :1].numpy(), 3)[..., 0]
    assert row[TAG].dtype == np.uint8 and row[TAG].shape == expected.shape
    np.testing.assert_allclose(row[TAG] / 255, expected, atol=0.5 / 255 + 1e-9)


def test_wandb_in_earnest_but_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    log = RunLog("wandb", str(tmp_path), "td")
    log.scalar("td/loss_value", 1.0, 40)
    log.sheet("td", X, nfe="9", seed=7, step=40)
    log._logger.experiment.finish()
    (file,) = tmp_path.rglob("media/images/td/samples_nfe_9*.png")
    assert file.stat().st_size > 0


def test_what_wandb_needs_for_images_is_asked_for_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"wandb": object(), "PIL": None}
    monkeypatch.setattr("importlib.util.find_spec", lambda name: found[name])
    with pytest.raises(MissingExtra, match=r"PIL missing: pip install 'diffrl\[wandb\]'"):
        check_log("wandb")
