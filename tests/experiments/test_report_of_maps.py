"""Reports on schemes of which some learn no denoiser: what stands for a value error, targets, what steps cost."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import spearmanr, trim_mean

import diffrl.experiments.reports.training
from diffrl.experiments.reports.target_table import foretold
from diffrl.experiments.reports.training import write_report
from diffrl.experiments.study_findings import SCORE, Quantity
from tests.experiments import test_report
from tests.experiments.test_report import SIGMAS, make, study

plain = test_report.figures
SCHEMES = ("MC", "TD", "map", "consistency")


def figures(scheme: str, seed: int, *, oracle: bool = True) -> dict[str, Any]:
    """Those of the other tests, and what maps have."""
    found, rng = plain(scheme, seed), np.random.default_rng([seed, 7, *scheme.encode()])
    found["forward_equivalents"] = 4.0 if scheme == "MC" else 8.0
    if scheme == "consistency":
        found["value_error"] = {}
    if scheme in ("map", "consistency"):
        pairs = ("20->0", "20->1") if scheme == "map" else ("20->0",)
        found["map_error"] = {pair: float(rng.gamma(5.0)) for pair in pairs}
    if scheme != "TD":
        bias, variance = rng.gamma(5.0, size=2).tolist()
        found["target_error"] = {"bias_sq": bias, "variance": variance, "total": bias + variance}
    return found


@pytest.fixture
def report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, str, Path]:
    """The panel, the text and the folder."""
    monkeypatch.setattr(test_report, "figures", figures)
    monkeypatch.setattr(diffrl.experiments.reports.training, "draw_figures", lambda panel, folder: [])
    [panel] = make(tmp_path, study(schemes=SCHEMES)).panels()
    return panel, write_report(tmp_path).read_text(encoding="utf-8"), tmp_path


def row(text: str, scheme: str, after: str) -> list[str]:
    """The cells of a scheme in the first table after some words."""
    lines = text[text.index(after) :].splitlines()
    [first, *_] = [line for line in lines if line.startswith(f"| {scheme} ")]
    return [cell.strip() for cell in first.strip("|").split("|")][1:]


def test_a_consistency_function_has_no_value_error_and_hides_nobodys(report: tuple[Any, str, Path]) -> None:
    panel, text, folder = report
    assert SCORE in panel.quantities and Quantity("value_error", "1") in panel.quantities
    assert panel.has("map", SCORE) and not panel.has("consistency", SCORE)
    assert row(text, "consistency", "Value error, × baseline") == ["–"] * (1 + len(SIGMAS))
    assert "–" not in "".join(row(text, "map", "Value error, × baseline"))
    kinds = {
        (e["scheme"], e["kind"])
        for e in json.loads((folder / "summary.json").read_text(encoding="utf-8"))["estimates"]
    }
    assert ("consistency", "map_error") in kinds and ("consistency", "score") not in kinds
    with (folder / "summary.csv").open(encoding="utf-8") as file:
        found = {(r["scheme"], r["seed"]): r for r in csv.DictReader(file)}
    assert found["consistency", "0"]["value_error_1"] == ""
    assert float(found["map", "3"]["map_error_20->1"]) == figures("map", 3)["map_error"]["20->1"]


def test_map_errors_are_told_where_they_were_taken(report: tuple[Any, str, Path]) -> None:
    _, text, _ = report
    errors = [figures("map", seed)["map_error"]["20->0"] for seed in range(5)]
    assert row(text, "map", "Map error")[0].startswith(f"{trim_mean(errors, 0.25):#.3g} [")
    assert row(text, "consistency", "Map error")[1] == ""
    assert "MC" not in text[text.index("Map error") : text.index("Effort to reach")]


def test_costs_of_a_step_stand_beside_those_of_a_run(report: tuple[Any, str, Path]) -> None:
    _, text, _ = report
    assert row(text, "map", "Cost of a run")[-2:] == ["8.0", "2.00"]
    assert row(text, "MC", "Cost of a run")[-2:] == ["4.0", "1.00"]


def test_targets_stand_beside_the_outcome_and_are_ranked_with_it(report: tuple[Any, str, Path]) -> None:
    panel, text, _ = report
    part = text[text.index("Targets against their oracle") :]
    assert "| TD" not in part[: part.index("Rank correlation over 3 schemes")]
    bias = [figures("map", seed)["target_error"]["bias_sq"] for seed in range(5)]
    assert row(text, "map", "Targets against")[0].startswith(f"{trim_mean(bias, 0.25):#.3g} [")
    having = ("MC", "map", "consistency")
    for seed, told in enumerate(foretold(panel)["bias_sq"]):
        errors = [figures(s, seed)["target_error"]["bias_sq"] for s in having]
        ends = [figures(s, seed)["sample_distance"]["by_nfe"].values() for s in having]
        outcome = [float(np.prod([*found])) for found in ends]
        assert told == pytest.approx(spearmanr(errors, outcome).statistic)
