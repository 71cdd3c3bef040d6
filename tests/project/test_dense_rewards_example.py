"""The measurement of predicted dense rewards runs, at small size, and its errors are what it says."""

import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from tests.kit.examples import example
from tests.kit.oracles import randn
from tests.kit.paths import EXAMPLES

SCRIPT = EXAMPLES / "dense_rewards.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return example("dense_rewards")


def test_errors_against_numpy(script: ModuleType) -> None:
    R, R_hat = randn(40, 6), randn(40, 6, seed=1) + randn(40, 6)
    found = script.errors(R_hat, R)
    inner, guess = R[:, 1:-1].numpy(), R_hat[:, 1:-1].numpy()
    assert found["nmse"] == pytest.approx(((guess - inner) ** 2).mean() / inner.var())
    each = [np.corrcoef(guess[:, i], inner[:, i])[0, 1] for i in range(4)]
    assert found["correlation"] == pytest.approx(np.mean(each))
    assert script.errors(R, R) == pytest.approx({"nmse": 0.0, "correlation": 1.0})
    # the mean of the data predicts as badly as 1 says; a constant correlates with nothing
    mean = R[:, 1:-1].mean().expand_as(R)
    assert script.errors(mean, R) == pytest.approx({"nmse": 1.0, "correlation": 0.0})
    # a step at which all rewards are the same has no correlation
    same, other = R.clone(), R_hat.clone()
    same[:, 2] = 1 + 1e-6 * torch.rand(40, generator=torch.Generator().manual_seed(0))
    assert script.errors(other, same)["correlation"] == pytest.approx(np.mean([each[0], *each[2:]]))


@pytest.mark.slow
def test_it_measures_and_draws(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = f"--seeds 2 --grad-steps 10 --trajectories 24 --work {tmp_path / 'runs'} --out {tmp_path / 'out'}"
    monkeypatch.setattr(script, "STEPS", (3, 5))
    script.main(script.parser().parse_args(words.split()))
    result = json.loads((tmp_path / "out" / "dense_rewards.json").read_text(encoding="utf-8"))
    assert len(result["tasks"]) == 4 and (tmp_path / "out" / "dense_rewards.png").stat().st_size > 10_000
    for task in result["tasks"].values():
        exact = task["3"]["anchor"]
        assert (exact["nmse"]["iqm"], exact["correlation"]["seeds"]) == (0, pytest.approx([1, 1]))
        asked = {variant: cell["queries"]["iqm"] for variant, cell in task["5"].items()}
        assert asked == {
            "anchor": 3,
            "anchor, raw weights": 3,
            "anchor, as published": 3,
            "linear": 2,
            "last": 1,
        }
    assert "digits: ink: linear" in capsys.readouterr().out

    # denoisers that are there already are taken
    first = (tmp_path / "out" / "dense_rewards.json").read_text(encoding="utf-8")
    runs = " ".join(str(tmp_path / "runs" / f"edm_seed{seed}") for seed in range(2))
    given = f"--runs {runs} --seeds 2 --grad-steps 10 --trajectories 24 --out {tmp_path / 'again'}"
    script.main(script.parser().parse_args(given.split()))
    assert (tmp_path / "again" / "dense_rewards.json").read_text(encoding="utf-8") == first
