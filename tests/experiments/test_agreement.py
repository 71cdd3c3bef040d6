"""Targets' errors beside what training came to: shares, ranks, figure and command, on a tiny comparison."""

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.stats import spearmanr

from diffrl.configs.cells import plan_comparison
from diffrl.configs.groups import register
from diffrl.experiments.reports.agreement import draw_agreement, rank_correlation, target_outcomes
from diffrl.experiments.studies import run_comparison
from diffrl.experiments.study_findings import StudyFindings
from diffrl.metrics.diagnostics import target_errors
from diffrl.training.build import build_oracle
from diffrl.training.runs import load
from tests.kit.configs import MC, TD, TINY
from tests.kit.paths import EXAMPLES

GRID = {"λ": "objective.lmbda=0,0.5,1", "η": "chain.coupling=0.5,1"}


def study(**changes: Any) -> dict[str, Any]:
    fields: dict[str, Any] = {"title": "", "cases": ["gmm16"], "schemes": {}, "axes": GRID, "overrides": []}
    return {**fields, "baseline": "λ=1, η=1", "matched": "grad_steps", "seeds": [0, 1], **changes}


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished grid, one that is not, and a study that is no grid."""
    register()
    board = ["data=checkerboard", *(word for word in TINY if not word.startswith("data"))]
    studies = {
        "map": study(),
        "holes": study(seeds=[2]),
        "board": study(cases=["board"], seeds=[0]),
        "list": study(axes={}, schemes={"MC": MC, "TD": TD}, baseline="MC"),
    }
    plan = {"name": "p", "data_dir": "", "score_sigmas": [0.1, 0.3, 1.0], "studies": studies}
    cases = {"gmm16": [*TINY, "data.mixture_seed={seed}"], "board": board}
    path = tmp_path_factory.mktemp("comparison")
    comparison = plan_comparison({**plan, "cases": cases})
    done = run_comparison(comparison, path, studies=["map", "board"], workers=0, progress=False)
    assert not done.failed
    return path


def test_shares_are_of_the_baselines_target_at_its_network(out: Path) -> None:
    found = target_outcomes(StudyFindings(out), states=20, draws=16)
    assert found["seeds"] == [0, 1] and len(found["cells"]) == 6
    assert json.loads(json.dumps(found)) == found
    [markov] = [cell for cell in found["cells"] if (cell["λ"], cell["η"]) == (1, 1)]
    assert markov["target_error"] == pytest.approx([1, 1]) and markov["value_error"] == [1, 1]
    for cell in found["cells"]:
        sums = np.add(cell["bias_sq"], cell["variance"])
        assert sums == pytest.approx(np.array(cell["target_error"]))

    # TD(0) at η = 0.5 and seed 1, by hand
    baseline = StudyFindings(out).finished(scheme="λ=1, η=1", seed=1, case="gmm16")[0]
    run = load(baseline.path)
    oracle = build_oracle(run.data, run.denoiser.process)
    assert oracle is not None
    errors = {}
    for eta in (0.5, 1.0):
        made = target_errors(
            run.denoiser,
            oracle,
            run.data.test[:20],
            run.denoiser.process,
            num_steps=4,
            coupling=eta,
            lmbdas=(0.0, 0.5, 1.0),
            n_steps=(),
            draws=16,
            generator=torch.Generator().manual_seed(0),
        )
        errors[eta] = made["levels"]
    grid = [level["sigma"] for level in errors[1.0]]
    near = [int(np.abs(np.log(np.array(grid) / sigma)).argmin()) for sigma in (0.1, 0.3, 1.0)]
    assert found["sigmas"] == [grid[i] for i in near]
    shares = [
        errors[0.5][i]["targets"]["lmbda=0"]["total"] / errors[1.0][i]["targets"]["lmbda=1"]["total"]
        for i in near
    ]
    [td] = [cell for cell in found["cells"] if (cell["λ"], cell["η"]) == (0, 0.5)]
    assert td["target_error"][1] == pytest.approx(np.mean(shares))


def test_value_errors_are_those_of_the_result_files(out: Path) -> None:
    found = target_outcomes(StudyFindings(out), states=4, draws=2)

    def errors(scheme: str, seed: int) -> NDArray[np.float64]:
        [file] = (out / "cells").glob(f"gmm16_{scheme}_s{seed}_*/results.json")
        [figures] = json.loads(file.read_text(encoding="utf-8"))["objectives"].values()
        return np.array([figures["value_error"][s] for s in ("0.1", "0.3", "1")])

    for cell in found["cells"]:
        name = f"lambda={cell['λ']:g}-eta={cell['η']:g}"
        ratios = [(errors(name, s) / errors("lambda=1-eta=1", s)).mean() for s in (0, 1)]
        assert cell["value_error"] == pytest.approx(ratios)
    for which, chosen in (("all", found["cells"]), ("η = 1", [c for c in found["cells"] if c["η"] == 1])):
        for part in ("bias_sq", "variance", "target_error"):
            for i, rho in enumerate(found["rank_correlation"][which][part]):
                columns = [[cell[k][i] for cell in chosen] for k in (part, "value_error")]
                assert rho == pytest.approx(spearmanr(*columns).statistic)


def test_seeds_are_those_at_which_all_is_finished(out: Path) -> None:
    [file] = (out / "cells").glob("gmm16_lambda=0-eta=0.5_s0_*/results.json")
    kept = file.rename(file.with_suffix(".away"))
    try:
        found = target_outcomes(StudyFindings(out), states=4, draws=2)
    finally:
        kept.rename(file)
    assert found["seeds"] == [1] and len(found["cells"]) == 6
    assert all(len(cell["value_error"]) == len(cell["variance"]) == 1 for cell in found["cells"])


def test_rank_correlation_at_its_ends() -> None:
    x = [0.3, 5.0, -2.0, 1.0]
    assert rank_correlation(x, np.exp(x).tolist()) == pytest.approx(1)
    assert rank_correlation(x, [-v for v in x]) == pytest.approx(-1)


@pytest.mark.parametrize(
    ("study", "case", "message"),
    [
        ("maps", "gmm16", "no study maps on case gmm16 in the comparison: there are map gmm16, holes gmm16"),
        ("holes", "gmm16", "study holes, case gmm16: at no seed are the baseline"),
        ("list", "gmm16", "the axes of study list are .*: λ and η are wanted"),
        ("board", "board", "case board has no exact denoiser"),
    ],
)
def test_what_cannot_be_is_named(out: Path, study: str, case: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        target_outcomes(StudyFindings(out), study=study, case=case)


def test_the_command_writes_numbers_and_figure(
    out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = EXAMPLES / "diagnose_targets.py"
    monkeypatch.setattr(sys, "argv", [str(script), str(out), "--states", "4", "--draws", "2"])
    runpy.run_path(str(script), run_name="__main__")
    png = out / "figures" / "targets_map_gmm16.png"
    assert capsys.readouterr().out.strip() == str(png) and png.exists()
    assert json.loads(png.with_suffix(".json").read_text(encoding="utf-8"))["states"] == 4
    monkeypatch.setattr(sys, "argv", [str(script), str(out), "--case", "none"])
    with pytest.raises(SystemExit, match="error: no study map on case none"):
        runpy.run_path(str(script), run_name="__main__")


def test_the_command_takes_a_run_folder_too(
    out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = StudyFindings(out).finished(scheme="λ=1, η=1", seed=0, case="gmm16")[0].path
    script = EXAMPLES / "diagnose_targets.py"
    monkeypatch.setattr(sys, "argv", [str(script), str(run), "--states", "4", "--draws", "2"])
    runpy.run_path(str(script), run_name="__main__")
    png = run / "plots" / "targets.png"
    assert capsys.readouterr().out.strip() == str(png) and png.stat().st_size > 10_000
    found = json.loads(png.with_suffix(".json").read_text(encoding="utf-8"))
    assert found["states"] == 4 and len(found["levels"]) == 4  # the run's own chain
    board = StudyFindings(out).finished(case="board")[0].path
    monkeypatch.setattr(sys, "argv", [str(script), str(board)])
    with pytest.raises(SystemExit, match="error: checkerboard has no exact denoiser"):
        runpy.run_path(str(script), run_name="__main__")


def test_one_seed_is_drawn_without_intervals(out: Path, tmp_path: Path) -> None:
    found = target_outcomes(StudyFindings(out), states=4, draws=2)
    one = {**found, "seeds": [0]}
    one["rank_correlation"] = {
        which: {part: by_seed[:1] for part, by_seed in parts.items()}
        for which, parts in found["rank_correlation"].items()
    }
    one["cells"] = [{k: v[:1] if isinstance(v, list) else v for k, v in c.items()} for c in found["cells"]]
    for name, numbers in (("two", found), ("one", one)):
        png = draw_agreement(numbers, tmp_path / "deep" / name)
        assert png.stat().st_size > 10_000 and png.with_suffix(".pdf").exists()
