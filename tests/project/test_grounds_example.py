"""The picture of grounds: which study a field is from, its numbers by hand, and what the plan must hold for it."""

import csv
import json
from pathlib import Path

import pytest
import yaml

from diffrl.errors import DiffrlError
from tests.kit.examples import example
from tests.kit.paths import ROOT
from tests.project.test_phase_diagram_example import ONE, write

STUDIES = {
    "default": {"d16": {"Monte Carlo": ONE, "STF 256": {11: 0.5, 12: 0.6, 13: 0.7}}},
    "targets": {"d16": {"Monte Carlo": ONE, "STF 256": {11: 9.0}, "λ=0.5": {11: 2.0, 12: 3.0}}},
    "fresh": {"d16": {"Monte Carlo": ONE, "EDM": dict.fromkeys(ONE, 0.25)}},
}


def test_a_field_is_from_the_study_with_the_most_seeds(tmp_path: Path) -> None:
    out = write(tmp_path, STUDIES, "tuned")
    for folder in (out / "cells").iterdir():
        config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
        results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
        figures = results["objectives"]["td"]
        edm = figures["value_error"]["0.1"] == pytest.approx(0.25 * config["seed"])
        figures["sample_distance"] = {"by_nfe": {}}
        config |= {"data": {"name": "gmm"}, "trainer": {"batch_size": 432 if edm else 32}}
        (folder / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
        (folder / "results.json").write_text(json.dumps(results), encoding="utf-8")
    script = example("grounds_on_one_page")
    picture = script.main(out)
    assert picture.stat().st_size > 10_000
    with picture.with_suffix(".csv").open(newline="", encoding="utf-8") as file:
        rows = {(row["case"], row["scheme"]): row for row in csv.DictReader(file)}
    assert len(rows) == (len(script.GROUNDS) + 1) * len(script.SCHEMES)
    found = {scheme: rows["d16", scheme] for scheme in script.SCHEMES}
    assert float(found["STF 256"]["iqm"]) == pytest.approx(0.6) and found["STF 256"]["seeds"] == "3"
    assert float(found["EDM"]["iqm"]) == pytest.approx(0.25)
    assert float(found["λ=0.5"]["iqm"]) == pytest.approx(2.5)
    assert found["fresh states"]["iqm"] == "nan" and rows["d32", "EDM"]["seeds"] == "0"
    assert script.times_the_data(script.StudyFindings(out).panels()) == "13.5"


def test_rates_that_are_not_tuned_are_not_shown(tmp_path: Path) -> None:
    with pytest.raises(DiffrlError, match="has nothing to draw yet"):
        example("grounds_on_one_page").main(write(tmp_path, STUDIES))


def test_the_plan_has_what_is_drawn() -> None:
    script = example("grounds_on_one_page")
    plan = yaml.safe_load((ROOT / "configs" / "plan" / "grounds.yaml").read_text(encoding="utf-8"))
    assert {*script.GROUNDS} <= {*plan["cases"]}
    assert {*script.SCHEMES} <= {name for study in plan["studies"].values() for name in study["schemes"]}
