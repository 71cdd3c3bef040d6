"""A run's results in words."""

from typing import Any

import pytest
import torch

from diffrl.experiments.reports.run_table import (
    BOOTSTRAPS,
    DISTANCES,
    OF_FEATURES,
    bootstrap_row,
    count_label,
    distance_label,
    objective_label,
    summary_table,
    title,
)
from diffrl.metrics.measures import FEATURE_MEASURES, SAMPLE_DISTANCES
from diffrl.objectives.registry import OBJECTIVES
from diffrl.objectives.scheme import build_objective
from diffrl.objectives.target_choice import DEFAULT_LOOKAHEAD
from diffrl.rl.estimators import MonteCarlo
from diffrl.training.build import build_data, build_denoiser
from tests.kit.configs import small
from tests.kit.schemes import NAMES, WORDS


def found(value_error: dict[str, float], distance: float, evaluations: int) -> dict[str, Any]:
    return {
        "grad_steps": 30,
        "network_evaluations": evaluations,
        "seconds": 2.0,
        "value_error": value_error,
        "sample_distance": {"metric": "sliced_w2@40", "by_nfe": {"9": distance}},
    }


def results(*overrides: str, **objectives: dict[str, Any]) -> dict[str, Any]:
    return {"config": small(*overrides), "seed": 3, "versions": {}, "objectives": objectives}


@pytest.mark.parametrize(
    ("options", "label"),
    [
        ([], f"TD(lookahead={DEFAULT_LOOKAHEAD:g})"),
        (["objective.lmbda=0"], "TD(0)"),
        (["objective.lmbda=0.5"], "TD(λ=0.5)"),
        (["objective.n_steps=1"], "TD(0)"),
        (["objective.n_steps=3"], "3-step TD"),
        (["objective=td_edm"], "TD-EDM"),
        (["objective=monte_carlo"], "Monte Carlo"),
    ],
)
def test_labels(options: list[str], label: str) -> None:
    config = small(*options)
    assert objective_label(config["objective"]["name"], config) == label
    assert objective_label("monte_carlo", config) == "Monte Carlo"


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_has_a_label(name: str) -> None:
    label = objective_label(name, small(f"objective={name}"))
    assert label and "_" not in label


def test_every_distance_has_a_label() -> None:
    assert DISTANCES.keys() == SAMPLE_DISTANCES.keys() and OF_FEATURES.keys() == FEATURE_MEASURES.keys()
    assert distance_label("fd_digits_cnn@500_seed7") == "Fréchet distance (digits_cnn)"
    assert count_label("sliced_w2@2000") == "2,000 samples"  # of diffrl 0.3 and before
    assert distance_label("sliced_w2@2000") == "sliced W2 distance"


def test_table_of_two() -> None:
    td, mc = found({"0.3": 1.0, "1": 0.02}, 0.5, 1234567), found({"0.3": 2.0, "1": 0.08}, 0.4, 1234567)
    lines = summary_table(results("objective.lmbda=0.5", td=td, monte_carlo=mc)).splitlines()
    assert lines[0] == "TD(λ=0.5) and Monte Carlo on rings: 30 gradient steps of 8 data, seed 3"
    cells = {line[:33].strip(): line[33:].split() for line in lines[2:] if not line.startswith("-")}
    assert cells["value error, σ = 0.3"] == ["1.00", "2.00", "0.50"]
    assert cells["value error, σ = 1"] == ["0.0200", "0.0800", "0.25"]
    assert cells["value error, mean"] == ["0.510", "1.04", "0.49"]
    assert cells["sliced W2 distance, NFE 9"] == ["0.500", "0.400", "1.25"]
    assert cells["network evaluations in training"] == ["1,234,567", "1,234,567", "1.00"]
    assert max(map(len, lines)) <= 80


def test_table_has_the_errors_on_test_rows_where_they_were_taken() -> None:
    new = {**found({"0.3": 1.0}, 0.5, 10), "denoising_error": {"0.3": 4.0}}
    of_both = summary_table(results(td=new, monte_carlo={**new, "denoising_error": {"0.3": 2.0}}))
    lines = {line[:33].strip(): line[33:].split() for line in of_both.splitlines()}
    assert lines["denoising error, test, σ = 0.3"] == ["4.00", "2.00", "2.00"]
    assert "denoising" not in summary_table(results(td=new, monte_carlo=found({"0.3": 1.0}, 0.5, 10)))


def test_table_of_one_without_value_error() -> None:
    text = summary_table(results("data=checkerboard", td=found({}, 0.5, 10)))
    assert "value error" not in text and "ratio" not in text and "0.500" in text


@pytest.mark.parametrize(
    ("options", "source"),
    [
        ([], "a target network"),
        (["objective.lmbda=0.5"], "own predictions"),
        (["objective.n_steps=2", "objective.bootstrap=target"], "a target network"),
        (["objective.lmbda=1"], None),
        (["objective=td_edm"], "a target network"),
        (["objective=td_edm", "objective.bootstrap_share=0"], None),
        (["objective=ct", "objective.bootstrap=own"], "own predictions"),
        (["objective=denoising"], None),
    ],
)
def test_what_the_target_bootstraps_from_is_said(options: list[str], source: str | None) -> None:
    one = found({"0.3": 1.0}, 0.5, 10)
    name = small(*options)["objective"]["name"]
    text = summary_table(results(*options, **{name: one, "monte_carlo": one}))
    rows = [" ".join(line.split()[2:]) for line in text.splitlines() if line.startswith("bootstraps from")]
    assert rows == ([source] if source else [])


@pytest.mark.parametrize("name", NAMES)
def test_what_an_objective_is_said_to_bootstrap_from_is_what_its_loss_does(name: str) -> None:
    config = small(f"objective={name}", *WORDS.get(name, ()))
    data = build_data(config)
    loss = build_objective(config, build_denoiser(config, data), data=data).loss
    does = "nothing" if isinstance(loss._value_estimator, MonteCarlo) else loss.bootstrap
    said = " ".join(bootstrap_row([name], config)[1:])
    if said == "a teacher":  # which stands in the place of a target network, and still
        assert does == "target" and name == "progressive"
    else:
        assert said == BOOTSTRAPS.get(does, "")


def test_title_says_which_mixture() -> None:
    assert "on a mixture of 3 Gaussians in 5-D:" in title(
        results("data=gmm", "data.dim=5", "data.components=3")
    )


def test_labels_are_of_what_is_built() -> None:
    """TD(0) by its two names is one loss, Monte Carlo too."""
    x0, losses = torch.linspace(-1, 1, 16).view(8, 2), []
    for options in (
        ["objective.lmbda=0"],
        ["objective.n_steps=1"],
        ["objective=monte_carlo"],
        ["objective.lmbda=1"],
    ):
        config = small(*options)
        objective = build_objective(config, build_denoiser(config, build_data(config)))
        states = objective.draw(x0, cond=None, generator=torch.Generator().manual_seed(0))
        losses.append(objective.loss(states)["loss_value"].item())
    assert losses[0] == pytest.approx(losses[1]) != pytest.approx(losses[2])
    assert losses[2] == pytest.approx(losses[3])
