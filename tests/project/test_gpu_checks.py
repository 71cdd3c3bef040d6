"""The checks for a GPU, run on the processor in a tiny form, so that they work when a GPU comes."""

import gc
import json
import math
import re
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
    assert samples["finite"] and samples["evaluations"] == 35
    for name in ("largest_difference_from_cpu", "largest_difference_from_cpu_without_tf32"):
        assert samples[name] == 0
    assert torch.backends.cudnn.allow_tf32 == found["tf32"]["convolutions"]  # is as it was


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


def test_what_a_fault_of_the_gpu_leaves_behind_does_not_end_the_others(
    checks: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After an illegal access every call fails, also that which frees memory."""

    def broken(*args: Any) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(checks, "_free", broken)
    out = tmp_path / "checks.json"
    with pytest.raises(SystemExit, match="error: 18 checks failed"):
        checks.main(["--device", "cpu", "--small", "--out", str(out)])
    errors = json.loads(out.read_text(encoding="utf-8"))["errors"]
    assert len(errors) == 18 and all("illegal memory access" in error for error in errors.values())


def test_a_batch_of_another_size(checks: ModuleType) -> None:
    """As many states in chains as one by one."""
    import gpu_steps

    bench = gpu_steps.Bench(torch.device("cpu"), small=True, images=64, batch=12)
    assert {bench.states(variant) for variant in checks.VARIANTS.values()} == {12}
    assert bench.trainer(checks.VARIANTS["TD"]).length.batch_size == 3


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ([], "there is no GPU here: give --device cpu --small"),
        (["--device", "cpu", "--small", "--rounds", "1"], "--rounds is 1: an interval needs at least 2"),
        (["--device", "mps"], "--device is 'mps': give cuda, cuda:1, ... or cpu"),
        (["--device", "cpu:x", "--small"], "--device is 'cpu:x', which cannot be used"),
        (["--device", "cpu"], "the checks at full size are for a GPU: give --small too"),
        (["--device", "cpu", "--small", "--batch", "6"], "--batch is 6: give a multiple of 4"),
        (["--device", "cpu", "--small", "--batch", "0"], "--batch is 0: give a multiple of 4"),
        (
            ["--device", "cpu", "--small", "--out", "nowhere/x.json"],
            "--out: nowhere/x.json cannot be written",
        ),
    ],
)
def test_what_cannot_be_is_told_in_one_line(
    checks: ModuleType,
    words: list[str],
    line: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=f"^error: {re.escape(line)}") as error:
        checks.main(words)
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


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
