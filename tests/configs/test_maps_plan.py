"""The plan of schemes of the field: each starts on its own network and sampler, and evaluations match as it says."""

import math
from functools import cache
from typing import Any

import pytest
import yaml
from omegaconf import OmegaConf

from diffrl.configs.cells import plan_comparison
from diffrl.experiments.comparison import Cell
from diffrl.experiments.train import TrainingJob, opened
from diffrl.objectives.solutions import solution_of
from tests.kit.configs import composed
from tests.kit.paths import ROOT

SMALL: dict[str, dict[str, Any]] = {
    "network": {"hidden": 8, "depth": 1, "x_features": 2, "noise_features": 2},
    "eval": {"points": 8, "samples": 8},
}


PLAN = yaml.safe_load((ROOT / "configs" / "plan" / "maps.yaml").read_text(encoding="utf-8"))
PLACES = [
    (name, case, scheme)
    for name, study in PLAN["studies"].items()
    for case in study["cases"]
    for scheme in study["schemes"]
]
STARTED = [place for place in PLACES if place[0] in ("steps", "flow")]


@cache
def cell(study: str, case: str, scheme: str) -> Cell:
    """A cell of a scheme of a study on a case, at the plan's own rate."""
    config = OmegaConf.to_container(composed("plan=maps", name="compare"), resolve=True)
    assert isinstance(config, dict)
    plan = config["plan"]
    plan["tuning"]["enabled"] = False
    whole = plan["studies"][study]
    schemes = {scheme: whole["schemes"][scheme]}
    part = {**whole, "cases": [case], "schemes": schemes, "baseline": scheme, "seeds": [0]}
    [made] = plan_comparison({**plan, "studies": {study: part}}).cells
    return made


def job(cell: Cell, **changes: dict[str, Any]) -> TrainingJob:
    config = {**cell.config, "run_dir": None, "resume": None}
    for group, options in {**SMALL, **changes}.items():
        config[group] = {**config[group], **options}
    return opened(config)


@pytest.mark.parametrize("place", STARTED, ids=lambda place: f"{place[1]}, {place[2]}")
def test_every_scheme_starts_and_is_measured_by_what_it_learns(place: tuple[str, str, str]) -> None:
    planned = cell(*place)
    batch = min(planned.config["trainer"]["batch_size"], 8)
    made = job(planned, trainer={"batch_size": batch, "grad_steps": 3}, optim={"warmup_steps": 0})
    for row in made.trainer.steps():
        assert math.isfinite(row["loss_value"]) and row["grad_norm"] > 0
    errors, solution = made.errors(), solution_of(planned.config["objective"]["name"])
    assert made.solution == solution
    assert bool(errors["value_error"]) == (solution in ("denoiser", "map"))
    pairs = {"denoiser": 0, "to_clean": 2, "map": 4}[solution]
    assert len(errors.get("map_error", {})) == pairs
    assert all(math.isfinite(error) for found in errors.values() for error in found.values())
    for levels in planned.config["eval"]["num_steps"]:
        assert made._draw(levels, 4)[1] == levels  # an evaluation a level, for all


def test_there_are_sixteen_schemes_and_more_of_every_kind() -> None:
    places = [place for place in PLACES if place[:2] == ("steps", "gmm16")]
    names = [cell(*place).config["objective"]["name"] for place in places]
    assert len(names) >= 20 and len(set(names)) >= 17
    assert {solution_of(name) for name in names} == {"denoiser", "to_clean", "map"}
    for case in ("rings", "digits"):
        assert len([place for place in PLACES if place[:2] == ("others", case)]) == len(names)


@pytest.mark.parametrize("scheme", [scheme for study, _, scheme in STARTED if study == "steps"])
def test_network_evaluations_are_equal_where_the_plan_says_so(scheme: str) -> None:
    made = job(cell("evaluations", "gmm16", scheme)).trainer
    total, places = made.length.total, 24
    made.train_on(0)
    before = made.loss.network_evaluations
    for k in range(places):
        made.train_on((2 * k + 1) * total // (2 * places))
    spent = (made.loss.network_evaluations - before) / places * total
    assert spent == pytest.approx(448 * 2000, rel=0.02)


def test_other_data_have_three_quarters_of_the_steps() -> None:
    """As many states a step as on the mixture, and 1,500 steps for 2,000, whatever the scheme."""
    whole = cell("evaluations", "gmm16", "EDM").config["trainer"]["grad_steps"]
    part = cell("others_evaluations", "rings", "EDM").config["trainer"]["grad_steps"]
    assert (whole, part) == (2000, 1500)
    for scheme, words in PLAN["studies"]["evaluations"]["schemes"].items():
        mine = PLAN["studies"]["others_evaluations"]["schemes"][scheme]
        own = [{word.partition("=")[0]: word.partition("=")[2] for word in w} for w in (words, mine)]
        steps = [
            int(options.pop("trainer.grad_steps", n)) for options, n in zip(own, (2000, 1500), strict=True)
        ]
        assert own[0] == own[1] and steps[1] == pytest.approx(0.75 * steps[0], abs=1)
