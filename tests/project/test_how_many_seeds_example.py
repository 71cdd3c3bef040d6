"""The study of how many seeds runs at small size, goes on where it was stopped, and counts what it says."""

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from tests.kit.examples import example


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return example("how_many_seeds")


def test_the_decision_is_one_on_one_mode_only(script: ModuleType) -> None:
    mode, std = script.MEANS[script.MODE], script.STD
    away = mode / mode.norm()
    points = torch.stack([mode, mode + 2.9 * std * away, mode + 3.1 * std * away, script.MEANS[2]])
    assert script.decision(points) == [1.0, 1.0, 0.0, 0.0]


def test_figures_of_the_exact_denoiser(script: ModuleType) -> None:
    found = script.figures(script.ExactAndMore())
    assert found["reward"] == pytest.approx(found["near"] / 8, abs=0.02)  # eight modes, all alike
    assert found["near"] > 0.8 and 1.3 < found["distance"] < 2.6  # √2 of the data; four steps are few


def pair(higher: str | None, *cells: tuple[float, float, float]) -> dict[str, Any]:
    by_n = [
        {"n": n, "rule": "mean", "paired": False, "a": a, "b": b, "undecided": u}
        for n, (a, b, u) in zip((1, 3), cells, strict=True)
    ]
    return {"pair": ["x", "y"], "higher": higher, "by_n": by_n}


def test_rates_are_means_over_settled_pairs_and_claims_are_of_the_others(script: ModuleType) -> None:
    pairs = [
        pair("x", (0.5, 0.25, 0.25), (1, 0, 0)),
        pair("y", (0.125, 0.875, 0), (0, 1, 0)),
        pair(None, (0.25, 0.125, 0.625), (0, 0, 1)),
    ]
    found = {"right": 0.6875, "wrong": 0.1875, "undecided": 0.125, "claimed": 0.375}
    assert script.rates(pairs, 1, "mean") == found
    assert script.rates(pairs, 3, "mean") == {"right": 1, "wrong": 0, "undecided": 0, "claimed": 0}
    assert script.rates(pairs, 1, "welch") == {}


def test_needed_seeds_are_counted_where_they_are_few(script: ModuleType) -> None:
    apart = script.needed([1.0, 1.1, 1.2, 1.1], [0.0, 0.1, 0.0, 0.1], 1, "mean")
    assert apart["counted"] == 1 and script.seeds_text(apart) == "1"
    near = script.needed([0.0, 1.0, 2.0, 3.0], [0.1, 0.9, 1.9, 2.9], 1, "welch")
    assert "counted" not in near and script.seeds_text(near).startswith("≈ ")


def test_the_highest_of_all_is_counted(script: ModuleType) -> None:
    scores = {"x": [0.0, 1.0, 1.0, 1.0], "y": [0.5] * 4, "z": [0.0] * 4}
    assert script.best(scores, 1) == pytest.approx({"x": 0.75, "y": 0.25, "z": 0}, abs=0.02)
    assert script.best(scores, 4) == {"x": 1, "y": 0, "z": 0}


def test_a_run_that_diverges_is_a_result(script: ModuleType, tmp_path: Path) -> None:
    path = script.student(tmp_path / "student.safetensors", iterations=1)
    row = script.run(("DDPO", 10.0, 0, 20, path))
    assert (row["reward"], row["near"], row["distance"]) == (0, 0, None)


def test_rates_chosen_by_the_mean_are_run_too(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fake(tasks: list[Any], arguments: Any) -> list[dict[str, Any]]:
        luck = {("SDPO", 0.1, 1000): 5.0}  # one seed of a rate that else is bad
        best = script.LEARNING_RATES
        return [
            {"method": m, "lr": lr, "seed": s, "reward": luck.get((m, lr, s), float(lr == best[m]))}
            for m, lr, s in tasks
        ]

    monkeypatch.setattr(script, "collect", fake)
    found = script.tuning(script.parser().parse_args(["--seeds", "3"]))
    assert found["by_the_mean"] == {"SDPO": {"lr": 0.1, "reward": [0.0] * 3}}
    assert found["rewards"]["SDPO"][0.1] == [5.0, 0.0, 0.0]
    assert "SDPO: the mean would choose 0.1, with a reward of 0.000" in script.tuning_table(found)


def test_it_runs_draws_and_goes_on(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    work, out = tmp_path / "work", tmp_path / "out"
    script.student(work / "student.safetensors", iterations=1)
    words = ["--seeds", "4", "--iterations", "2", "--work", str(work), "--out", str(out)]

    def outcome() -> tuple[str, dict[str, Any]]:
        script.main(script.parser().parse_args(words))
        return capsys.readouterr().out, json.loads((out / "how_many_seeds.json").read_text(encoding="utf-8"))

    printed, result = outcome()
    assert {(row["method"], row["seed"]) for row in result["runs"]} == {
        (name, seed) for name in script.METHODS for seed in range(4)
    }
    assert {row["calls"] for row in result["runs"]} == {2 * script.CALLS}  # the same for all methods
    assert len(result["pairs"]) == 10 and (out / "how_many_seeds.png").stat().st_size > 10_000
    for found in result["pairs"]:
        assert {cell["n"] for cell in found["by_n"]} == {1, 3}
        assert all(cell["a"] + cell["b"] + cell["undecided"] == pytest.approx(1) for cell in found["by_n"])
    assert "DDPO - SDPO" in printed and "Welch's interval" in printed

    # it was killed in the middle of a line
    kept = work / "runs.jsonl"
    kept.write_text(kept.read_text(encoding="utf-8")[:-30], encoding="utf-8")
    again = []

    def run(task: tuple[Any, ...], run: Any = script.run) -> Any:
        again.append(task[:3])
        return run(task)

    monkeypatch.setattr(script, "run", run)
    before = result["runs"]
    printed_again, result = outcome()
    assert again == [(name := before[-1]["method"], script.LEARNING_RATES[name], 3)]
    for old, new in zip(before, result["runs"], strict=True):
        assert {**old, "seconds": 0} == {**new, "seconds": 0}
    assert printed_again == printed
    tasks = [(row["method"], row["lr"], row["seed"]) for row in before]
    assert (
        script.collect(tasks, script.parser().parse_args(words)) == result["runs"] and len(again) == 1
    )  # all is there
