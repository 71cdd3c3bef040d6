"""The phase diagram: what it draws of a comparison that is not finished, with its numbers by hand."""

import csv
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import yaml

from diffrl.experiments.studies import Study
from tests.kit.examples import example
from tests.kit.paths import ROOT
from tests.project.test_examples import shell

SIGMAS = ("0.1", "0.3", "1")
SEEDS = (11, 12, 13)
SLOW, FAST = "lr 2e-3, β1 0.9", "lr 8e-3, β1 0"
OPTIM = {SLOW: {"lr": 2e-3, "betas": [0.9, 0.999]}, FAST: {"lr": 8e-3, "betas": [0.0, 0.999]}}


def write(out: Path, studies: dict[str, dict[str, dict[str, dict[int, float]]]], rate: str = "fixed") -> Path:
    """A comparison of studies; by study, case, scheme and seed the value error over Monte Carlo's at the same seed."""
    cells: list[dict[str, Any]] = []
    entries: list[dict[str, Any]] = []
    for study, cases in studies.items():
        schemes = list(dict.fromkeys(scheme for found in cases.values() for scheme in found))
        made = Study(study, "", schemes[0], "grad_steps", (*cases,), (*schemes,), SEEDS)
        entries.append(asdict(made))
        for case, scheme in ((case, scheme) for case, found in cases.items() for scheme in found):
            for seed, ratio in cases[case][scheme].items():
                place = {
                    "study": study,
                    "case": case,
                    "scheme": scheme,
                    "rate": rate,
                    "point": "",
                    "seed": seed,
                }
                folder = f"{len(cells)}_x"
                cells.append({**place, "folder": folder})
                write_cell(out / "cells" / folder, scheme, seed, ratio)
    index = {"plan": "phase", "score_sigmas": SIGMAS, "studies": entries, "commands": [], "cells": cells}
    (out / "index.json").write_text(json.dumps(index), encoding="utf-8")
    return out


def write_cell(path: Path, scheme: str, seed: int, ratio: float) -> None:
    path.mkdir(parents=True)
    optim = next((found for words, found in OPTIM.items() if words in scheme), OPTIM[SLOW])
    config = {"seed": seed, "dtype": "float32", "compare": False, "objective": {"name": "td"}, "optim": optim}
    (path / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    errors = {sigma: ratio * seed * (i + 1) for i, sigma in enumerate(SIGMAS)}
    results = {"config": config, "objectives": {"td": {"value_error": errors}}}
    (path / "results.json").write_text(json.dumps(results), encoding="utf-8")


def rows(path: Path) -> list[dict[str, Any]]:
    with path.with_suffix(".csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def numbers(row: dict[str, Any], *names: str) -> list[float]:
    return [float(row[name]) for name in names]


ONE = dict.fromkeys(SEEDS, 1.0)


def test_what_is_there_is_drawn(tmp_path: Path) -> None:
    td, late = (
        {11: 0.5, 12: 0.7, 13: 0.75},
        {12: 2.0},
    )  # one seed of the target is finished, none of d64's baseline
    rate = {
        **{f"Monte Carlo, {SLOW}": ONE, f"TD(0), {SLOW}": {11: 1.5, 12: 1.6, 13: 1.2}},
        **{f"Monte Carlo, {FAST}": {11: 2.0, 13: 4.0}, f"TD(0), {FAST}": {11: 1.0, 12: 9.0, 13: 1.0}},
    }
    studies = {
        "dimension": {
            "d16": {"Monte Carlo": ONE, "TD(0)": td, "target 0.99": late},
            "d64": {"TD(0)": td},
        },
        "processes": {"flow": {"Monte Carlo": ONE, "TD(0)": dict.fromkeys(SEEDS, 3.0)}},
        "rate": {"d32": rate},
    }
    phase, rates = example("phase_diagram").main(write(tmp_path, studies))
    assert phase.stat().st_size > 10_000 and rates.stat().st_size > 10_000
    found = {(row["factor"], row["case"], row["scheme"]): row for row in rows(phase)}
    assert [*found] == [("dimension", "d16", "TD(0)"), ("dimension", "d16", "target 0.99"),
                        ("process", "d16", "TD(0)"), ("process", "flow", "TD(0)"),
                        ("process", "d16", "target 0.99")]  # fmt: skip
    row = found["dimension", "d16", "TD(0)"]
    assert numbers(row, "seeds", "median", "least", "largest") == pytest.approx([3, 0.7, 0.5, 0.75])
    assert numbers(found["process", "d16", "target 0.99"], "seeds", "median") == [1, 2]

    fast, slow = rows(rates)  # by x; the fast rate at the seeds at which both its schemes are finished
    assert numbers(fast, "lr", "beta1", "x") == pytest.approx([8e-3, 0, 4])
    assert numbers(fast, "td", "monte_carlo", "ratio", "seeds", "least", "largest") == pytest.approx(
        [1, 3, 0.375, 2, 0.25, 0.5]
    )
    assert numbers(slow, "x", "td", "monte_carlo", "ratio") == pytest.approx([19, 1.5, 1, 1.5])


def test_without_a_pair_there_is_nothing_to_draw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = write(tmp_path, {"dimension": {"d16": {"Monte Carlo": {}, "TD(0)": {11: 0.5}}}})
    for folder, says in ((out, "has nothing to draw yet"), (tmp_path / "none", "holds no comparison")):
        with pytest.raises(SystemExit, match=rf"^error: {folder} {says}"):
            shell(monkeypatch, "phase_diagram", str(folder))
    assert not (out / "figures").exists()


def test_the_plan_has_what_is_drawn() -> None:
    script = example("phase_diagram")
    plan = yaml.safe_load((ROOT / "configs" / "plan" / "phase.yaml").read_text(encoding="utf-8"))
    assert {case for factor in script.FACTORS for case in factor.cases} == {*plan["cases"]}
    for study in plan["studies"].values():
        known = {*study["schemes"]}
        if study is not plan["studies"]["rate"]:
            assert {"Monte Carlo", "TD(0)"} <= known
            continue
        assert known == {name.replace("TD(0)", "Monte Carlo") for name in known} | {
            name.replace("Monte Carlo", "TD(0)") for name in known
        }
    assert {*script.SHOWN} <= {*plan["studies"]["dimension"]["schemes"]}
