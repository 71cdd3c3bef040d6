"""The plan of schemes of the field: each starts on its own network and sampler, and evaluations match as it says."""

import math
from functools import cache
from typing import Any

import pytest
from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from diffrl.configs.cells import plan_comparison
from diffrl.configs.groups import register
from diffrl.experiments.comparison import Cell
from diffrl.experiments.train import TrainingJob, opened
from diffrl.objectives.solutions import solution_of

SMALL: dict[str, dict[str, Any]] = {
    "network": {"hidden": 8, "depth": 1, "x_features": 2, "noise_features": 2},
    "eval": {"points": 8, "samples": 8},
}


@cache
def cells() -> dict[tuple[str, str, str], Cell]:
    """A cell of each scheme of each study on each case, at the plan's own rate."""
    register()
    GlobalHydra.instance().clear()
    with initialize_config_module("diffrl.configs", version_base="1.3"):
        config = OmegaConf.to_container(compose("compare", ["plan=maps"]), resolve=True)
    assert isinstance(config, dict)
    plan = config["plan"]
    plan["tuning"]["enabled"] = False
    for study in plan["studies"].values():
        study["seeds"] = [0]
    made = plan_comparison(plan).cells
    return {(c.where["study"], c.where["case"], c.where["scheme"]): c for c in made}


def job(cell: Cell, **changes: dict[str, Any]) -> TrainingJob:
    config = {**cell.config, "run_dir": None, "resume": None}
    for group, options in {**SMALL, **changes}.items():
        config[group] = {**config[group], **options}
    return opened(config)


PLACES = sorted(place for place in cells() if place[0] in ("steps", "flow"))


@pytest.mark.parametrize("place", PLACES, ids=lambda place: f"{place[1]}, {place[2]}")
def test_every_scheme_starts_and_is_measured_by_what_it_learns(place: tuple[str, str, str]) -> None:
    cell = cells()[place]
    batch = min(cell.config["trainer"]["batch_size"], 8)
    made = job(cell, trainer={"batch_size": batch, "grad_steps": 3}, optim={"warmup_steps": 0})
    for row in made.trainer.steps():
        assert math.isfinite(row["loss_value"]) and row["grad_norm"] > 0
    errors, solution = made.errors(), solution_of(cell.config["objective"]["name"])
    assert made.solution == solution
    assert bool(errors["value_error"]) == (solution in ("denoiser", "map"))
    pairs = {"denoiser": 0, "to_clean": 2, "map": 4}[solution]
    assert len(errors.get("map_error", {})) == pairs
    assert all(math.isfinite(error) for found in errors.values() for error in found.values())
    for levels in cell.config["eval"]["num_steps"]:
        assert made._draw(levels, 4)[1] == levels  # an evaluation a level, for all


def test_there_are_sixteen_schemes_and_more_of_every_kind() -> None:
    names = [c.config["objective"]["name"] for place, c in cells().items() if place[:2] == ("steps", "gmm16")]
    assert len(names) >= 20 and len(set(names)) >= 17
    assert {solution_of(name) for name in names} == {"denoiser", "to_clean", "map"}
    for case in ("rings", "digits"):
        assert len([place for place in cells() if place[:2] == ("others", case)]) == len(names)


@pytest.mark.parametrize("scheme", [place[2] for place in PLACES if place[0] == "steps"])
def test_network_evaluations_are_equal_where_the_plan_says_so(scheme: str) -> None:
    made = job(cells()["evaluations", "gmm16", scheme]).trainer
    total, places = made.length.total, 24
    made.train_on(0)
    before = made.loss.network_evaluations
    for k in range(places):
        made.train_on((2 * k + 1) * total // (2 * places))
    spent = (made.loss.network_evaluations - before) / places * total
    assert spent == pytest.approx(448 * 2000, rel=0.02)
