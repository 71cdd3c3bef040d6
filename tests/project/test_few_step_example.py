"""The example of few steps at tiny size: equal reward calls, runs that are kept, figures that mean what they say."""

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from diffrl.configs.cli import settings
from tests.kit.configs import composed
from tests.kit.examples import example as load_example


@pytest.fixture(scope="module")
def example() -> ModuleType:
    return load_example("finetune_few_step")


def run(example: ModuleType, folder: Path, *words: str) -> dict[str, Any]:
    quick = (
        *("--seeds", "1", "--grad-steps", "2", "--distil", "1", "--iterations", "2", "--samples", "32"),
        *("--workers", "0", "--work", str(folder / "work"), "--out", str(folder / "out")),
    )
    example.main(example.parser().parse_args([*quick, *words]))
    found: dict[str, Any] = json.loads((folder / "out" / "digits.json").read_text(encoding="utf-8"))
    return found


@pytest.mark.usefixtures("unrendered")
def test_it_runs_keeps_what_is_finished_and_refuses_what_was_run_otherwise(
    example: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    methods = ("--methods", "TDM-R1", "SDPO")
    found = run(example, tmp_path, *methods)
    table = capsys.readouterr().out
    for name in ("student with noise", "TDM-R1", "SDPO, noise taken away", "real digits of the class"):
        assert name in found["figures"] and any(line.startswith(name) for line in table.splitlines())
        assert len(found["figures"][name]["reward"]["seeds"]) == 1
    assert found["figures"]["real digits of the class"]["reward"]["iqm"] > 0.95
    assert {file.name for file in (tmp_path / "out").iterdir()} == {
        *("digits.json", "digits_curves.png", "digits_grids.png")
    }

    calls = {name: curves[0]["queries"][-1] for name, curves in found["curves"].items()}
    assert calls["TDM-R1"] == found["reward_calls"] == 2 * 144
    assert calls["SDPO"] == pytest.approx(calls["TDM-R1"], rel=0.02)

    # the same again: nothing is run, and the figures are the same
    kept = {file: file.stat().st_mtime_ns for file in (tmp_path / "work").rglob("results.json")}
    assert len(kept) == 4
    assert run(example, tmp_path, *methods) == found
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "work").rglob("results.json")} == kept

    with pytest.raises(SystemExit, match="1 runs failed: 1 TDM-R1"):
        run(example, tmp_path, "--methods", "TDM-R1", "--iterations", "3")
    assert "holds a run with another loop" in capsys.readouterr().out


def test_distances_are_none_where_samples_are_the_data(example: ModuleType) -> None:
    meter = example.Meter(7, 4)
    assert meter(meter.train[:200])["nearest"] == pytest.approx(0, abs=1e-3)
    assert meter(meter.test)["to_data"] == meter(meter.test)["features"] == pytest.approx(0, abs=1e-6)
    sevens, test = meter(meter.of_class), meter(meter.test)
    assert sevens["to_class"] == pytest.approx(0, abs=1e-6) and test["to_class"] > 0.2
    assert sevens["heldout"] > 0.95 and sevens["diversity"] < test["diversity"]
    assert test["within"] == pytest.approx(sevens["diversity"], rel=0.1)


def test_samples_do_not_depend_on_how_many_are_drawn(example: ModuleType, tmp_path: Path) -> None:
    class Shrink(torch.nn.Module):
        def forward(self, x: torch.Tensor, t: torch.Tensor, cond: Any = None) -> torch.Tensor:
            return x / 2

    denoiser = Shrink()
    denoiser.process = example.diffrl.Flow()
    few, many = (example.Meter(7, n).draw(denoiser, 4, 1.0) for n in (2, 5))
    assert few.shape == (2, 1, 8, 8) and few.equal(many[:2])


def test_methods_are_told_apart_by_colour(example: ModuleType) -> None:
    for kind in (True, False):
        styles = [example.style_of(name) for name, m in example.METHODS.items() if m.ablation is kind]
        assert len(set(styles)) == len(styles)


def test_the_experiments_have_the_numbers_of_the_example(example: ModuleType) -> None:
    def tuning(*words: str) -> dict[str, Any]:
        return settings(composed(*words, "model.path=x", "compare=[]", name="finetune"), [])

    def pieces(config: dict[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in config.items() if key not in ("loop", "evaluation")}

    of_class = ("reward=class_decision", "reward.target=7")
    assert pieces(tuning("experiment=digits_tdm")) == pieces(tuning(*example.STUDENT, *of_class))
    words = (*example.LEARNT, *example.TUNED, "reward.target=7", "model=tuned")
    assert pieces(tuning("experiment=digits_tdm_r1")) == pieces(tuning(*words))
