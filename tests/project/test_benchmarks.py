"""The benchmarks compare like with like, and read their own figures right."""

import csv
import dataclasses
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from diffrl.data.dataset import Data
from tests.kit.paths import ROOT

METHODS = ("Monte Carlo", "TD(λ), own", "TD(λ), target", "TD-EDM", "TD(λ), own, on shifted grids")


@pytest.fixture
def benchmark_module(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import step_cost

    return step_cost


@pytest.mark.parametrize("method", range(len(METHODS)), ids=METHODS)
def test_steps_by_hand_have_the_losses_of_diffrl(benchmark_module: ModuleType, method: int) -> None:
    size = benchmark_module.SIZES[0]
    chosen = benchmark_module._methods(size)[method]
    assert chosen.name == METHODS[method]
    generator = torch.Generator().manual_seed(0)
    x0 = 0.5 * torch.randn(chosen.batch, *size.event_shape, generator=generator)
    benchmark_module._require_agreement(size, chosen, x0)
    with pytest.raises(RuntimeError, match="one is wrong"):
        wrong = {**vars(chosen), "by_hand": lambda *a: 1.01 * chosen.by_hand(*a)}
        benchmark_module._require_agreement(size, benchmark_module.Method(**wrong), x0)


def test_one_step_of_the_trainer_is_timed_by_all(benchmark_module: ModuleType) -> None:
    """Figures of several benchmarks compare only if their trainings are set up alike."""
    import cost_growth
    import scheme_steps

    for module in (benchmark_module, cost_growth, scheme_steps):
        assert module.trainer_step is benchmark_module.trainer_step and not hasattr(module, "Trainer")
    size = benchmark_module.SIZES[0]
    method, data = benchmark_module._methods(size)[0], torch.randn(64, 2)
    noise = Data("noise", test=data, train=data)
    one, other = (benchmark_module._step_of_trainer(size, method, noise) for _ in range(2))
    first = one()["loss_value"]
    assert other()["loss_value"] == first != one()["loss_value"]


def test_the_methods_whose_cost_is_measured_can_be_made(benchmark_module: ModuleType) -> None:
    import finetune_cost

    recipes = [finetune_cost.recipe_of(name) for name in finetune_cost.COMPARED]
    assert all(recipe.rollouts.trajectories == finetune_cost.TRAJECTORIES for recipe in recipes)


def test_a_ratio_is_taken_within_rounds(benchmark_module: ModuleType) -> None:
    disturbed = np.array([1.0, 5.0, 1.0, 9.0, 1.0, 2.0])
    ratio = benchmark_module.Ratio.of({"slow": 3 * disturbed, "fast": disturbed}, "slow", "fast")
    assert (ratio.median, ratio.low, ratio.high) == pytest.approx((3, 3, 3))
    for promise, verdict in {"≤ 3.1": "kept", "≤ 2.9": "missed", "≥ 2.9": "kept", "≥ 3.1": "missed"}.items():
        assert benchmark_module.Row("", 1.0, {"other": ratio}, promise).verdict == verdict
    assert benchmark_module.Row("", 1.0, {"other": ratio}).verdict == ""


def test_exponents_are_those_of_powers(benchmark_module: ModuleType, tmp_path: Path) -> None:
    import cost_growth

    sizes, disturbed = [1, 2, 4, 8, 16, 32], np.array([1.0, 5.0, 1.0, 9.0, 1.0, 2.0])
    for floor, name in ((0.0, "p"), (3.0, "q")):
        seconds = {("own", n): 1e-3 * disturbed * (floor + (n > 1) * n**1.5 + (n == 1) * 1e-9) for n in sizes}
        rows = cost_growth.rows_of("size", sizes, seconds)
        assert [row["fitted"] for row in rows] == [False, False, True, True, True, True]
        for row in rows:
            assert [row[f"{name}{end}"] for end in ("", "_low", "_high")] == pytest.approx([1.5] * 3)
    assert rows[-1]["p"] < 1.49 and rows[-1]["ms"] == pytest.approx(1.5 * (3 + 32**1.5), rel=1e-3)
    rows += cost_growth.rows_of("two sizes", sizes[:2], seconds)  # which have no q
    cost_growth.write_csv(tmp_path / "kept.csv", list(rows[0]), rows)
    assert cost_growth.kept(tmp_path / "kept.csv") == rows


def test_the_page_has_the_exponents_of_the_picture() -> None:
    with (ROOT / "benchmarks" / "cost_growth.csv").open(encoding="utf-8") as file:
        kept = {(row["axis"], row["scheme"]): row for row in csv.DictReader(file)}
    page = (ROOT / "results" / "README.md").read_text(encoding="utf-8")
    with_ = {
        "chains of": "batch",
        "steps of": "length of chains",
        "dimension": "dimension",
        "processes": "processes",
    }
    for begin, word in with_.items():
        (axis,) = {axis for axis, _ in kept if axis.startswith(begin)}
        rows = [(kept[axis, scheme], name) for name in "qp" for scheme in ("TD(λ), own", "EDM")]
        told = [[float(row[name + end] or "nan") for end in ("", "_low", "_high")] for row, name in rows]
        cells = [" " if p != p else f" {p:.2f} [{low:.2f}, {high:.2f}] " for p, low, high in told]
        assert "|".join(["\n", f" {word} ", *cells, "\n"]) in page


def test_environments_by_hand_step_as_those_of_diffrl(benchmark_module: ModuleType) -> None:
    import env_steps

    for kind in env_steps.KINDS:
        env_steps.require_agreement(kind)
        with pytest.raises(RuntimeError, match="one is wrong"):
            env_steps.require_agreement(dataclasses.replace(kind, by_hand=partial(_astray, kind)))


def _astray(kind: Any, env: Any, x: Any, given: Any, noise: Any) -> Any:
    return kind.by_hand(env, x, 1.01 * given, noise)
