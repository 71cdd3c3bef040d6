"""What a comparison says before it starts: time and memory, and what that rests on."""

import json
import time
from pathlib import Path
from typing import Any

import pytest

from diffrl.configs.cells import plan_comparison
from diffrl.experiments.comparison import run_cells
from diffrl.experiments.estimates import Kind, Pace, estimate, measure
from diffrl.experiments.finetune import opened as opened_finetuning
from diffrl.experiments.train import TrainingJob, opened
from diffrl.training.trainer import Trainer
from diffrl.workers import run_tasks
from tests.experiments.test_comparison import plan, study
from tests.kit.configs import composed, settings, small
from tests.kit.worker_tasks import work

Never = bool  # bool() is False


def test_a_run_takes_its_steps_and_its_evaluations() -> None:
    assert Pace(0.5, 2.0, eval_every=10, memory=0).seconds(40) == 40 * 0.5 + 5 * 2.0


def test_the_pace_is_that_of_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    step, evaluate = Trainer._advance, TrainingJob.evaluate

    def slow_step(self: Trainer) -> Any:
        time.sleep(0.05)
        return step(self)

    def slow_evaluation(self: TrainingJob) -> dict[str, float]:
        time.sleep(0.2)
        return evaluate(self)

    monkeypatch.setattr(Trainer, "_advance", slow_step)
    monkeypatch.setattr(TrainingJob, "evaluate", slow_evaluation)
    pace = measure((opened, small("compare=false")))
    assert 0.05 <= pace.step < 0.2 and 0.2 <= pace.evaluation < 1.0 and pace.eval_every == 10
    assert pace.memory >= 2**20


def test_memory_is_the_most_that_a_process_has_held() -> None:
    """In a process of its own: one that has run other tests has room that they gave back."""
    [(_, (before, after))] = run_tasks(work, [("peak", 2**28)], workers=1)
    assert before + 2**28 <= after <= before + 2 * 2**28


def test_an_estimate_says_what_it_rests_on(tmp_path: Path) -> None:
    config = small("compare=false", "trainer.grad_steps=100")
    timed, untried = Kind(opened, config, 100, 3, [50.0, 70.0]), Kind(opened, config, 100, 1, [])
    assert estimate([], workers=2, stop=Never) is None
    assert estimate([timed._replace(left=0)], workers=2, stop=Never) is None
    said = estimate([timed], workers=2, stop=Never)
    assert said == "3 runs left, 2 at a time: about 90 s, by finished runs of 1 kind (± a quarter)".replace(
        "90 s", "2 min"
    )
    said = estimate([untried], workers=0, stop=Never)
    assert said is not None and said.startswith("1 run left, 1 at a time: about ")
    assert "GiB of memory, by 3 steps and one evaluation of 1 kind (within a factor of two" in said
    both = estimate([timed, untried], workers=0, stop=Never)
    assert both is not None and "finished runs of 1 kind (± a quarter) and 3 steps" in both
    broken = untried._replace(config={**config, "device": "nowhere"})
    assert estimate([broken], workers=0, stop=Never) is None
    stopped = estimate([timed, untried], workers=0, stop=lambda: True)
    assert stopped is not None and stopped.endswith("; not tried: 1 kind")


def test_a_comparison_tells_it_before_it_starts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = plan_comparison(plan(a=study()))
    run_cells(made.cells[:1], tmp_path, workers=0)
    assert capsys.readouterr().out.startswith("1 run left, 1 at a time: about ")
    [(folder, seconds)] = json.loads((tmp_path / "index.json").read_text(encoding="utf-8"))["seconds"].items()
    assert (tmp_path / "cells" / folder).is_dir() and seconds > 0
    run_cells(made.cells, tmp_path, workers=0)
    said = capsys.readouterr().out
    assert (
        said.startswith("3 runs left, 1 at a time")
        and "finished runs of 1 kind" in said
        and "of 1 kind (within" in said
    )
    run_cells(made.cells, tmp_path, workers=0)
    assert capsys.readouterr().out == ""


def test_fine_tuning_is_timed_too(tmp_path: Path) -> None:
    from diffrl.experiments.train import run_experiment

    run_experiment(small("compare=false", f"run_dir={tmp_path}"), progress=False)
    words = (
        "reward=mode_distance",
        "reward.point=[0.8,0]",
        "heldout_reward=none",
        "rollouts.trajectories=16",
    )
    config = settings(
        composed(*words, f"model.path={tmp_path}", "evaluation.samples=32", name="finetune"), []
    )
    assert measure((opened_finetuning, config)).step > 0
