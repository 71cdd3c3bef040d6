"""The prototype's claim on a 16-D mixture, at its full length: bootstrapping lowers the value error."""

from pathlib import Path

import pytest

from diffrl.configs.cli import settings
from diffrl.experiments.train import run_experiment
from tests.kit.configs import composed


@pytest.mark.parametrize(
    "seeds", [pytest.param((1,), marks=pytest.mark.slow), pytest.param((1, 2), marks=pytest.mark.soak)]
)
def test_td_0_beats_monte_carlo_by_a_quarter(seeds: tuple[int, ...], tmp_path: Path) -> None:
    """At equal gradient steps, data, noise and evaluations, on mixtures that nothing was tuned on."""
    ratios = []
    for seed in seeds:
        words = ["experiment=gmm16", "objective.lmbda=0", f"data.mixture_seed={seed}", f"seed={seed}"]
        words.append(f"run_dir={tmp_path / str(seed)}")
        figures = run_experiment(settings(composed(*words), words), progress=False).results()["objectives"]
        td, monte_carlo = figures["td"], figures["monte_carlo"]
        assert td["network_evaluations"] == monte_carlo["network_evaluations"]
        errors = [sum(of["value_error"][s] for s in ("0.1", "0.3", "1")) for of in (td, monte_carlo)]
        ratios.append(errors[0] / errors[1])
    assert sum(ratios) / len(ratios) <= 0.75, ratios
