"""The benchmarks compare like with like, and read their own figures right."""

import dataclasses
from functools import partial
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from tests.kit.paths import ROOT

METHODS = ("Monte Carlo", "TD(λ), own", "TD(λ), target", "TD-EDM")


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


def test_a_ratio_is_taken_within_rounds(benchmark_module: ModuleType) -> None:
    disturbed = np.array([1.0, 5.0, 1.0, 9.0, 1.0, 2.0])
    ratio = benchmark_module.Ratio.of({"slow": 3 * disturbed, "fast": disturbed}, "slow", "fast")
    assert (ratio.median, ratio.low, ratio.high) == pytest.approx((3, 3, 3))
    for promise, verdict in {"≤ 3.1": "kept", "≤ 2.9": "missed", "≥ 2.9": "kept", "≥ 3.1": "missed"}.items():
        assert benchmark_module.Row("", 1.0, {"other": ratio}, promise).verdict == verdict
    assert benchmark_module.Row("", 1.0, {"other": ratio}).verdict == ""


def test_environments_by_hand_step_as_those_of_diffrl(benchmark_module: ModuleType) -> None:
    import env_steps

    for kind in env_steps.KINDS:
        env_steps.require_agreement(kind)
        with pytest.raises(RuntimeError, match="one is wrong"):
            env_steps.require_agreement(dataclasses.replace(kind, by_hand=partial(_astray, kind)))


def _astray(kind: Any, env: Any, x: Any, given: Any, noise: Any) -> Any:
    return kind.by_hand(env, x, 1.01 * given, noise)
