"""A pipeline is tuned and judged by what a detector and a reader of the user say, each chosen by its name."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffrl.configs.cli import settings
from diffrl.experiments.finetune import run_finetuning
from diffrl.rewards.by_name import DETECTORS, READERS
from diffrl.rewards.geneval_rules import Detection
from tests.kit.configs import composed
from tests.kit.pipelines import stable_diffusion

LINES = [
    {"prompt": 'one lamp, "on"', "tag": "counting", "include": [{"class": "lamp", "count": 1}]},
    {"prompt": 'two lamps, "off"', "tag": "counting", "include": [{"class": "lamp", "count": 2}]},
]


def lamps(images: np.ndarray) -> list[list[Detection]]:
    """As many as a corner of the picture says."""
    return [[Detection("lamp", 1.0, (0, 0, 1, 1))] * int(image[0, 0, 0] % 3) for image in images]


def switches(images: np.ndarray) -> list[str]:
    return ["on" if image[0, 0, 0] % 2 else "off" for image in images]


@pytest.fixture
def given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Words for the command line."""
    tools: list[tuple[Any, str, Callable[..., Any]]] = [
        (DETECTORS, "lamps", lamps),
        (READERS, "switches", switches),
    ]
    for registry, name, made in tools:
        assert name not in registry
        monkeypatch.setattr(registry, "_entries", dict(registry._entries))
        registry.register(name)(lambda made=made: made)
    stable_diffusion().save_pretrained(tmp_path / "pipe")
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, LINES)), encoding="utf-8")
    return [
        "experiment=sd15_ddpo",
        f"model.path={tmp_path / 'pipe'}",
        f"model.prompts_file={tmp_path / 'prompts.jsonl'}",
        *("model.weights=float32", "dtype=float32", "policy.num_steps=2", "rollouts.trajectories=4"),
        *("rollouts.at_once=2", "evaluation.samples=8", "updates.minibatches=2", "loop.iterations=1"),
        *("reward=geneval", "reward.detector=lamps", "heldout_reward=ocr", "heldout_reward.reader=switches"),
        f"run_dir={tmp_path / 'run'}",
    ]


def test_a_pipeline_is_tuned_for_a_detector_and_judged_by_a_reader(given: list[str], tmp_path: Path) -> None:
    folder = run_finetuning(settings(composed(*given, name="finetune"), []), progress=False)
    found = folder.results()["finetuning"]
    assert found["queries"] == 4
    # rewards are 0, 1/2 or 1 (or 0 for two lamps where one is asked for), and text is read or is not
    assert 0 <= found["final"]["eval_reward"] <= 1 and (16 * found["final"]["eval_reward"]) % 1 == 0
    assert 0 <= found["final"]["heldout_reward"] <= 1


def test_a_wrong_line_ends_the_run_before_it_makes_a_folder(given: list[str], tmp_path: Path) -> None:
    wrong = [LINES[0], {**LINES[1], "include": [{"class": "lamp"}]}]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, wrong)), encoding="utf-8")
    with pytest.raises(RuntimeError, match=r"GenEval.*prompt .two lamps.*include\[0\] is"):
        run_finetuning(settings(composed(*given, name="finetune"), []), progress=False)
    assert not (tmp_path / "run").exists()
