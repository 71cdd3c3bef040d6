"""Grids of plans: values are what the command line takes, lists too; what is tuned, and what is refused."""

from typing import Any

import pytest
from omegaconf import OmegaConf

from diffrl.configs.cells import plan_comparison
from diffrl.configs.grids import read_grid, read_tuning
from diffrl.configs.groups import register
from diffrl.experiments.grids import Grid
from tests.experiments.test_comparison import plan, study
from tests.kit.configs import MC, TD, composed

TUNING = {"grid": {"lr": "optim.lr=1e-3,2e-3,4e-3", "betas": None}, "seeds": [8, 9], "by": "error"}


@pytest.fixture(autouse=True)
def groups() -> None:
    register()


@pytest.mark.parametrize(
    ("listed", "values"),
    [
        ("0,0.50, 1", ("0", "0.50", "1")),
        ("[0.5,0.999],[0.9,0.999]", ("[0.5,0.999]", "[0.9,0.999]")),
        ("'a,b',c", ("'a,b'", "c")),
        ("{a:1,b:[2,3]},null", ("{a:1,b:[2,3]}", "null")),
        ("1e-3", ("1e-3",)),
    ],
)
def test_values_are_those_of_the_command_line_as_they_are_written(
    listed: str, values: tuple[str, ...]
) -> None:
    grid = read_grid({"x": f"some.key={listed}", "off": None}, "here")
    assert grid.axes == {"x": values} and grid.keys == {"x": "some.key"}
    assert [grid.words(point) for point in grid.points] == [[f"some.key={value}"] for value in values]


@pytest.mark.parametrize(
    "words", ["some.key", "some.key=", "k=0,,1", "k=[0,1", "k=range(1,3)", "k=0,", "k x=1"]
)
def test_an_axis_without_values_is_refused(words: str) -> None:
    with pytest.raises(ValueError, match="here: axis x is .*: write key=value,value"):
        read_grid({"x": words}, "here")


def test_points_are_the_product_and_know_their_ends() -> None:
    grid = Grid({"lr": "optim.lr", "b": "optim.betas"}, {"lr": ("1", "2", "4"), "b": ("[0,0]", "[1,1]")})
    assert len(grid.points) == 6 and grid.words("lr=2, b=[1,1]") == ["optim.lr=2", "optim.betas=[1,1]"]
    assert grid.ends("lr=1, b=[1,1]") == ["lr"] == grid.ends("lr=4, b=[0,0]")
    assert grid.ends("lr=2, b=[0,0]") == []  # of two values either is an end
    assert Grid({}, {}).points == {}


def test_lists_on_an_axis_reach_the_optimiser() -> None:
    axes = {"β": "optim.betas=[0.5,0.999],[0.9,0.999]"}
    made = plan_comparison(plan(a=study(schemes={}, axes=axes, baseline="β=[0.9,0.999]", seeds=[0])))
    assert [cell.config["optim"]["betas"] for cell in made.cells] == [[0.5, 0.999], [0.9, 0.999]]
    assert made.studies[0].axes == {"β": ("[0.5,0.999]", "[0.9,0.999]")}


def tuned_plan(**changes: Any) -> dict[str, Any]:
    return plan(a=study(**changes)) | {"tuning": TUNING}


def test_tuning_cells_are_at_every_point_and_other_seeds() -> None:
    made = plan_comparison(tuned_plan())
    assert len(made.cells) == 4 and len(made.tuning) == 2 * 3 * 2
    assert {cell.where["rate"] for cell in made.cells} == {"fixed"}
    lr = [cell.config["optim"]["lr"] for cell in made.tuning if cell.where["scheme"] == "TD"]
    assert lr == [0.001, 0.001, 0.002, 0.002, 0.004, 0.004]
    assert {cell.config["data"]["mixture_seed"] for cell in made.tuning} == {108, 109}
    assert made.tuning[0].label == "tiny, MC, lr=1e-3, seed 8"
    found = made.tuned("a", "tiny", "TD", "lr=4e-3")
    assert [(c.config["optim"]["lr"], c.config["seed"], c.where["rate"]) for c in found] == [
        (0.004, 0, "tuned"), (0.004, 1, "tuned"),
    ]  # fmt: skip
    at_the_plans = made.tuned("a", "tiny", "TD", "lr=2e-3")
    assert [c.identity for c in at_the_plans] == [c.identity for c in made.cells[2:]]


@pytest.mark.parametrize(
    ("own", "points", "seeds"),
    [
        ({}, 3, (8, 9)),
        ({"grid": {"lr": "optim.lr=1,2"}, "seeds": [5]}, 2, (5,)),
        ({"grid": {"betas": "optim.betas=[0.5,0.9],[0.9,0.9]"}}, 6, (8, 9)),
        ({"grid": {"lr": None, "wd": "optim.weight_decay=0,1"}, "by": "samples"}, 2, (8, 9)),
    ],
)
def test_a_study_tunes_otherwise(own: dict[str, Any], points: int, seeds: tuple[int, ...]) -> None:
    made = plan_comparison(tuned_plan(tuning=own))
    tuning = made.studies[0].tuning
    assert tuning is not None and tuning.seeds == seeds and tuning.by == own.get("by", "error")
    assert len(tuning.grid.points) == points and len(made.tuning) == 2 * points * len(seeds)


def test_what_is_not_enabled_tunes_nothing() -> None:
    for made in (
        tuned_plan(tuning={"enabled": False}),
        tuned_plan(tuning={"seeds": [5]}) | {"tuning": TUNING | {"enabled": False}},
    ):
        comparison = plan_comparison(made)
        assert comparison.tuning == () and comparison.studies[0].tuning is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seeds": [1, 9]}, "study a: seed 9 is reported, and study a is tuned on it: choose other tuning.seeds"),
        ({"schemes": {"MC": MC, "x": [*TD, "optim.lr=1"]}}, "scheme x: optim.lr=1 is tuned by the plan: give the"),
        ({"axes": {"r": "optim.lr=1,2"}}, "scheme r=1: optim.lr=1 is tuned by the plan"),
        ({"tuning": {"grid": {"lr": "optim.lr=1"}}}, "study a: tuning.grid has fewer than two points"),
        ({"tuning": {"grid": {"lr": None}}}, "study a: tuning.grid has fewer than two points"),
        ({"tuning": {"grid": {"lr": "optim.lr"}}}, "study a: tuning.grid: axis lr is 'optim.lr': write key=value"),
        ({"tuning": {"grid": {"lr": "optim.lrr=1,2"}}}, "case tiny, scheme MC, lr=1: .*optim.lrr"),
        ({"tuning": {"grid": {"r": "optim.lr=1,2"}}}, "tuning.grid: axes lr and r both set optim.lr: give its values"),
        ({"tuning": {"grid": {"lr": "optim.lr=1e-3,0.001"}}}, "study a: tuning.grid: lr=1e-3 and lr=0.001 are one run"),
        ({"schemes": {"MC": MC, "x": [*TD, "optim={lr: 1}"]}}, "scheme x: optim={lr: 1} is tuned by the plan"),
        ({"tuning": {"by": "luck"}}, "study a: tuning.by is 'luck': give one of error, samples"),
        ({"tuning": {"seeds": [8, 8]}}, "seeds has 8 twice"),
    ],
)  # fmt: skip
def test_a_mistake_in_tuning_is_one_clear_line(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        plan_comparison(tuned_plan(**changes))
    assert "\n" not in str(caught.value)


def test_tuning_is_set_on_the_command_line() -> None:
    words = ["plan.studies.map.tuning.enabled=true", "plan.studies.map.tuning.seeds=[5]", "plan=quick"]
    words += ["plan.tuning.grid.betas='optim.betas=[0.5,0.999],[0.9,0.999]'"]
    words += ["+plan.studies.map.tuning.grid.lr=null"]
    config = OmegaConf.to_container(composed(*words, name="compare"), resolve=True)
    assert isinstance(config, dict)
    tuning = read_tuning(config["plan"], "map", config["plan"]["studies"]["map"])
    assert tuning is not None and tuning.seeds == (5,)
    assert tuning.grid.axes == {"betas": ("[0.5,0.999]", "[0.9,0.999]")}


def test_no_study_of_the_plan_reports_what_another_is_tuned_on() -> None:
    both = plan(a=study(), b=study(seeds=[8], tuning={"enabled": False})) | {"tuning": TUNING}
    with pytest.raises(ValueError, match="study b: seed 8 is reported, and study a is tuned on it"):
        plan_comparison(both)
