"""The report's numbers against plain loops over the cells' result files; what is missing or single."""

import csv
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import trim_mean

import diffrl.experiments.comparison
import diffrl.experiments.reports.training
from diffrl.experiments.reports.anew import report_anew
from diffrl.experiments.reports.overview_figure import draw_overview
from diffrl.experiments.reports.sample_figure import draw_sheets
from diffrl.experiments.reports.style import plain_ticks
from diffrl.experiments.reports.training import write_report
from diffrl.experiments.reports.training_figures import _footer, _tick, draw_figures
from diffrl.experiments.studies import Comparison, Study, run_comparison, study_cell
from diffrl.experiments.study_findings import HELD_OUT, SCORE, Panel, Quantity, StudyFindings
from diffrl.training.runs import RunFolder, RunFolderError
from diffrl.training.table import Table

SIGMAS, NFES = ("0.1", "0.3", "1", "3"), ("5", "9")
STEPS = 100
CONFIG: dict[str, Any] = {
    "trainer": {"grad_steps": STEPS},
    "data": {"name": "gmm", "components": 12, "dim": 16},
    "process": {"name": "edm"},
    "dtype": "float32",
    "objective": {"name": "td"},
    "compare": False,
}


def figures(scheme: str, seed: int, *, oracle: bool = True) -> dict[str, Any]:
    """Figures that are a function of the scheme's name and the seed alone."""
    rng = np.random.default_rng([seed, *scheme.encode()])
    errors = {s: float(rng.gamma(5.0)) for s in SIGMAS} if oracle else {}
    distances = {n: float(rng.gamma(5.0)) for n in NFES}
    evaluations, seconds = 2000 if "target" in scheme else 1000, float(rng.gamma(5.0))
    return {
        "grad_steps": STEPS,
        "samples": 400,
        "network_evaluations": evaluations,
        "seconds": seconds,
        "value_error": errors,
        "denoising_error": {s: float(rng.gamma(5.0)) for s in SIGMAS},
        "sample_distance": {"metric": "sliced_w2@50", "by_nfe": distances},
    }


def make(
    out: Path, *studies: Study, skip: tuple[str, ...] = (), oracle: bool = True, data: str = "gmm"
) -> StudyFindings:
    """A folder as `run_comparison` leaves it, with made-up figures; `skip` names cells, as scheme/seed."""
    config = {**CONFIG, "data": {**CONFIG["data"], "name": data}}
    cells = [
        study_cell(s.name, case, scheme, f"{case}{scheme}{seed}".encode().hex(), {**config, "seed": seed})
        for s in studies
        for case in s.cases
        for scheme in s.schemes
        for seed in s.seeds
    ]  # fmt: skip

    def fake(task: tuple[str, str, dict[str, Any]]) -> float | None:
        path = Path(task[0])
        _, scheme, seed = next((*c.names, c.where["seed"]) for c in cells if c.folder == path.name)
        if f"{scheme}/{seed}" in skip:
            raise RuntimeError("it broke | badly\nin a second line")
        path.mkdir(parents=True)
        found = figures(scheme, seed, oracle=oracle)
        (path / "config.yaml").write_text(json.dumps({**config, "seed": seed}), encoding="utf-8")
        (path / "results.json").write_text(
            json.dumps({"config": config, "objectives": {"td": found}}), encoding="utf-8"
        )
        kinds = ("value_error", "denoising_error")
        last = {f"{kind}_{s}": error for kind in kinds for s, error in found[kind].items()}
        table = Table(path / "metrics.csv", ("objective", "grad_steps", "network_evaluations", *last))
        for step in range(0, STEPS + 1, 10):
            errors = {name: error * math.exp(0.03 * (STEPS - step)) for name, error in last.items()}
            counts = {"grad_steps": step, "network_evaluations": step * found["network_evaluations"] // STEPS}
            table.append({"objective": "td", **counts, **errors})
        return 1.0

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(diffrl.experiments.comparison, "_run_cell", fake)
        run_comparison(
            Comparison("fake", ("0.1", "0.3", "1"), studies, tuple(cells)), out, workers=0, progress=False
        )
    return StudyFindings(out)


def study(name: str = "a", **changes: Any) -> Study:
    fields: dict[str, Any] = {
        "schemes": ("MC", "λ=0.5", "target"),
        "seeds": tuple(range(5)),
        "cases": ("gmm",),
    }
    fields |= {"title": "which is best", "baseline": "MC", "matched": "network_evaluations"}
    return Study(name, **{**fields, **changes})


def test_estimates_are_those_of_a_plain_loop(tmp_path: Path) -> None:
    [panel] = make(tmp_path, study()).panels()
    assert panel.quantities == [SCORE, *(Quantity("value_error", s) for s in SIGMAS),
                                *(Quantity("sample_distance", n) for n in NFES)]  # fmt: skip
    for scheme in ("λ=0.5", "target"):
        mine, base = ([figures(s, seed) for seed in range(5)] for s in (scheme, "MC"))
        for s in SIGMAS:
            found = panel.estimates[scheme, Quantity("value_error", s)]
            assert found is not None and found.value is not None and found.seeds == (0, 1, 2, 3, 4)
            values = [f["value_error"][s] for f in mine]
            ratios = [f["value_error"][s] / b["value_error"][s] for f, b in zip(mine, base, strict=True)]
            assert found.value.iqm == pytest.approx(trim_mean(values, 0.25))
            assert found.ratio.iqm == pytest.approx(trim_mean(ratios, 0.25))
            assert found.probability == pytest.approx(sum(r < 1 for r in ratios) / 5)
            assert found.ratio.low is not None and found.ratio.high is not None
            assert min(ratios) <= found.ratio.low <= found.ratio.iqm <= found.ratio.high <= max(ratios)
        scores = [
            sum(f["value_error"][s] / b["value_error"][s] for s in ("0.1", "0.3", "1")) / 3
            for f, b in zip(mine, base, strict=True)
        ]
        found = panel.estimates[scheme, SCORE]
        assert found is not None and found.value is None
        assert found.ratio.iqm == pytest.approx(trim_mean(scores, 0.25))
        assert panel.costs(scheme)["seconds"] == pytest.approx(trim_mean([f["seconds"] for f in mine], 0.25))
    baseline = panel.estimates["MC", SCORE]
    assert baseline is not None and tuple(baseline.ratio) == (1, 1, 1) and baseline.probability == 0.5
    assert panel.is_matched("λ=0.5") and not panel.is_matched("target")


def test_effort_is_the_first_evaluation_at_the_baselines_level(tmp_path: Path) -> None:
    [panel] = make(tmp_path, study()).panels()
    for scheme in ("MC", "λ=0.5", "target"):
        shares = []
        for seed in range(5):
            mine, base = (figures(s, seed)["value_error"] for s in (scheme, "MC"))
            last = sum(mine[s] / base[s] for s in ("0.1", "0.3", "1")) / 3
            shares += [
                next(
                    (k for k in range(0, 101, 10) if last * math.exp(0.03 * (100 - k)) <= 1 + 1e-9), math.inf
                )
            ]
        effort = panel.effort(scheme)
        assert (effort.seeds, effort.reached) == (5, sum(np.isfinite(shares)))
        if math.inf in shares:
            assert effort.grad_steps is None is effort.network_evaluations
        else:
            assert effort.grad_steps is not None and effort.network_evaluations is not None
            assert effort.grad_steps.iqm == pytest.approx(trim_mean(shares, 0.25) / 100)
            factor = 2 if scheme == "target" else 1
            assert effort.network_evaluations.iqm == pytest.approx(factor * effort.grad_steps.iqm)
    assert panel.effort("MC").grad_steps == (1, 1, 1)


def report(out: Path) -> str:
    """The text of the report, with one space where tables have several."""
    return re.sub(" +", " ", write_report(out).read_text(encoding="utf-8"))


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures take seconds: only the tests that look at them draw them."""
    monkeypatch.setattr(diffrl.experiments.reports.training, "draw_figures", lambda panel, folder: [])


def test_files_hold_every_number_and_the_report_shows_them(tmp_path: Path) -> None:
    grid = {"λ": ("0", "1"), "η": ("0.0", "1.0")}
    schemes = ("λ=0, η=0.0", "λ=0, η=1.0", "λ=1, η=0.0", "λ=1, η=1.0")
    findings = make(tmp_path, study(), study("map", schemes=schemes, baseline=schemes[-1], axes=grid))
    text = report(tmp_path)
    with (tmp_path / "summary.csv").open(newline="", encoding="utf-8") as file:
        rows = {(r["study"], r["scheme"], int(r["seed"])): r for r in csv.DictReader(file)}
    assert len(rows) == 5 * 3 + 5 * 4
    for (_, scheme, seed), row in rows.items():
        wanted = figures(scheme, seed)
        assert {s: float(row[f"value_error_{s}"]) for s in SIGMAS} == wanted["value_error"]
        assert {n: float(row[f"sample_distance_nfe_{n}"]) for n in NFES} == wanted["sample_distance"][
            "by_nfe"
        ]
        assert float(row["seconds"]) == wanted["seconds"] and row["status"] == "finished"

    summary = json.loads((tmp_path / "summary.json").read_text(encoding="utf-8"))
    shown = 0
    for panel in findings.panels():
        for (scheme, quantity), estimate in panel.estimates.items():
            assert estimate is not None
            [entry] = [
                e for e in summary["estimates"]
                if (e["study"], e["scheme"], e["kind"], e["at"]) == (panel.study.name, scheme, *quantity)
            ]  # fmt: skip
            assert entry["ratio"] == estimate.ratio._asdict() and entry["probability"] == estimate.probability
            if scheme != panel.study.baseline:
                low, high = estimate.ratio.low, estimate.ratio.high
                assert (
                    f"{estimate.ratio.iqm:.2f} [{low:.2f}, {high:.2f}] P {estimate.probability:.2f}" in text
                )
                shown += 1
    assert shown == 7 * (2 + 3)
    assert "35 of 35 cells are finished" in text and "torch " in text and "network evaluations, 1,000" in text
    assert f"| target | {STEPS} | 400 | 2,000 |" in text and "**no**" in text

    kinds = {"a_gmm": ("intervals", "learning", "nfe"), "map_gmm": ("map", "learning", "nfe")}
    for stem in (f"{name}_{kind}" for name, made in kinds.items() for kind in made):
        assert f"](figures/{stem}.png)" in text
        for suffix in ("png", "pdf", "csv"):
            assert (tmp_path / "figures" / f"{stem}.{suffix}").stat().st_size > 100
    with (tmp_path / "figures" / "map_gmm_map.csv").open(newline="", encoding="utf-8") as file:
        drawn = list(csv.DictReader(file))
    _, map_panel = findings.panels()
    assert len(drawn) == 4 * 3
    for row in drawn:
        estimate = map_panel.estimates[f"λ={row['λ']}, η={row['η']}", Quantity(row["figure"], row["at"])]
        assert estimate is not None and float(row["iqm"]) == estimate.ratio.iqm


@pytest.mark.usefixtures("undrawn")
def test_drawn_anew_the_report_is_the_same(tmp_path: Path) -> None:
    make(tmp_path, study())
    write_report(tmp_path)
    names = ("report.md", "summary.csv", "summary.json")
    before = [(tmp_path / name).read_bytes() for name in names]
    assert report_anew(tmp_path) == tmp_path / "report.md"
    assert [(tmp_path / name).read_bytes() for name in names] == before


@pytest.mark.usefixtures("undrawn")
def test_failed_and_missing_cells_are_listed_and_leave_the_rest(tmp_path: Path) -> None:
    skip = ("λ=0.5/3", "MC/4")
    findings = make(tmp_path, study(), skip=skip)
    [panel] = findings.panels()
    assert [(c.where["scheme"], c.seed, c.status) for c in findings.unfinished()] == [
        ("MC", 4, "failed"), ("λ=0.5", 3, "failed"),
    ]  # fmt: skip
    assert panel.seeds("λ=0.5") == (0, 1, 2) and panel.seeds("target") == (0, 1, 2, 3)
    text = report(tmp_path)
    assert "13 of 15 cells are finished" in text and "λ=0.5 (3 of 5 seeds)" in text
    assert text.count("RuntimeError: it broke \\| badly |") == 2 and "in a second line" not in text
    for file in (tmp_path / "cells").glob("*/error.txt"):
        file.unlink()
    assert {c.status for c in StudyFindings(tmp_path).unfinished()} == {"missing"}
    assert "| a | gmm | MC | 4 | missing | | |" in report(tmp_path)


@pytest.mark.usefixtures("undrawn")
def test_what_is_missing_is_one_row_a_scheme(tmp_path: Path) -> None:
    make(tmp_path, study(), skip=("λ=0.5/1", "λ=0.5/3", "target/3"))
    for file in (tmp_path / "cells").glob("*/error.txt"):
        file.unlink()
    text = report(tmp_path)
    assert "| a | gmm | λ=0.5 | 1, 3 | missing | | |\n| a | gmm | target | 3 | missing | | |" in text


def test_a_figure_tells_how_many_seeds_it_has(tmp_path: Path) -> None:
    [panel] = make(tmp_path, study(), skip=("λ=0.5/1", "λ=0.5/3")).panels()
    assert "; 3 to 5 seeds." in _footer(panel)
    [panel] = make(tmp_path / "whole", study()).panels()
    assert "; 5 seeds." in _footer(panel)


def test_values_of_an_axis_need_not_be_numbers() -> None:
    assert [_tick(value) for value in ("0.50", "1e-3", "[0.5,0.999]")] == ["0.5", "0.001", "[0.5,0.999]"]


@pytest.mark.usefixtures("undrawn")
def test_without_a_baseline_there_is_nothing_to_compare(tmp_path: Path) -> None:
    make(tmp_path, study(), skip=tuple(f"MC/{seed}" for seed in range(5)))
    text = report(tmp_path)
    assert "No seed of the baseline, MC, is finished" in text and "Best schemes" not in text


@pytest.mark.parametrize("schemes", [("MC",), ("MC", "λ=0.5")])
@pytest.mark.parametrize("oracle", [True, False])
def test_one_seed_and_one_scheme(tmp_path: Path, schemes: tuple[str, ...], oracle: bool) -> None:
    findings = make(tmp_path, study(schemes=schemes, seeds=(7,)), oracle=oracle)
    [panel] = findings.panels()
    assert (SCORE in panel.quantities) == oracle
    text = report(tmp_path)
    assert "[" not in text.partition("## a:")[2].replace("![", "")  # no interval of one seed
    assert ("Best schemes" in text) == (len(schemes) > 1)
    assert ("Effort to reach" in text) == oracle
    if oracle and len(schemes) > 1:
        ratio = panel.estimates["λ=0.5", SCORE]
        assert ratio is not None and f"{ratio.ratio.iqm:.2f} P {ratio.probability:.2f}" in text


def test_on_real_data_the_held_out_error_is_in_every_table_and_figure(tmp_path: Path) -> None:
    [panel] = make(tmp_path, study(), data="digits").panels()
    errors = [*(Quantity("value_error", s) for s in SIGMAS), HELD_OUT,
              *(Quantity("denoising_error", s) for s in SIGMAS)]  # fmt: skip
    assert panel.quantities == [SCORE, *errors, *(Quantity("sample_distance", n) for n in NFES)]
    mine, base = (figures(scheme, 3)["denoising_error"] for scheme in ("λ=0.5", "MC"))
    ratios = [mine[s] / base[s] for s in ("0.1", "0.3", "1")]
    assert panel.ratios("λ=0.5", Quantity("denoising_error", "0.3"))[3] == pytest.approx(ratios[1])
    assert panel.ratios("λ=0.5", HELD_OUT)[3] == pytest.approx(sum(ratios) / 3)
    assert panel.curve("λ=0.5", 3, HELD_OUT).score[-1] == pytest.approx(sum(ratios) / 3)

    text = report(tmp_path)
    assert "**Held-out denoising error, × baseline**" in text and "| held-out denoising error, mean |" in text
    for _, path in draw_figures(panel, tmp_path / "figures")[:2]:  # the third is of samples alone
        with path.with_suffix(".csv").open(newline="", encoding="utf-8") as file:
            shown = [row.get("figure", row.get("panel")) for row in csv.DictReader(file)]
        assert shown.count("denoising_error") == 2 or shown.count("curve_held_out") == 3 * 11


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("data", ["gmm", "digits"])
def test_a_study_on_several_cases_is_drawn_in_one_picture(data: str, tmp_path: Path) -> None:
    panels = [*make(tmp_path, study(cases=("one", "two"), seeds=(1, 2, 3)), data=data).panels()]
    drawn = draw_overview(panels, tmp_path / "figures")
    assert drawn is not None and drawn[1].stat().st_size > 10_000
    with drawn[1].with_suffix(".csv").open(newline="", encoding="utf-8") as file:
        rows = {(row["case"], row["scheme"]): row for row in csv.DictReader(file)}
    others = [s for s in panels[0].compared if s != panels[0].study.baseline]
    expected = {(panel.case, scheme): (panel, SCORE) for panel in panels for scheme in others}
    if data == "digits":  # whose value error rewards what knows the training rows by heart
        expected |= {
            (f"{case}, held out", s): (panel, HELD_OUT) for (case, s), (panel, _) in expected.items()
        }
    assert rows.keys() == expected.keys()
    for (case, scheme), (panel, quantity) in expected.items():
        estimate = panel.estimates[scheme, quantity]
        assert estimate is not None
        assert float(rows[case, scheme]["iqm"]) == pytest.approx(estimate.ratio.iqm)
    assert draw_overview(panels[:1], tmp_path / "figures") is None


def test_images_are_shown_scheme_by_scheme(tmp_path: Path) -> None:
    [panel] = make(tmp_path, study(), data="digits", skip=("λ=0.5/0", "target/2")).panels()
    assert draw_sheets(panel, tmp_path) == []  # no samples are kept
    images = torch.linspace(-1, 1, 9 * 16).reshape(9, 1, 4, 4)
    for scheme in panel.compared:
        run = RunFolder(panel.cells[scheme][panel.seeds(scheme)[0]].path)
        run.write_samples("td", {nfe: images.clone() for nfe in NFES})
    [(_, path)] = draw_sheets(panel, tmp_path / "figures")
    assert path.name == "a_gmm_samples.png" and path.stat().st_size > 1000
    assert path.with_suffix(".pdf").exists() and "](figures/a_gmm_samples.png)" in report(tmp_path)
    for scheme in panel.compared:
        run = RunFolder(panel.cells[scheme][panel.seeds(scheme)[0]].path)
        run.write_samples("td", {nfe: images[:, 0, 0].clone() for nfe in NFES})
    assert draw_sheets(panel, tmp_path) == []  # points


def test_a_grid_with_holes_is_drawn(tmp_path: Path) -> None:
    grid = {"λ": ("0", "1"), "η": ("0.0", "1.0")}
    schemes = ("λ=0, η=0.0", "λ=0, η=1.0", "λ=1, η=0.0", "λ=1, η=1.0")
    holes = tuple(f"{scheme}/{seed}" for scheme in schemes[:2] for seed in range(5))
    [panel] = make(tmp_path, study(schemes=schemes, baseline=schemes[-1], axes=grid), skip=holes).panels()
    [(_, path), *_] = draw_figures(panel, tmp_path)
    assert path.name == "a_gmm_map.png"
    with path.with_suffix(".csv").open(newline="", encoding="utf-8") as file:
        assert {(row["λ"], row["η"]) for row in csv.DictReader(file)} == {("1", "0.0"), ("1", "1.0")}


@pytest.mark.usefixtures("undrawn")
def test_figures_that_are_not_finite_are_called_so(tmp_path: Path) -> None:
    make(tmp_path, study())
    file = next(path for path in (tmp_path / "cells").glob("*lambda=0.5_s2*/results.json"))
    results = json.loads(file.read_text(encoding="utf-8"))
    results["objectives"]["td"]["sample_distance"]["by_nfe"]["5"] = math.inf
    file.write_text(json.dumps(results), encoding="utf-8")
    [panel] = StudyFindings(tmp_path).panels()
    assert panel.estimates["λ=0.5", Quantity("sample_distance", "5")] is None
    assert panel.estimates["λ=0.5", Quantity("sample_distance", "9")] is not None
    assert "not finite" in report(tmp_path)


def test_a_folder_without_a_comparison(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="holds no comparison: there is no index.json in it"):
        write_report(tmp_path)


@pytest.mark.parametrize("low", [0.003, 0.83, 1.0, 7.0])
@pytest.mark.parametrize("span", [1.02, 1.3, 9.0, 40.0, 1e9])
@pytest.mark.parametrize("most", [4, 9])
def test_ticks_are_round_few_and_inside(low: float, span: float, most: int) -> None:
    from matplotlib.figure import Figure

    axes = Figure().subplots()
    axes.set_xscale("log")
    axes.set_xlim(low, low * span)
    plain_ticks(axes.xaxis, most)
    ticks = axes.get_xticks()
    assert (
        1 <= len(ticks) <= most
        and (ticks >= low * (1 - 1e-9)).all()
        and (ticks <= low * span * (1 + 1e-9)).all()
    )
    assert [float(label.get_text()) for label in axes.get_xticklabels()] == pytest.approx(
        list(ticks), rel=1e-3
    )


def test_a_panel_is_its_own_study_and_case(tmp_path: Path) -> None:
    panels: list[Panel] = list(make(tmp_path, study(cases=("gmm", "rings")), study("b")).panels())
    assert [(p.study.name, p.case) for p in panels] == [("a", "gmm"), ("a", "rings"), ("b", "gmm")]
    assert all(len(p.cells) == 3 and len(p.cells["MC"]) == 5 for p in panels)
