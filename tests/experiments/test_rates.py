"""Each scheme at its own rate: the best on seeds that are not reported, in two stages; the fixed rate beside it."""

import csv
import json
import math
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import diffrl.experiments.reports.training
from diffrl.configs.cells import plan_comparison
from diffrl.configs.groups import register
from diffrl.errors import FileError
from diffrl.experiments.comparison import JOBS, Cell
from diffrl.experiments.rates import Choice, choose, has_diverged, measured_by
from diffrl.experiments.reports.training import write_report
from diffrl.experiments.run import Interrupted
from diffrl.experiments.studies import Comparison, run_comparison, study_cell
from diffrl.experiments.study_findings import StudyFindings
from diffrl.training.optim import NonFiniteLoss
from tests.experiments.test_comparison import plan, results, study
from tests.kit.configs import MC, TD, composed, settings

SIGMAS = ("0.1", "0.3", "1")
RATES = (1e-3, 2e-3, 4e-3)
BEST = {"monte_carlo": 4e-3, "td": 2e-3}
"""The rate at which the fakes below err least, at seeds that are tuned on; at the others 1e-3 is best."""


Ran = list[tuple[str, float, int]]
"""Objective, rate and seed of each run, in order."""


@pytest.fixture(autouse=True)
def groups(monkeypatch: pytest.MonkeyPatch) -> None:
    register()
    monkeypatch.setattr(diffrl.experiments.reports.training, "draw_figures", lambda panel, folder: [])


def tuned(on: tuple[int, ...] = (8, 9), grid: str = "1e-3,2e-3,4e-3", **changes: Any) -> Comparison:
    tuning = {"grid": {"lr": f"optim.lr={grid}"}, "seeds": [*on], "by": "error"}
    return plan_comparison(plan(a=study(**changes)) | {"tuning": tuning})


def write_run(config: dict[str, Any], *, error: float) -> None:
    """A folder as a finished run leaves it."""
    path = Path(config["run_dir"])
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.yaml").write_text(yaml.safe_dump({**config, "run_dir": None}), encoding="utf-8")
    figures = {
        **{"grad_steps": 6, "samples": 24, "network_evaluations": 100, "seconds": 0.5},
        "value_error": dict.fromkeys(SIGMAS, error),
        "denoising_error": dict.fromkeys(SIGMAS, 1.0),
        "sample_distance": {"metric": "sliced_w2@16", "by_nfe": {"3": 1.0}},
    }
    name = config["objective"]["name"]
    found = {"config": config, "objectives": {name: figures}}
    (path / "results.json").write_text(json.dumps(found), encoding="utf-8")
    (path / "metrics.csv").write_text("objective,grad_steps\n", encoding="utf-8")


def train_by(patch: pytest.MonkeyPatch, fake: Any) -> None:
    patch.setitem(JOBS, "train", JOBS["train"]._replace(run=fake))


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> Iterator[Ran]:
    """Runs that only write figures; yields objective, rate and seed of each in the order they ran."""
    found: Ran = []

    def fake(config: dict[str, Any], *, progress: bool) -> None:
        name, lr, seed = config["objective"]["name"], config["optim"]["lr"], config["seed"]
        found.append((name, lr, seed))
        best = BEST[name] if seed in (8, 9) else 1e-3
        write_run(config, error=math.exp(abs(math.log(lr / best))) * (1 + seed / 100))

    train_by(monkeypatch, fake)
    yield found


def run(made: Comparison, out: Path) -> Any:
    return run_comparison(made, out, workers=0, progress=False)


def report(out: Path) -> str:
    """The report, anew, with one space for any."""
    return " ".join(write_report(out).read_text(encoding="utf-8").replace("-|", "|").split())


# the choice


def tuning_runs(root: Path, errors: dict[str, list[dict[str, Any] | str]]) -> dict[Path, Cell]:
    """Folders of runs with figures, or with an error, by point; nothing is written for an empty text."""
    found, head = {}, {"config": {"objective": {"name": "td"}, "compare": False}}
    for point, seeds in errors.items():
        for seed, what in enumerate(seeds):
            path = root / f"{point}_{seed}"
            path.mkdir(parents=True)
            if isinstance(what, str) and what:
                (path / "error.txt").write_text(what, encoding="utf-8")
            if isinstance(what, dict):
                results = json.dumps({**head, "objectives": {"td": what}})
                (path / "results.json").write_text(results, encoding="utf-8")
            found[path] = study_cell("a", "c", "s", path.name, {"seed": seed}, rate="tuning", point=point)
    return found


def chosen(root: Path, errors: dict[str, list[dict[str, Any] | str]], measure: str = "value_error") -> Any:
    return choose(tuning_runs(root, errors), measure, SIGMAS)


def value_errors(*values: float) -> dict[str, Any]:
    return {"value_error": dict(zip(SIGMAS, values, strict=True)), "seconds": 1}


def test_the_choice_is_the_least_geometric_mean(tmp_path: Path) -> None:
    errors = {"lr=1": [(1.0, 2.0, 9.0), (3.0, 1.0, 1.0)], "lr=2": [(1.0, 2.0, 3.0), (4.0, 2.0, 1.0)]}
    found = chosen(tmp_path / "a", {p: [value_errors(*e) for e in seeds] for p, seeds in errors.items()})
    assert found.point == "lr=2" and found.error is None
    for point, seeds in errors.items():
        assert found.scores[point] == pytest.approx(math.prod(map(math.prod, seeds)) ** (1 / 6))
    # at a scale of its own a level changes nothing: no level outweighs the others
    scaled = {p: [value_errors(100 * e[0], *e[1:]) for e in seeds] for p, seeds in errors.items()}
    again = chosen(tmp_path / "b", scaled)
    assert again.point == "lr=2"
    one, two = (c.scores["lr=1"] / c.scores["lr=2"] for c in (found, again))
    assert one == pytest.approx(two)


def test_what_is_not_finite_or_failed_is_worst(tmp_path: Path) -> None:
    good, diverged = value_errors(9.0, 9.0, 9.0), "NonFiniteLoss: the loss is nan\n\nTraceback"
    points = {
        "1": [good, good],
        "2": [value_errors(0, 0, 0), diverged],
        "3": [value_errors(1, math.inf, 1), good],
    }
    found = chosen(tmp_path / "a", points)
    assert found.point == "1" and found.scores == {"1": pytest.approx(9), "2": None, "3": None}
    assert found.folder == "2_1" and has_diverged(found.error)
    none = chosen(tmp_path / "b", {"1": [diverged], "2": ["OSError: full"]})
    assert none.point is None and "NonFiniteLoss: the loss is nan" in none.reason
    assert not has_diverged("OSError: full") and not has_diverged(None)


def test_there_is_no_choice_before_all_have_ended(tmp_path: Path) -> None:
    assert chosen(tmp_path, {"1": [value_errors(1, 1, 1)], "2": [""]}) is None


def test_other_measures(tmp_path: Path) -> None:
    def figures(denoising: float, distance: float) -> dict[str, Any]:
        by_nfe = {"2": distance, "9": distance}
        return {"denoising_error": {"0.5": denoising}, "sample_distance": {"by_nfe": by_nfe}}

    runs = {"1": [figures(1.0, 2.0)], "2": [figures(2.0, 1.0)]}
    for measure, point in (("denoising_error", "1"), ("sample_distance", "2"), ("value_error", None)):
        assert chosen(tmp_path / measure, runs, measure).point == point


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"scores": {"lr=1": "x"}}, "a score is no number"),
        ({"scores": None}, "cannot be read"),
        ({"point": "lr=7"}, "lr=7 is no point of its grid"),
        ({"study": "b"}, "study b is not tuned"),
    ],
)
def test_a_choice_that_cannot_be_is_damage(changes: dict[str, Any], says: str) -> None:
    entry: dict[str, Any] = {"study": "a", "case": "c", "scheme": "s", "measure": "value_error"}
    entry |= {"scores": {"lr=1": 1.0}, "point": "lr=1", "folder": None, "error": None}
    assert Choice.read(entry, {"a": ["lr=1"]}).plain == entry
    with pytest.raises(ValueError, match=f"index.json is damaged: what a scheme takes .*{says}"):
        Choice.read(entry | changes, {"a": ["lr=1"]})


@pytest.mark.parametrize(
    "figures",
    [
        {"value_error": None},
        {"value_error": {"0.1": "x"}},
        {"sample_distance": 1},
        {"sample_distance": {"by_nfe": [1]}},
    ],
)
def test_figures_that_are_no_numbers_are_damage(tmp_path: Path, figures: dict[str, Any]) -> None:
    says = r"1_0/results.json is not a run's \(its \w+ is not made of numbers\): restore"
    with pytest.raises(FileError, match=says):
        chosen(tmp_path, {"1": [figures]})


def test_real_data_are_judged_by_held_out_data() -> None:
    mixture, digits = (settings(composed(f"data={name}"), []) for name in ("gmm", "checkerboard"))
    assert measured_by("error", mixture) == "value_error"
    assert measured_by("error", digits) == "denoising_error"
    assert measured_by("samples", mixture) == "sample_distance"
    words = ("data=gmm", "objective=priorgrad", "denoiser.prior=data")  # which the oracle does not know
    assert measured_by("error", settings(composed(*words), [])) == "denoising_error"


# two stages


def test_each_scheme_takes_what_is_best_on_seeds_that_are_not_reported(tmp_path: Path, ran: Ran) -> None:
    done = run(tuned(), tmp_path)
    assert not done.failed and not done.interrupted
    first, second = ran[: 2 * 3 * 2], ran[2 * 3 * 2 :]
    assert {seed for _, _, seed in first} == {8, 9} and {seed for _, _, seed in second} == {0, 1}
    assert sorted(set(first)) == sorted((name, lr, s) for name in BEST for lr in RATES for s in (8, 9))
    # what is reported first comes first; TD takes the plan's own rate, which is one run for both tables
    assert second == [("monte_carlo", 4e-3, 0), ("monte_carlo", 4e-3, 1), ("td", 2e-3, 0), ("td", 2e-3, 1),
                      ("monte_carlo", 2e-3, 0), ("monte_carlo", 2e-3, 1)]  # fmt: skip
    assert (done.finished, done.total) == (18, 18)
    findings = StudyFindings(tmp_path)
    assert [(c.scheme, c.point, c.measure) for c in findings.tuning] == [
        ("MC", "lr=4e-3", "value_error"), ("TD", "lr=2e-3", "value_error"),
    ]  # fmt: skip
    fixed, best = ({c.path for c in findings.finished(scheme="TD", rate=rate)} for rate in ("fixed", "tuned"))
    assert fixed == best and len(fixed) == 2
    ran.clear()
    assert run(tuned(), tmp_path).finished == 18 and ran == []
    assert len(StudyFindings(tmp_path).commands) == 3  # two stages, then none but the second


def test_each_scheme_of_a_case_is_judged_by_what_it_has(
    tmp_path: Path, ran: Ran, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(BEST, "priorgrad", 1e-3)
    schemes = {"MC": MC, "PG": ["objective=priorgrad", "denoiser.prior=data"]}
    assert not run(tuned(on=(8,), grid="1e-3,4e-3", seeds=[0], schemes=schemes), tmp_path).failed
    found = [(choice.scheme, choice.measure) for choice in StudyFindings(tmp_path).tuning]
    assert found == [("MC", "value_error"), ("PG", "denoising_error")]


def test_studies_are_tuned_when_they_are_asked_for(tmp_path: Path, ran: Ran) -> None:
    studies = {
        "a": study(schemes={"MC": MC}),
        "b": study(schemes={"TD": TD}, baseline="TD"),
        "c": study(tuning={"enabled": False}),
    }
    tuning = {"grid": {"lr": "optim.lr=1e-3,4e-3"}, "seeds": [8], "by": "error"}
    made = plan_comparison(plan(**studies) | {"tuning": tuning})
    run_comparison(made, tmp_path, studies=["b"], workers=0, progress=False)
    assert {name for name, _, _ in ran} == {"td"}
    assert [c.study for c in StudyFindings(tmp_path).tuning] == ["b"]
    run_comparison(made, tmp_path, studies=["a"], workers=0, progress=False)
    findings = StudyFindings(tmp_path)
    assert [c.study for c in findings.tuning] == ["a", "b"]
    assert len(findings.finished(study="b", rate="tuned")) == 2  # what was run before stays in the index
    run_comparison(made, tmp_path, studies=["c"], workers=0, progress=False)
    rates = {panel.study.name: panel.rate for panel in StudyFindings(tmp_path).panels()}
    assert rates == {"a": "tuned", "b": "tuned", "c": "fixed"}


def test_an_interruption_in_either_stage_continues_to_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = tuned(on=(8,), grid="1e-3,4e-3", seeds=[0])
    run(made, tmp_path / "whole")
    job, begun = JOBS["train"], list[str]()

    def stopped(config: dict[str, Any], *, progress: bool) -> None:
        begun.append(config["run_dir"])
        if len(begun) == 2:
            signal.raise_signal(signal.SIGTERM)
            raise Interrupted
        job.run(config, progress=progress)

    train_by(monkeypatch, stopped)
    rates = []
    for _ in range(12):
        begun.clear()
        done = run(made, tmp_path / "stopped")
        rates.append({c.where["rate"] for c in StudyFindings(tmp_path / "stopped").cells})
        write_report(tmp_path / "stopped")
        if not done.interrupted:
            break
    assert not done.interrupted and (done.finished, done.total) == (len(results(tmp_path / "whole")),) * 2
    assert "tuned" not in rates[0] and "tuned" in rates[-1]
    assert results(tmp_path / "stopped") == results(tmp_path / "whole")
    places = [[c.where for c in StudyFindings(tmp_path / which).cells] for which in ("whole", "stopped")]
    assert places[0] == places[1]


def test_a_candidate_that_diverges_is_worst_and_fails_nothing(tmp_path: Path) -> None:
    made = tuned(on=(8,), grid="1e-3,1e30", schemes={"MC": MC})
    done = run(made, tmp_path)
    assert not done.failed and done.finished == done.total == 2 + 2 + 2
    [choice] = StudyFindings(tmp_path).tuning
    assert choice.point == "lr=1e-3" and choice.scores["lr=1e30"] is None and has_diverged(choice.error)
    text = report(tmp_path)
    assert "2 of them are runs of tuning, of which 1 diverged" in text and "| diverged" in text
    assert "Cells without a result" not in text
    with pytest.MonkeyPatch.context() as patch:
        train_by(patch, lambda *_, **__: pytest.fail("it was run"))
        assert run(made, tmp_path).finished == 6


def test_a_scheme_that_no_candidate_trains_is_reported_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fake(config: dict[str, Any], *, progress: bool) -> None:
        if config["objective"]["name"] == "td" and config["seed"] == 8:
            raise NonFiniteLoss("the loss is nan")
        write_run(config, error=1.0)

    train_by(monkeypatch, fake)
    done = run(tuned(on=(8,)), tmp_path)
    assert list(done.failed) == ["tiny, TD, tuned, seed 0", "tiny, TD, tuned, seed 1"]
    assert all("NonFiniteLoss: the loss is nan" in error for error in done.failed.values())
    assert done.total - done.finished == 2
    text = report(tmp_path)
    assert "| a | tiny | TD, tuned | 0, 1 | failed |" in text
    assert "| TD | none | diverged | diverged |" in text
    rows = json.loads((tmp_path / "summary.json").read_text(encoding="utf-8"))["cells"]
    assert [(r["rate"], r["status"]) for r in rows if r["scheme"] == "TD" and r["rate"] != "tuning"] == [
        ("fixed", "finished"), ("fixed", "finished"), ("tuned", "failed"), ("tuned", "failed"),
    ]  # fmt: skip


def test_other_failures_are_told_and_run_again(
    tmp_path: Path, ran: Ran, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = JOBS["train"].run

    def full(config: dict[str, Any], *, progress: bool) -> None:
        if config["seed"] == 9 and config["optim"]["lr"] == 4e-3:
            raise OSError("no space is left")
        good(config, progress=progress)

    train_by(monkeypatch, full)
    done = run(tuned(), tmp_path)
    assert list(done.failed) == ["tiny, MC, lr=4e-3, seed 9", "tiny, TD, lr=4e-3, seed 9"]
    assert [c.point for c in StudyFindings(tmp_path).tuning] == ["lr=2e-3", "lr=2e-3"]
    train_by(monkeypatch, good)
    assert not run(tuned(), tmp_path).failed
    assert [c.point for c in StudyFindings(tmp_path).tuning] == ["lr=4e-3", "lr=2e-3"]


def test_the_first_estimate_counts_both_stages(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = tuned(on=(8,), grid="1e-3,4e-3", schemes={"MC": MC})
    run_comparison(made, tmp_path, workers=0)
    lines = [line for line in capsys.readouterr().out.splitlines() if " left, " in line]
    assert lines[0].startswith("at most 6 runs left, ") and lines[1].startswith("4 runs left, ")
    assert "finished runs of 1 kind" in lines[1]


# the report


def test_the_report_has_both_tables_and_says_what_was_chosen(tmp_path: Path, ran: Ran) -> None:
    run(tuned(), tmp_path)
    text = report(tmp_path)
    assert "18 of 18 cells are finished. 12 of them are runs of tuning, of which 0 diverged." in text
    assert "Tuned at seeds 8, 9" in text
    assert "on other data than is reported (data.mixture_seed differs)" in text
    assert "It took 12 runs on top of what the tables count: 72 gradient steps, 6 seconds" in text
    assert "At an end of the grid, so that a better value may lie beyond: MC (lr)." in text
    assert "| MC | 4e-3 | 4.00 | 2.00 | **1.00** |" in text
    assert "| TD | 2e-3 | 2.00 | **1.00** | 2.00 |" in text
    assert "Each scheme at its own optim.lr, chosen at seeds 8, 9." in text
    assert "#### a, tiny, at a fixed rate All schemes at optim.lr = 0.002." in text
    # at seeds that are reported the least error is at 1e-3: MC at 4e-3 errs by 4, TD at 2e-3 by 2
    assert "| a | tiny | value error, mean | tuned | TD | 0.50" in text
    assert "| a | tiny | value error, mean | fixed | MC | 1 (the baseline) |" in text

    summary = json.loads((tmp_path / "summary.json").read_text(encoding="utf-8"))
    found = [e for e in summary["estimates"] if e["kind"] == "score"]
    ratios = {(e["scheme"], e["rate"]): e["ratio"]["iqm"] for e in found}
    wanted = {("MC", "tuned"): 1, ("TD", "tuned"): 0.5, ("MC", "fixed"): 1, ("TD", "fixed"): 1}
    assert ratios == pytest.approx(wanted)
    assert {e["rate"] for e in summary["efforts"]} == {"tuned", "fixed"}
    assert [Choice(**entry).point for entry in summary["tuning"]] == ["lr=4e-3", "lr=2e-3"]
    with (tmp_path / "summary.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert {(r["rate"], r["point"]) for r in rows if r["scheme"] == "MC"} == {
        ("fixed", ""), ("tuned", "lr=4e-3"), *(("tuning", f"lr={lr}") for lr in ("1e-3", "2e-3", "4e-3")),
    }  # fmt: skip


def test_the_report_says_when_the_data_are_the_same(tmp_path: Path, ran: Ran) -> None:
    run(tuned(overrides=["data.mixture_seed=3"]), tmp_path)
    says = "on the same data, a mixture of 3 Gaussians in 2-D: only weights, batches and noise are others"
    assert says in report(tmp_path)


def of_0_3(out: Path) -> None:
    """Write the index as it was before there was tuning."""
    index = json.loads((out / "index.json").read_text(encoding="utf-8"))
    del index["tuning"]
    for entry in index["studies"]:
        del entry["tuning"]
    for entry in index["cells"]:
        del entry["rate"], entry["point"]
    (out / "index.json").write_text(json.dumps(index), encoding="utf-8")


def test_folders_of_old_are_reported_and_continued(tmp_path: Path, ran: Ran) -> None:
    run(tuned(tuning={"enabled": False}), tmp_path)
    text, summary = write_report(tmp_path).read_bytes(), (tmp_path / "summary.json").read_bytes()
    of_0_3(tmp_path)
    assert write_report(tmp_path).read_bytes() == text and b"fixed rate" not in text
    assert (tmp_path / "summary.json").read_bytes() == summary
    ran.clear()
    run(tuned(), tmp_path)
    assert ("td", 2e-3, 0) not in ran and len(ran) == 12 + 2  # the fixed cells are those that were there
    [panel] = StudyFindings(tmp_path).panels()
    assert panel.rate == "tuned"


def test_before_anything_is_tuned_the_fixed_table_is_shown(
    tmp_path: Path, ran: Ran, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tuned(tuning={"enabled": False}), tmp_path)

    def stop(config: dict[str, Any], *, progress: bool) -> None:
        raise Interrupted

    train_by(monkeypatch, stop)
    assert run(tuned(), tmp_path).interrupted
    text = report(tmp_path)
    assert "No scheme is tuned yet: its runs are not finished." in text and "Value error, × baseline" in text
    assert "All schemes at optim.lr = 0.002." in text
