"""The example that trains agents from outside, at tiny size; and what it found at full size."""

import json
from pathlib import Path
from types import ModuleType

import pytest

from tests.kit.examples import example
from tests.kit.paths import ROOT

RESULTS = ROOT / "results" / "agents"


def script() -> ModuleType:
    return example("agents/train_agents")


@pytest.mark.filterwarnings("ignore")  # of Stable-Baselines3 and what it imports
def test_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    module = script()
    monkeypatch.setattr(module, "CHAINS", 20)
    module.main(
        ["--agents", "a2c", "sac", "torchrl_ppo", "--seeds", "1", "--steps", "60", "--out", str(tmp_path)]
    )
    found = json.loads((tmp_path / "agents.json").read_text(encoding="utf-8"))
    assert list(found["agents"]) == ["a2c", "sac", "torchrl_ppo"]
    for runs in found["agents"].values():
        assert set(runs["1"]) == {"random", "before", "after", "after, mean actions"}
        assert all(reward < 0 for reward in runs["1"].values())
    printed = capsys.readouterr().out.strip()
    assert printed in (tmp_path / "README.md").read_text(encoding="utf-8") and printed.count("\n") == 4


def test_what_it_found() -> None:
    """Every agent ended higher than it began, and than a random policy; the table is that of the numbers."""
    found = json.loads((RESULTS / "agents.json").read_text(encoding="utf-8"))
    module = script()
    assert set(found["agents"]) == set(module.AGENTS)
    for runs in found["agents"].values():
        for run in runs.values():
            assert run["after"] > max(run["before"], run["random"]) + 0.3
            assert run["after, mean actions"] > run["after"]
    assert module.table(found) in (RESULTS / "README.md").read_text(encoding="utf-8")
