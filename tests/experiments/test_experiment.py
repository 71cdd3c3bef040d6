"""A whole run: its folder, what the objectives share, interruption of every kind."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor

import diffrl
from diffrl.experiments import train as experiment
from diffrl.experiments.run import Interrupted
from diffrl.experiments.train import run_experiment
from diffrl.objectives.scheme import Objective, build_objective
from diffrl.objectives.td_edm import sample_td_edm_pairs
from diffrl.training.build import build_data, build_denoiser
from diffrl.training.checkpoints import latest_checkpoint, list_checkpoints
from diffrl.training.runs import RunFolder, RunFolderError
from diffrl.training.trainer import Trainer
from tests.kit.configs import small
from tests.kit.paths import ROOT
from tests.kit.runs import checkpoint, run


def rows(folder: RunFolder) -> list[dict[str, str]]:
    """metrics.csv without its clock."""
    with (folder.path / "metrics.csv").open(newline="", encoding="utf-8") as file:
        return [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)]


def results(folder: RunFolder) -> dict[str, Any]:
    found = folder.results()
    for figures in found["objectives"].values():
        del figures["seconds"], figures["forward_equivalents"]
    del found["config"]["run_dir"]
    return found


def assert_same_run(a: RunFolder, b: RunFolder) -> None:
    assert rows(a) == rows(b)
    assert results(a) == results(b)
    for objective in results(a)["objectives"]:
        one, two = checkpoint(a, objective), checkpoint(b, objective)
        assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


# What a run leaves


def test_folder(whole: RunFolder) -> None:
    names = {path.name for path in whole.path.iterdir()}
    assert names == {
        ".lock",
        "config.yaml",
        "versions.json",
        "command.txt",
        "metrics.csv",
        "results.json",
        "checkpoints",
        "samples",
    }
    assert (
        json.loads((whole.path / "versions.json").read_text(encoding="utf-8"))["torch"] == torch.__version__
    )
    assert [path.name for path in list_checkpoints(whole.checkpoints("td"))] == ["step_000020", "step_000030"]


def test_results_are_as_documented(whole: RunFolder) -> None:
    found = json.loads((whole.path / "results.json").read_text(encoding="utf-8"))
    assert found.keys() == {"config", "seed", "versions", "objectives"}
    assert list(found["objectives"]) == ["td", "monte_carlo"] and found["seed"] == 0
    for figures in found["objectives"].values():
        assert figures.keys() == {
            "grad_steps",
            "samples",
            "network_evaluations",
            "seconds",
            "forward_equivalents",
            "value_error",
            "denoising_error",
            "sample_distance",
        }
        assert figures["grad_steps"] == 30 and list(figures["value_error"]) == ["0.3", "1"]
        assert figures["sample_distance"]["metric"] == "sliced_w2@40_seed2718281"
        assert list(figures["sample_distance"]["by_nfe"]) == ["3", "7"]  # Heun: 2 N - 1
    assert found["config"] == whole.config()
    td, mc = found["objectives"].values()
    # the target network sees each state but the first of a chain again
    assert 0 < mc["network_evaluations"] < td["network_evaluations"] < 2 * mc["network_evaluations"]


def test_metrics_are_one_table(whole: RunFolder) -> None:
    table = rows(whole)
    for objective in ("td", "monte_carlo"):
        steps = [int(row["grad_steps"]) for row in table if row["objective"] == objective]
        assert steps == sorted({0, *range(4, 31, 4), 10, 20, 30})
    assert {len(row) for row in table} == {len(table[0])}
    looked = [row for row in table if row["value_error_1"]]
    assert [int(row["grad_steps"]) for row in looked] == 2 * [0, 10, 20, 30]
    last = float(looked[3]["value_error_0.3"])
    assert last == whole.results()["objectives"]["td"]["value_error"]["0.3"]


def test_same_configuration_same_run(whole: RunFolder, tmp_path: Path) -> None:
    assert_same_run(whole, run(tmp_path / "again"))


def test_another_seed_another_run(whole: RunFolder, tmp_path: Path) -> None:
    other = run(tmp_path / "other", "seed=1")
    assert rows(other) != rows(whole)


# What the two objectives share


def recorded(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Tensor]]:
    """What each objective draws: once as it is tried, then at every step."""
    seen: dict[str, list[Tensor]] = {}

    def build(config: dict[str, Any], denoiser: diffrl.Denoiser, **more: Any) -> Objective:
        objective = build_objective(config, denoiser, **more)

        def draw(x0: Tensor, **more: Any) -> TensorDict:
            states = objective.draw(x0, **more)
            seen.setdefault(objective.name, []).append(states["x_t"].clone())
            return states

        return replace(objective, draw=draw)

    monkeypatch.setattr(experiment, "build_objective", build)
    return seen


@pytest.mark.parametrize("objective", ["td", "td_edm"])
def test_both_objectives_see_the_same_states(
    objective: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = recorded(monkeypatch)
    folder = run(tmp_path / "run", f"objective={objective}", "trainer.grad_steps=5")
    assert set(seen) == {objective, "monte_carlo"} == set(folder.results()["objectives"])
    assert (
        min(len(seen[objective]), len(seen["monte_carlo"])) >= 6
    )  # what a step costs is measured on further ones
    assert all(map(torch.equal, seen[objective][:6], seen["monte_carlo"][:6]))
    assert not torch.equal(seen[objective][1], seen[objective][2])


def test_both_objectives_start_from_the_same_weights(whole: RunFolder) -> None:
    starts = [row for row in rows(whole) if row["grad_steps"] == "0"]
    assert starts[0].pop("objective") == "td" and starts[1].pop("objective") == "monte_carlo"
    assert starts[0] == starts[1]


def test_a_target_network_is_counted(tmp_path: Path) -> None:
    found = run(tmp_path / "run", "objective.bootstrap=target", "chain.jitter=false").results()["objectives"]
    assert found["td"]["network_evaluations"] == 30 * 8 * (6 + 5)  # the clean state needs no value
    assert found["monte_carlo"]["network_evaluations"] == 30 * 8 * 6


@pytest.mark.parametrize("override", ["objective=monte_carlo", "compare=false"])
def test_one_objective_alone(override: str, tmp_path: Path) -> None:
    assert len(run(tmp_path / "run", override).results()["objectives"]) == 1


def test_td_edm_beside_monte_carlo_is_edm_on_the_same_pairs() -> None:
    """The pairs' Monte Carlo loss is EDM's weighted denoising loss, invalid pairs included."""
    config = small("objective=td_edm")
    denoiser = build_denoiser(config, build_data(config))
    baseline = build_objective(config, denoiser, baseline=True)
    x0 = torch.randn(500, 2, generator=torch.Generator().manual_seed(0))
    pairs = sample_td_edm_pairs(denoiser.process, x0, generator=torch.Generator().manual_seed(1))
    drawn = baseline.draw(x0, cond=None, generator=torch.Generator().manual_seed(1))
    assert torch.equal(pairs["x_t"], drawn["x_t"]) and not bool(pairs["valid"].all())
    t = pairs["t"].flatten()
    weight = (t**2 + 0.5**2) / (0.5 * t) ** 2
    edm = weight * (denoiser(pairs["x_t"][:, 0], t) - x0).square().mean(1)
    torch.testing.assert_close(baseline.loss(drawn)["loss_value"], edm.mean())


# Interruption


def at_step(
    number: int, act: Callable[[], None], monkeypatch: pytest.MonkeyPatch, objective: str = "td"
) -> None:
    step = Trainer._advance

    def acting(self: Trainer) -> dict[str, float]:
        if self.step == number and self.objective.name == objective:
            act()
        return step(self)

    monkeypatch.setattr(Trainer, "_advance", acting)


@pytest.mark.parametrize("objective", ["td", "monte_carlo"])
def test_terminated_and_resumed(
    objective: str, whole: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    at_step(16, lambda: os.kill(os.getpid(), signal.SIGTERM), monkeypatch, objective)
    with pytest.raises(Interrupted, match=rf"gradient step 17 of {objective}, .*resume=.*run") as stop:
        run(tmp_path / "run")
    assert "\n" not in str(stop.value)
    assert handlers == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    monkeypatch.undo()
    folder = RunFolder(tmp_path / "run")
    assert (folder.checkpoints(objective) / "step_000017").is_dir()
    at_step(16, lambda: pytest.fail("trained again"), monkeypatch, objective)
    resumed = run_experiment({**folder.config(), "resume": str(folder.path)}, progress=False)
    assert_same_run(whole, resumed)


@pytest.mark.parametrize("step", [0, 10, 30])
def test_terminated_in_an_evaluation_and_resumed(
    step: int, whole: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is left at once, the step is saved, and the run that goes on evaluates first: before, between, at the end."""
    errors, evaluated = experiment.TrainingJob.errors, list[int]()

    def signalled(job: experiment.TrainingJob, *given: Any) -> Any:
        if job.trainer.step == step:
            os.kill(os.getpid(), signal.SIGTERM)
        found = errors(job, *given)
        evaluated.append(job.trainer.step)
        return found

    monkeypatch.setattr(experiment.TrainingJob, "errors", signalled)
    with pytest.raises(Interrupted, match=f"gradient step {step} of td, and saved"):
        run(tmp_path / "run")
    assert evaluated == [*range(0, step, 10)]
    monkeypatch.undo()
    folder = RunFolder(tmp_path / "run")
    assert latest_checkpoint(folder.checkpoints("td")) == folder.checkpoints("td") / f"step_{step:06d}"
    resumed = run_experiment({**folder.config(), "resume": str(folder.path)}, progress=False)
    assert_same_run(whole, resumed)


def test_terminated_in_the_evaluation_of_the_end_and_resumed(
    whole: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = experiment.TrainingJob._measured

    def signalled(job: experiment.TrainingJob, denoiser: diffrl.Denoiser) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return measured(job, denoiser)

    monkeypatch.setattr(experiment.TrainingJob, "_measured", signalled)
    with pytest.raises(
        Interrupted, match="in the evaluation at the end of td; its steps are saved, .*resume="
    ):
        run(tmp_path / "run")
    monkeypatch.undo()
    folder = RunFolder(tmp_path / "run")
    resumed = run_experiment({**folder.config(), "resume": str(folder.path)}, progress=False)
    assert_same_run(whole, resumed)


def test_asked_twice_it_stops_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def twice() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    at_step(16, twice, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "run")


KILLED = """
import os, signal, sys
import torch
from diffrl.training.trainer import Trainer
from tests.kit.configs import small
from diffrl.experiments.train import run_experiment
torch.set_num_threads(1)
step = Trainer._advance
def dying(self):
    if self.step == 27:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self)
Trainer._advance = dying
run_experiment(small("run_dir=" + sys.argv[1]), progress=False)
"""


def test_killed_and_resumed(whole: RunFolder, tmp_path: Path) -> None:
    """Kill -9 between two checkpoints: what was lost is trained again, and nothing is different."""
    folder = RunFolder(tmp_path / "run")
    command = [sys.executable, "-W", "ignore", "-c", KILLED, str(folder.path)]
    killed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert list_checkpoints(folder.checkpoints("td"))[-1].name == "step_000020"
    assert int(rows(folder)[-1]["grad_steps"]) == 24  # reported, but not saved
    (folder.checkpoints("td") / "step_000025.tmp-1").mkdir()  # as if in the middle of a checkpoint
    with (folder.path / "metrics.csv").open("a", encoding="utf-8") as file:
        file.write("td,26,")  # and of a row
    with pytest.warns(RuntimeWarning, match="ends with half a row, which is left out"):
        resumed = run_experiment({**folder.config(), "resume": str(folder.path)}, progress=False)
    assert_same_run(whole, resumed)


def test_signalled_from_outside(tmp_path: Path) -> None:
    """The command line: SIGTERM ends it with status 1 and a line that says how to go on."""
    path = tmp_path / "run"
    words = ["data=rings", "trainer.grad_steps=1000000", "trainer.report_every=1", f"run_dir={path}"]
    command = [sys.executable, "-W", "ignore", "examples/train_td_lambda.py", *words]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        deadline = time.monotonic() + 120
        while not (path / "metrics.csv").exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 1, err
    assert out.startswith("stopped after gradient step") and f"resume={path}" in out
    assert latest_checkpoint(path / "checkpoints" / "td") is not None


def test_a_finished_run_is_neither_trained_nor_evaluated_again(
    whole: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(experiment.TrainingJob, "run", lambda *_: pytest.fail("run again"))
    before = (whole.path / "results.json").read_bytes()
    run_experiment({**whole.config(), "resume": str(whole.path)}, progress=False)
    assert (whole.path / "results.json").read_bytes() == before


# What is refused


def test_a_folder_with_another_run(whole: RunFolder) -> None:
    before = (whole.path / "config.yaml").read_bytes()
    with pytest.raises(RunFolderError, match=f"{whole.path} already holds a run: .*resume="):
        run(whole.path, "seed=1")
    assert (whole.path / "config.yaml").read_bytes() == before


def test_resuming_with_other_settings(whole: RunFolder) -> None:
    config = {**whole.config(), "resume": str(whole.path), "seed": 1}
    with pytest.raises(RunFolderError, match="seed 0 → 1; take that back"):
        run_experiment(config, progress=False)


def test_no_run_to_resume(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="holds no run"):
        run_experiment({**small(), "resume": str(tmp_path)}, progress=False)
