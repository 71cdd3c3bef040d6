"""Plans become cells, cells become run folders: once each, resumed, failures listed, changes refused."""

import json
import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

from diffrl.configs.cells import plan_comparison
from diffrl.configs.grids import read_grid
from diffrl.configs.groups import register
from diffrl.experiments.comparison import JOBS, PLACE, Cell, Execution, run_cells
from diffrl.experiments.method_findings import MethodFindings
from diffrl.experiments.run import Interrupted
from diffrl.experiments.studies import Comparison, Study, run_comparison, study_cell
from diffrl.training.runs import RunFolderError
from tests.kit.configs import MC, TD, TINY
from tests.kit.paths import EXAMPLES, ROOT
from tests.kit.shell import Shell

CLOCKS = ("seconds", "forward_equivalents")


def study(**changes: Any) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "title": "which",
        "cases": ["tiny"],
        "schemes": {"MC": MC, "TD": TD},
        "axes": {},
    }
    return {**fields, "baseline": "MC", "matched": "grad_steps", "overrides": [], "seeds": [0, 1], **changes}


def plan(**studies: dict[str, Any]) -> dict[str, Any]:
    cases = {"tiny": [*TINY, "data.mixture_seed=10{seed}"]}
    return {
        "name": "p",
        "data_dir": "data",
        "score_sigmas": [0.1, 0.3, 1.0],
        "cases": cases,
        "studies": studies,
    }


@pytest.fixture(autouse=True)
def groups() -> None:
    register()


def results(out: Path) -> dict[str, Any]:
    """Figures of each finished cell but for its clocks, by folder."""
    found = {}
    for file in (out / "cells").glob("*/results.json"):
        [figures] = json.loads(file.read_text(encoding="utf-8"))["objectives"].values()
        found[file.parent.name] = {k: v for k, v in figures.items() if k not in CLOCKS}
    return found


# plans


def test_cells_are_the_product_and_follow_the_seed() -> None:
    cells = plan_comparison(plan(a=study())).cells
    assert [(*c.names, c.where["seed"]) for c in cells] == [
        ("tiny", "MC", 0), ("tiny", "MC", 1), ("tiny", "TD", 0), ("tiny", "TD", 1),
    ]  # fmt: skip
    assert [c.config["data"]["mixture_seed"] for c in cells] == [100, 101, 100, 101]
    assert [c.config["seed"] for c in cells] == [0, 1, 0, 1]
    assert [c.config["objective"]["name"] for c in cells] == ["monte_carlo"] * 2 + ["td"] * 2
    assert not any(c.config["compare"] for c in cells) and len({c.identity for c in cells}) == 4


def test_configurations_are_what_the_command_line_would_give() -> None:
    words = [
        "data=digits",
        "eval.num_steps=[2,9]",
        "dtype=float64",
        "optim.betas=[0.5,0.9]",
        "chain.t_max=null",
    ]
    words += ["run_dir='a b'", "objective.denoising_coef=1", "trainer.grad_steps=7"]
    schemes = {"MC": [*MC, *words[:1], "network=unet"], "x": words}
    cell = plan_comparison(plan(a=study(schemes=schemes, seeds=[3])) | {"cases": {"tiny": []}}).cells[1]
    with initialize_config_module("diffrl.configs", version_base="1.3"):
        whole = OmegaConf.to_container(compose("train", [*words, "seed=3", "compare=false"]), resolve=True)
    assert isinstance(whole, dict)
    assert cell.config == {k: v for k, v in whole.items() if k not in PLACE}


def test_a_grid_is_the_product_of_its_axes_after_the_named_schemes() -> None:
    axes = {"λ": "objective.lmbda=0, 1", "η": "chain.coupling=0.0,0.5"}
    made = plan_comparison(plan(a=study(schemes={"MC": MC}, axes=axes, seeds=[0])))
    grid = ("λ=0, η=0.0", "λ=0, η=0.5", "λ=1, η=0.0", "λ=1, η=0.5")
    assert made.studies[0].schemes == ("MC", *grid)
    assert made.studies[0].axes == {"λ": ("0", "1"), "η": ("0.0", "0.5")}
    assert [(c.config["objective"]["lmbda"], c.config["chain"]["coupling"]) for c in made.cells[1:]] == [
        (0.0, 0.0), (0.0, 0.5), (1.0, 0.0), (1.0, 0.5),
    ]  # fmt: skip
    assert made.cells[2].folder == f"tiny_lambda=0-eta=0.5_s0_{made.cells[2].identity}"


def test_identity_is_what_deviates_from_the_defaults() -> None:
    schemes = {"MC": MC, "TD": TD}
    schemes |= {"spelled out": [*TD, "objective.gamma=1.0"], "other": [*TD, "objective.gamma=0.9"]}
    _, td, spelled_out, other = plan_comparison(plan(a=study(schemes=schemes, seeds=[0]))).cells
    assert td.identity == spelled_out.identity != other.identity


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schemes": {"MC": MC, "x": ["objective.lmda=0"]}}, "case tiny, scheme x: .*objective.lmda.*lmbda"),
        ({"schemes": {"MC": MC, "x": ["objective.lmbda=much"]}}, "case tiny, scheme x: objective.lmbda"),
        ({"schemes": {"MC": MC, "x": ["objective=tdd"]}}, "study a, case tiny, scheme x: .*objective/tdd"),
        ({"cases": ["tony"]}, "study a: no case 'tony' in the plan: there are tiny"),
        ({"baseline": "Monte"}, "study a: the baseline 'Monte' is none of its schemes: MC; TD"),
        ({"matched": "steps"}, "study a: matched is 'steps': give one of grad_steps"),
        ({"axes": {"λ": "objective.lmbda"}}, "study a: axis λ is 'objective.lmbda': write key=value,value"),
        ({"axes": {"λ": "objective.lmbda=0,,1"}}, "study a: axis λ"),
        ({"schemes": {"MC": [*MC, "+beside.x.objective.lmbda=0"]}}, "case tiny, scheme MC: beside is for one run"),
        ({"overrides": ["eval.sigmas=[0.1,1]"]}, "score_sigmas has 0.3, which no cell measures: eval.sigmas is 0.1, 1"),
        ({"seeds": []}, "study a has no seed"),
        ({"cases": []}, "study a has no case"),
        ({"cases": ["tiny", "tiny"]}, "study a: cases has tiny twice: give it once"),
    ],
)  # fmt: skip
def test_a_mistake_in_a_plan_is_one_clear_line(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        plan_comparison(plan(a=study(**changes)))
    assert "\n" not in str(caught.value)


def test_a_score_is_the_mean_over_something() -> None:
    with pytest.raises(ValueError, match="score_sigmas is empty: give at least one noise level"):
        plan_comparison(plan(a=study()) | {"score_sigmas": []})


PLANS = sorted(path.stem for path in (ROOT / "configs" / "plan").glob("*.yaml"))


def of_one_seed(name: str) -> dict[str, Any]:
    """A plan of the library's, with one seed of each study and of tuning."""
    with initialize_config_module("diffrl.configs", version_base="1.3"):
        config = OmegaConf.to_container(
            compose("compare", [f"plan={name}"]), resolve=True, throw_on_missing=True
        )
    assert isinstance(config, dict) and config["plan"]["name"] == name
    assert config["out"] == f"runs/compare_{name}"
    config["plan"]["tuning"]["seeds"] = [101]
    studies = {k: {**s, "seeds": s["seeds"][:1]} for k, s in config["plan"]["studies"].items()}
    return {**config["plan"], "studies": studies}


def check_plan(plan: dict[str, Any]) -> None:
    """All its cells compose, and there are as many as it says."""
    made = plan_comparison(plan)
    reported = [s for s in made.studies if s.tuning is None or plan["tuning"]["beside"]]
    assert len(made.cells) == sum(len(s.cases) * len(s.schemes) for s in reported)
    tuned = [(len(s.cases) * len(s.schemes), s.tuning) for s in made.studies if s.tuning is not None]
    assert len(made.tuning) == sum(n * len(t.grid.points) * len(t.seeds) for n, t in tuned)
    assert (len(made.tuning) > 0) == plan["tuning"]["enabled"]
    assert all(len(t.grid.points) >= 4 for _, t in tuned)


def baseline_alone(study: dict[str, Any]) -> dict[str, Any]:
    """What makes a study one of its baseline; of a grid, of the baseline's point."""
    if study["baseline"] in study["schemes"]:
        return {"schemes": {study["baseline"]: study["schemes"][study["baseline"]]}, "axes": {}}
    grid = read_grid(study["axes"], "")
    return {"schemes": {study["baseline"]: grid.words(study["baseline"])}, "axes": {}}


@pytest.mark.parametrize("name", PLANS)
def test_plans_that_come_with_the_library_compose(name: str) -> None:
    """Every scheme on a case, and a scheme on every case; a soak composes the rest."""
    plan = of_one_seed(name)
    of_a_case = {k: {**s, "cases": s["cases"][:1]} for k, s in plan["studies"].items()}
    check_plan({**plan, "studies": of_a_case})
    of_a_scheme = {k: {**s, **baseline_alone(s)} for k, s in plan["studies"].items() if len(s["cases"]) > 1}
    if of_a_scheme:
        plan_comparison({**plan, "studies": of_a_scheme})


@pytest.mark.soak
@pytest.mark.parametrize("name", PLANS)
def test_plans_that_come_with_the_library_compose_whole(name: str) -> None:
    check_plan(of_one_seed(name))


# execution


def test_cells_run_once_and_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    both = plan_comparison(plan(a=study(), b=study(schemes={"Monte Carlo": MC}, baseline="Monte Carlo")))
    assert len(both.cells) == 6
    done = run_comparison(both, tmp_path, studies=["b"], workers=0, progress=False)
    assert (done.finished, done.total, dict(done.failed), done.interrupted) == (2, 2, {}, False)
    done = run_comparison(both, tmp_path, workers=0, progress=False)
    assert (done.finished, done.total) == (4, 4) and len(results(tmp_path)) == 4
    monkeypatch.setitem(JOBS, "train", JOBS["train"]._replace(run=lambda *_, **__: pytest.fail("it was run")))
    assert run_comparison(both, tmp_path, workers=0, progress=False).finished == 4

    index = json.loads((tmp_path / "index.json").read_text(encoding="utf-8"))
    assert [command["cells"] for command in index["commands"]] == [2, 2, 0]
    folders = {(c["study"], c["scheme"], c["seed"]): c["folder"] for c in index["cells"]}
    assert folders["a", "MC", 1] == folders["b", "Monte Carlo", 1] != folders["a", "TD", 1]
    with pytest.raises(ValueError, match="no study 'c' in plan p: there are a, b"):
        run_comparison(both, tmp_path, studies=["c"], workers=0)


def test_workers_do_what_this_process_does(tmp_path: Path) -> None:
    made = plan_comparison(plan(a=study(seeds=[0])))
    run_comparison(made, tmp_path / "here", workers=0, progress=False)
    done = run_comparison(made, tmp_path / "workers", workers=1, progress=False)
    assert done.finished == 2 and results(tmp_path / "here") == results(tmp_path / "workers")


def test_a_failed_cell_is_listed_sinks_no_other_and_runs_again(tmp_path: Path) -> None:
    broken = plan_comparison(plan(a=study(schemes={"MC": MC, "wild": [*TD, "optim.lr=1e30"]}, seeds=[0])))
    done = run_comparison(broken, tmp_path, workers=0, progress=False)
    assert (done.finished, done.total) == (1, 2)
    assert (
        list(done.failed) == ["tiny, wild, seed 0"] and "NonFiniteLoss" in done.failed["tiny, wild, seed 0"]
    )
    [file] = (tmp_path / "cells").glob("*/error.txt")
    assert "Traceback" in file.read_text(encoding="utf-8")
    again = run_comparison(broken, tmp_path, workers=0, progress=False)
    assert again.failed.keys() == done.failed.keys() and again.finished == 1


def test_an_interrupted_cell_continues_to_the_same_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = plan_comparison(plan(a=study()))
    run_comparison(made, tmp_path / "whole", workers=0, progress=False)
    job = JOBS["train"]

    def stopped(config: dict[str, Any], *, progress: bool) -> None:
        from diffrl.training.trainer import Trainer

        step = Trainer._advance

        def step_and_stop(self: Trainer) -> Any:
            if self.step == 3:
                signal.raise_signal(signal.SIGTERM)
            return step(self)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Trainer, "_advance", step_and_stop)
            with pytest.raises(Interrupted):
                job.run(config, progress=progress)
        raise Interrupted

    monkeypatch.setitem(JOBS, "train", job._replace(run=stopped))
    done = run_comparison(made, tmp_path / "stopped", workers=0, progress=False)
    assert done.interrupted and done.finished == 0 and not results(tmp_path / "stopped")
    assert list((tmp_path / "stopped" / "cells").glob("*/checkpoints/*/step_*"))
    monkeypatch.undo()
    done = run_comparison(made, tmp_path / "stopped", workers=0, progress=False)
    assert done.finished == 4 and results(tmp_path / "stopped") == results(tmp_path / "whole")


def test_a_folder_with_another_configuration_is_refused(tmp_path: Path) -> None:
    made = plan_comparison(plan(a=study(seeds=[0])))
    run_comparison(made, tmp_path, workers=0, progress=False)
    [file, *_] = sorted((tmp_path / "cells").glob("*TD*/config.yaml"))
    file.write_text(file.read_text(encoding="utf-8").replace("gamma: 1.0", "gamma: 0.5"), encoding="utf-8")
    with pytest.raises(RunFolderError, match=r"objective.gamma=0.5, but now it is 1.0: delete that folder"):
        run_comparison(made, tmp_path, workers=0, progress=False)
    file.write_text(
        file.read_text(encoding="utf-8").replace("  gamma: 0.5\n", "  gone: 3\n"), encoding="utf-8"
    )  # options come and go
    assert run_comparison(made, tmp_path, workers=0, progress=False).finished == 2


def test_another_kind_of_comparison_is_refused(tmp_path: Path) -> None:
    made = plan_comparison(plan(a=study(seeds=[0], schemes={"MC": MC})))
    run_comparison(made, tmp_path, workers=0, progress=False)
    before = (tmp_path / "index.json").read_bytes()
    tuned = Cell(
        "finetune", {"method": "m", "seed": 0}, ("m",), "abc", {"seed": 0, "loop": {"iterations": 1}}
    )
    said = "another kind of comparison, with one run for each study, case, scheme, rate, point, seed and not"
    with pytest.raises(RunFolderError, match=said):
        run_cells([tuned], tmp_path, workers=0, progress=False)
    assert (tmp_path / "index.json").read_bytes() == before
    with pytest.raises(RunFolderError, match=said):
        MethodFindings(tmp_path)


def test_no_cell_is_no_run(tmp_path: Path) -> None:
    assert run_cells([], tmp_path, workers=1, progress=False) == Execution(0, 0, {}, False)


def test_identities_of_training_cells_stay() -> None:
    """Folders that users have must be found again: a change here makes all their cells run anew."""
    cells = plan_comparison(plan(a=study())).cells
    assert [cell.folder for cell in cells] == [
        "tiny_MC_s0_2ac10fe8e0", "tiny_MC_s1_aa052642d9", "tiny_TD_s0_2315a4e585", "tiny_TD_s1_72dceae3ca",
    ]  # fmt: skip


def test_cells_can_be_made_by_hand() -> None:
    one = Study("a", "which", "MC", "grad_steps", ("tiny",), ("MC",), (0,))
    cell = study_cell("a", "tiny", "MC (λ=1)", "abc", {"seed": 0})
    assert cell.folder == "tiny_MC-lambda=1_s0_abc" and cell.label == "tiny, MC (λ=1), seed 0"
    assert Comparison("p", ("0.1",), (one,), (cell,)).studies[0].axes == {}


# the command


SCRIPT = EXAMPLES / "compare_bootstrapping.py"


def command(*words: str, **options: Any) -> subprocess.Popen[str]:
    script = [sys.executable, str(SCRIPT), *words]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        script, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options
    )


def wait_for_checkpoint(out: Path, running: subprocess.Popen[str]) -> None:
    end = time.monotonic() + 120
    while not list(out.glob("cells/*/checkpoints/*/step_*/manifest.json")):
        assert running.poll() is None, running.communicate()[0]
        assert time.monotonic() < end, "no checkpoint came"
        time.sleep(0.02)


@pytest.mark.parametrize(
    "number",
    [
        pytest.param(signal.SIGINT, marks=pytest.mark.slow),
        pytest.param(
            signal.SIGKILL, marks=pytest.mark.soak
        ),  # tests/soak/test_kills.py kills comparisons too
    ],
)
def test_a_stopped_command_continues(tmp_path: Path, number: signal.Signals, shell: Shell) -> None:
    long = [*TINY, "trainer.grad_steps=150", "trainer.eval_every=50", "trainer.checkpoint_every=25"]
    cases = "plan.cases.gmm16=[" + ",".join(f"'{word}'" for word in long) + "]"
    words = ["plan=quick", "studies=[map]", "plan.studies.map.seeds=[0]", cases]
    running = command(*words, f"out={tmp_path / 'stopped'}")
    wait_for_checkpoint(tmp_path / "stopped", running)
    running.send_signal(number)
    said, _ = running.communicate(timeout=120)
    if number == signal.SIGINT:
        assert running.returncode != 0 and "interrupted: the same command continues" in said
        assert "Traceback" not in said and (tmp_path / "stopped" / "report.md").exists()
    assert len(results(tmp_path / "stopped")) < 6
    for out in ("stopped", "whole"):
        said = shell(str(SCRIPT), *words, f"out={tmp_path / out}", "workers=0", folder=ROOT)
        assert "6 of 6 cells are finished" in said
    assert results(tmp_path / "stopped") == results(tmp_path / "whole")


def processor_seconds() -> float:
    """Of all processes that this one started and that have ended: unlike a clock, blind to what else runs."""
    times = os.times()
    return times.children_user + times.children_system


@pytest.mark.soak
def test_the_quick_plan_takes_less_than_three_minutes_of_two_cores(tmp_path: Path) -> None:
    begun = processor_seconds()
    said, _ = (running := command("plan=quick", f"out={tmp_path}")).communicate(timeout=280)
    assert running.returncode == 0, said
    assert processor_seconds() - begun < 2 * 180
    report = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "cells are finished" in report and "32 of them are runs of tuning" in report
    assert "at a fixed rate" in report and "Cells without a result" not in report
    for image in (part.partition(")")[0] for part in report.split("](")[1:]):
        assert (tmp_path / image).stat().st_size > 10_000
    (tmp_path / "report.md").unlink()
    said, _ = (running := command("report=true", f"out={tmp_path}")).communicate(timeout=250)
    assert running.returncode == 0 and (tmp_path / "report.md").read_text(encoding="utf-8") == report


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["plan=quik"], "Could not find 'plan/quik'"),
        (["plan=quick", "plan.studies.map.baselin=x"], "unknown config key 'plan.studies.map.baselin'"),
        (["plan=quick", "studies=[maps]"], "no study 'maps' in plan quick: there are map, schemes"),
        (["report=true"], "holds no comparison: there is no index.json in it"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], message: str
) -> None:
    monkeypatch.setattr(sys, "argv", ["compare_bootstrapping.py", *words, f"out={tmp_path}"])
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    said = str(caught.value)
    assert said.startswith("error: ") and message in said and "\n" not in said


@pytest.mark.slow
def test_multirun_with_joblib_gives_each_job_a_folder(tmp_path: Path, shell: Shell) -> None:
    words = ["-m", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "seed=0,1", "compare=false", *TINY]
    words.append(f"hydra.sweep.dir={tmp_path}/sweep")
    shell(str(EXAMPLES / "train_td_lambda.py"), *words, folder=tmp_path)
    seeds = [
        json.loads(file.read_text(encoding="utf-8"))["seed"] for file in tmp_path.glob("runs/*/results.json")
    ]
    assert sorted(seeds) == [0, 1]


@pytest.mark.slow
def test_multirun_with_joblib_shares_studies_out(tmp_path: Path, shell: Shell) -> None:
    words = ["-m", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]
    words += ["plan=quick", "studies=[map],[schemes]", "plan.tuning.enabled=false"]
    words += ["out=${hydra:job.num}", "workers=0", f"hydra.sweep.dir={tmp_path}/sweep"]
    words += ["plan.studies.map.seeds=[0]", "plan.studies.schemes.seeds=[0]"]
    tiny = ",".join(f"'{word}'" for word in TINY)
    words += [f"plan.cases.{case}=[{tiny}]" for case in ("gmm16", "rings")]
    shell(str(SCRIPT), *words, folder=tmp_path)
    for job, cells in (("0", 6), ("1", 4)):
        assert len(results(tmp_path / job)) == cells and (tmp_path / job / "report.md").exists()
