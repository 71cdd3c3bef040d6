"""The checks for a GPU, run on the processor in a tiny form, so that they work when a GPU comes."""

import gc
import json
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from tests.kit.paths import ROOT


@pytest.fixture
def checks(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import gpu_checks

    return gpu_checks


@pytest.mark.filterwarnings("ignore:No target network updater")
def test_one_call_runs_every_check_and_writes_one_file(
    checks: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[Any] = []  # compiling takes half a minute, and collecting garbage seconds
    monkeypatch.setattr(gc, "collect", lambda: 0)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: compiled.append(type(module).__name__))
    out = tmp_path / "checks.json"
    checks.main(["--device", "cpu", "--small", "--rounds", "2", "--out", str(out)])
    found = json.loads(out.read_text(encoding="utf-8"))
    assert found["errors"] == {} and set(compiled) == {"UNet"}
    assert found["steps"].keys() == checks.VARIANTS.keys()
    for name, step in found["steps"].items():
        assert step["states"] == 8 and step["peak_gib"] is None, name
        assert step["states_per_second"] == pytest.approx(8e3 / step["milliseconds"])
    plain, own = (found["steps"][name]["parameters"] for name in ("EDM, plain PyTorch", "EDM"))
    assert plain == own == found["steps"]["EDM, augmented"]["parameters"] - 9 * 32
    assert found["ratios"].keys() == {f"{one} over {other}" for one, other in checks.OVER}
    assert all(0 < ratio["median"] < math.inf for ratio in found["ratios"].values())
    samples = found["samples"]
    assert samples["finite"] and samples["largest_difference_from_cpu"] == 0 and samples["evaluations"] == 35


def test_a_check_that_fails_is_told_and_the_others_go_on(
    checks: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks, "VARIANTS", {"EDM": checks.Variant(("network.channels=7",))})
    monkeypatch.setattr(checks, "OVER", ())
    monkeypatch.setattr(checks, "_samples", lambda bench: {"finite": True})
    out = tmp_path / "checks.json"
    with pytest.raises(SystemExit, match="error: 1 checks failed"):
        checks.main(["--device", "cpu", "--small", "--out", str(out)])
    found = json.loads(out.read_text(encoding="utf-8"))
    assert "channels that are a multiple of 4" in found["errors"]["EDM"] and found["samples"]["finite"]


def test_without_a_gpu_it_says_so_in_one_line(checks: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="^error: there is no GPU here: give --device cpu --small") as error:
        checks.main([])
    assert "\n" not in str(error.value)
    with pytest.raises(SystemExit, match="^error: --rounds is 1: an interval needs at least 2"):
        checks.main(["--device", "cpu", "--rounds", "1"])


def test_a_loss_by_hand_that_is_another_is_refused(
    checks: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    import gpu_steps

    trainer = gpu_steps.Bench(torch.device("cpu"), small=True, images=64).trainer(checks.VARIANTS["EDM"])
    gpu_steps.require_agreement(trainer)
    right = gpu_steps.plain_loss
    monkeypatch.setattr(gpu_steps, "plain_loss", lambda *given: 1.01 * right(*given))
    with pytest.raises(RuntimeError, match="one is wrong"):
        gpu_steps.require_agreement(trainer)
