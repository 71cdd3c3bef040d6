"""Schemes beside the run's own: what they share, in what they differ, and how a run of several is told and drawn."""

import csv
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

import diffrl
from diffrl.configs.cells import plan_seeds
from diffrl.configs.cli import settings
from diffrl.errors import InputError
from diffrl.experiments.comparison import run_cells
from diffrl.experiments.reports.run_figure import draw_summary
from diffrl.experiments.reports.run_table import mean_ratio, objective_label, summary_table
from diffrl.experiments.reports.run_words import in_words
from diffrl.experiments.reports.seeds import seeds_table
from diffrl.experiments.run import Interrupted
from diffrl.experiments.schemes import planned_objectives, settings_of
from diffrl.experiments.train import run_experiment
from diffrl.training.runs import RunFolder
from diffrl.training.trainer import Trainer
from tests.kit.configs import composed, small
from tests.kit.runs import checkpoint, run

BESIDE = (
    "+beside.shared={objective:{lmbda:0.5},chain:{coupling:shared}}",
    "+beside.slow={objective:{bootstrap:target}}",
)
SHORT = (
    "trainer.grad_steps=6",
    "trainer.eval_every=3",
    "trainer.checkpoint_every=3",
    "trainer.report_every=3",
)
NAMES = ["monte_carlo", "td", "shared", "slow"]


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return run(tmp_path_factory.mktemp("several") / "run", *BESIDE, *SHORT)


def figures(folder: RunFolder, name: str) -> dict[str, Any]:
    found = dict(folder.results()["objectives"][name])
    del found["seconds"], found["forward_equivalents"]
    return found


# What is trained


def test_planned() -> None:
    assert planned_objectives(small(*BESIDE)) == NAMES
    assert planned_objectives(small(*BESIDE, "objective=monte_carlo")) == ["monte_carlo", "shared", "slow"]
    assert planned_objectives(small(*BESIDE, "compare=false")) == ["td"]
    assert planned_objectives(small()) == ["td", "monte_carlo"]
    old = {key: value for key, value in small().items() if key != "beside"}  # of diffrl 0.3
    assert planned_objectives(old) == ["td", "monte_carlo"] and settings_of(old, "td") == old


def test_only_what_is_named_differs() -> None:
    config = small(*BESIDE)
    changed = settings_of(config, "shared")
    assert changed.pop("objective") == {**config["objective"], "lmbda": 0.5}
    assert changed.pop("chain") == {**config["chain"], "coupling": "shared"}
    assert changed == {key: value for key, value in config.items() if key not in ("objective", "chain")}
    assert settings_of(config, "td") == settings_of(config, "monte_carlo") == config


@pytest.mark.parametrize(
    ("scheme", "error"),
    [
        (
            "a={trainer:{grad_steps:9}}",
            "beside.a.trainer: schemes of one run may differ in settings of objective",
        ),
        ("a={chain:{coupled:1}}", "beside.a.chain.coupled: there is num_steps, "),
        ("a={chain:shared}", "beside.a.chain: schemes of one run may differ"),
        ("data={}", "beside.data: choose a name"),
        ("td={}", "beside.td: choose a name"),
        ("a={chain:{coupling:7}}", "coupling"),
    ],
)
def test_refused(scheme: str, error: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=error):
        run(tmp_path / "run", f"+beside.{scheme}")
    assert not (tmp_path / "run").exists()


def test_a_name_must_be_one_of_a_file() -> None:
    with pytest.raises(InputError, match="beside.a/b: choose a name"):
        planned_objectives({**small(), "beside": {"a/b": {}}})


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("td", []),
        ("monte_carlo", ["objective=monte_carlo"]),
        ("shared", ["objective.lmbda=0.5", "chain.coupling=shared"]),
        ("slow", ["objective.bootstrap=target"]),
    ],
)
def test_each_is_as_if_it_were_alone(name: str, words: list[str], several: RunFolder, tmp_path: Path) -> None:
    alone = run(tmp_path / "run", "compare=false", *SHORT, *words)
    [own] = alone.results()["objectives"]
    assert figures(alone, own) == figures(several, name)
    one, two = checkpoint(alone, own), checkpoint(several, name)
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


def test_folder(several: RunFolder) -> None:
    assert list(several.results()["objectives"]) == NAMES and set(several.samples()) == {"data", *NAMES}
    with (several.path / "metrics.csv").open(newline="", encoding="utf-8") as file:
        steps = [(row["objective"], row["grad_steps"]) for row in csv.DictReader(file)]
    assert steps == [(name, step) for name in NAMES for step in ("0", "3", "6")]
    loaded = diffrl.load(several.path, "shared")
    assert loaded.objective == "shared" and loaded.sample(2, num_steps=2).shape == (2, 2)


def test_stopped_and_resumed(several: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = Trainer._advance

    def acting(self: Trainer) -> dict[str, float]:
        if self.step == 4 and self.name == "shared":
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self)

    monkeypatch.setattr(Trainer, "_advance", acting)
    with pytest.raises(Interrupted, match="gradient step 5 of shared, and saved"):
        run(tmp_path / "run", *BESIDE, *SHORT)
    monkeypatch.undo()
    folder = RunFolder(tmp_path / "run")
    assert list(folder.results()["objectives"]) == ["monte_carlo", "td"]
    run_experiment({**folder.config(), "resume": str(folder.path)}, progress=False)
    assert all(figures(folder, name) == figures(several, name) for name in NAMES)


# How it is told


def test_labels() -> None:
    config = small(*BESIDE, "objective.lmbda=0.5", "chain.coupling=0.25")
    labels = [objective_label(name, config) for name in NAMES]
    partly = "TD(λ=0.5), partly shared noise (η = 0.25)"
    assert labels == ["Monte Carlo", partly, "TD(λ=0.5), shared noise", f"{partly} (slow)"]
    assert objective_label("td", small()) == "TD(lookahead=0.125)"  # alone, as ever


def found(errors: tuple[float, float], distance: float, seconds: float = 2.0) -> dict[str, Any]:
    by_sigma = dict(zip(("0.3", "1"), errors, strict=True))
    return {
        "grad_steps": 30,
        "network_evaluations": 60,
        "seconds": seconds,
        "value_error": by_sigma,
        "denoising_error": {sigma: error + 1 for sigma, error in by_sigma.items()},
        "sample_distance": {"metric": "sliced_w2@40", "by_nfe": {"2": distance}},
    }


def of_three() -> dict[str, Any]:
    schemes = {
        "monte_carlo": found((4.0, 1.0), 0.5),
        "td": found((2.0, 0.8), 0.5),
        "shared": found((5.0, 3.0), 0.1, 3),
    }
    return {"config": small(*BESIDE, "objective.lmbda=0"), "seed": 3, "versions": {}, "objectives": schemes}


def test_mean_ratio_is_the_mean_of_ratios() -> None:
    assert mean_ratio({"0.3": 2.0, "1": 0.8}, {"0.3": 4.0, "1": 1.0}) == pytest.approx((0.5 + 0.8) / 2)
    assert mean_ratio({"1": 2.0}, {"1": 0.0}) == 1.0


def test_table_of_three() -> None:
    lines = {line[:35].strip(): line[35:].split() for line in summary_table(of_three()).splitlines()}
    assert lines["value error, σ = 0.3"] == ["4.00", "2.00", "0.50", "×", "5.00", "1.25", "×"]
    assert lines["value error, mean ratio"] == ["0.65", "×", "2.12", "×"]
    assert lines["denoising error, test, mean ratio"] == ["0.75", "×", "1.60", "×"]
    assert lines["sliced W2 distance, NFE 2"] == ["0.500", "0.500", "1.00", "×", "0.100", "0.20", "×"]
    assert lines["network evaluations in training"] == ["60", "60", "1.00", "×", "60", "1.00", "×"]
    assert lines["milliseconds a gradient step"] == ["66.7", "66.7", "1.00", "×", "100.0", "1.50", "×"]


def test_words_of_three() -> None:
    text = in_words(of_three())
    first, second, equal = text.split("\n\n")
    assert first.startswith("TD(0), fresh noise, against Monte Carlo:") and "is nearer to the exact" in first
    assert "0.65 × in the mean; at σ = 0.3, 1: 0.50, 0.80 ×" in first and "The price" not in first
    assert "The price: the denoiser is farther" in second and "at NFE 2: 0.20 ×" in second
    assert "1.50 × the time" in second and "30 steps of 8 data" in equal and "60 network evaluations" in equal
    other = of_three()
    other["objectives"]["td"]["network_evaluations"] = 120
    assert "2.00 × the network evaluations" in in_words(other) and "but not the evaluations" in in_words(
        other
    )


def test_words_of_fewer_are_none(several: RunFolder) -> None:
    assert "seed 0" in in_words(several.results())
    del (two := of_three())["objectives"]["shared"]
    assert in_words(two) == ""


def test_seeds_have_a_ratio_for_each_scheme(tmp_path: Path) -> None:
    words = ["data.test_size=64", "network=mlp", "network.hidden=8", "network.depth=1", *SHORT, *BESIDE]
    words += ["trainer.batch_size=4", "eval.points=8", "eval.samples=16", "eval.num_steps=[2]", "data=rings"]
    config = {**settings(composed(*words), words), "seeds": [1, 2], "run_dir": str(tmp_path / "out")}
    cells, out = plan_seeds(config, words)
    assert run_cells(cells, out, workers=0, progress=False).finished == 2
    head = seeds_table(out).splitlines()[2]
    assert head.count("TD(lookahead=0.125), fresh noise") == 4 and head.count("(slow)") == 2
    assert head.count("× TD(λ=0.5), shared noise") == 1


# How it is drawn


def test_numbers_of_the_figure(several: RunFolder) -> None:
    picture = draw_summary(several.path)
    assert picture.stat().st_size > 20_000
    with picture.with_suffix(".csv").open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["panel"] == "learning_curve"]
    last = {row["objective"]: float(row["y"]) for row in rows if row["sigma"] == "score" and row["x"] == "6"}
    errors = {name: several.results()["objectives"][name]["value_error"] for name in NAMES}
    assert last == pytest.approx({name: mean_ratio(errors[name], errors["monte_carlo"]) for name in NAMES})
    assert last["monte_carlo"] == pytest.approx(1.0)


@pytest.mark.parametrize(
    "words", [["data=digits", "eval.points=8", "eval.samples=16"], ["data=checkerboard"]]
)
def test_every_kind_of_data_is_drawn(words: list[str], tmp_path: Path) -> None:
    folder = run(tmp_path / "run", *BESIDE, "trainer.grad_steps=2", *words)
    assert draw_summary(folder.path).stat().st_size > 20_000
    assert json.loads((folder.path / "results.json").read_text(encoding="utf-8"))["objectives"].keys() == set(
        NAMES
    )
