"""The examples run, at small size, and do what they say."""

import json
import math
import runpy
import sys
from pathlib import Path

import pytest

from diffrl.experiments.train import run_experiment
from tests.kit.configs import SMALL, small
from tests.kit.examples import example
from tests.kit.paths import EXAMPLES


def shell(monkeypatch: pytest.MonkeyPatch, name: str, *words: str) -> None:
    """Run a script as a shell would."""
    monkeypatch.setattr(sys, "argv", [str(EXAMPLES / f"{name}.py"), *words])
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")


# The main job


@pytest.mark.usefixtures("unrendered")
def test_train_td_lambda(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run"
    shell(monkeypatch, "train_td_lambda", *SMALL, "objective.lmbda=0.5", f"run_dir={path}")
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert lines[0] == "TD(λ=0.5) and Monte Carlo on rings: 30 gradient steps of 8 data, seed 0"
    for words in (
        "value error, σ = 0.3",
        "sliced W2 distance, NFE 7",
        "network evaluations",
        "seconds",
        "ratio",
    ):
        assert any(words in line for line in lines)
    assert lines[-2].split() == ["run", "folder", str(path)]
    assert lines[-1].split() == ["figure", str(path / "plots" / "summary.png")]
    assert {file.name for file in path.iterdir()} >= {"config.yaml", "results.json", "metrics.csv", "plots"}
    assert "objective.lmbda=0.5" in (path / "command.txt").read_text(encoding="utf-8")

    # resuming what is finished draws it again
    (path / "plots" / "summary.png").unlink()
    shell(monkeypatch, "train_td_lambda", f"resume={path}")
    assert capsys.readouterr().out == out and (path / "plots" / "summary.png").exists()


def test_the_demo_extra_is_asked_for_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit) as stop:
        shell(monkeypatch, "train_td_lambda", *SMALL, f"run_dir={tmp_path / 'run'}")
    assert stop.value.code == "error: matplotlib missing: pip install 'diffrl[demo]'"
    assert not (tmp_path / "run").exists()


# Smaller ones


def test_plain_loop(capsys: pytest.CaptureFixture[str]) -> None:
    main = example("plain_loop").main
    errors = [main(lmbda, grad_steps=200) for lmbda in (0.0, 0.0, 1.0)]
    assert errors[0] == errors[1] != errors[2] and all(math.isfinite(error) for error in errors)
    assert capsys.readouterr().out.splitlines()[0].startswith("step   200  loss ")


@pytest.mark.slow
def test_plain_loop_reaches_the_value_errors_it_names() -> None:
    main = example("plain_loop").main
    assert main(0.0) == pytest.approx(0.53, rel=0.1)
    assert main(1.0) == pytest.approx(0.86, rel=0.1)


def test_sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    path = run_experiment(small(f"run_dir={tmp_path / 'run'}"), progress=False).path
    shell(monkeypatch, "sample", str(path), "--nfe", "9", "--samples", "20")
    assert capsys.readouterr().out.split() == [str(path / "plots" / "samples_td_nfe9_seed0.png")]
    other = tmp_path / "x.png"
    words = [str(path), "--nfe", "3", "--objective", "monte_carlo", "--seed", "4", "--out", str(other)]
    shell(monkeypatch, "sample", *words)
    assert other.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--nfe", "10"], "error: Heun cannot sample with 10 evaluations, but 9 or 11"),
        (["--nfe", "9", "--guidance-scale", "2"], "error: guidance_scale is 2"),
        (["--objective", "nope"], "holds no checkpoint"),
    ],
)
def test_sample_says_what_cannot_be(
    words: list[str], message: str, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SystemExit) as stop:
        shell(monkeypatch, "sample", str(run), *words)
    assert message in str(stop.value.code) and "\n" not in str(stop.value.code)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("run") / "run"
    return run_experiment(
        small(f"run_dir={path}", "compare=false", "trainer.grad_steps=2"), progress=False
    ).path


def test_train_digits_features(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    accuracy = example("train_digits_features").main(tmp_path / "x.safetensors", seed=0, epochs=1)
    assert accuracy > 0.3 and (tmp_path / "x.safetensors").stat().st_size > 100_000


@pytest.mark.usefixtures("unrendered")
def test_few_step_plane(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    script = example("few_step_plane")
    monkeypatch.setattr(script, "SAMPLES", 500)
    words = ["--seeds", "2", "--distillation", "1", "--tuning", "1", "--data", "four modes", "scattered"]
    words += ["--work", str(tmp_path / "work"), "--out", str(tmp_path / "out")]
    arguments = script.parser().parse_args([*words, "--variants", "TDM-R1", "group loss on the student"])
    script.main(arguments)
    out = capsys.readouterr().out
    made = {path.name: path for path in (tmp_path / "out").iterdir()}
    assert set(made) == {f"{name}.{end}" for name in ("plane_tdm", "plane_tdm_r1") for end in ("json", "png")}
    cells = json.loads(made["plane_tdm.json"].read_text(encoding="utf-8"))["cells"]
    assert set(cells) == {f"{process}, K = {K}" for process in ("flow", "VP", "EDM") for K in (1, 2, 4)}
    for task in json.loads(made["plane_tdm_r1.json"].read_text(encoding="utf-8"))["cells"].values():
        assert 0.15 < task["data"]["reward"]["iqm"] < 0.3  # one mode of four or of five
        assert abs(task["data"]["judge"]["iqm"] - task["data"]["reward"]["iqm"]) < 0.04
        assert task["data"]["on"]["iqm"] > 0.97 and 0.8 < task["data"]["spread"]["iqm"] < 1.2
        assert task["TDM-R1"].keys() == task["data"].keys()
    # what is there already is not made again
    script.main(arguments)
    assert capsys.readouterr().out == out
