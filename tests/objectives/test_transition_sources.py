"""The page of transition sources: each cell of its table is tried, by what an objective makes of the words."""

import re
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest
import torch

import diffrl
from diffrl.diffusion.denoisers import Denoiser
from diffrl.diffusion.networks.mlp import MLP
from diffrl.diffusion.schedules.edm import EDM
from diffrl.errors import InputError
from diffrl.objectives.registry import OBJECTIVES
from diffrl.objectives.scheme import Objective, build_objective
from diffrl.objectives.transitions import Transition
from tests.kit.configs import small
from tests.kit.paths import ROOT

DATA = diffrl.data.gmm(dim=2, components=3)
BATCH = DATA.batch(8, torch.Generator().manual_seed(0))[0]
SOURCES = ("reference", "exact", "redrawn", "plug_in")
NAMED = re.compile(r"`([\w.=]+)`")


@pytest.fixture(scope="module")
def config() -> dict[str, Any]:
    return small("data=gmm", "data.dim=2", "compare=false")


def rows() -> Iterator[tuple[list[str], str, str, str]]:
    """Of the second table: objectives, `chain.x0`, `objective.transition`, why not the others."""
    page = (ROOT / "docs" / "transition_sources.md").read_text(encoding="utf-8")
    table = page.partition("| objective |")[2].partition("\n\n")[0].splitlines()[2:]
    for line in table:
        names, x0, transition, why = (cell.strip() for cell in line.strip("|").split("|"))
        yield NAMED.findall(names), x0, transition, why


def build(config: dict[str, Any], name: str, x0: str = "datum", **options: Any) -> Objective:
    """An objective with a denoiser that suits it."""
    of_two_times = OBJECTIVES.entry(name).place.learns == "map"
    network = MLP((2,), hidden=4, depth=1, second_time=of_two_times, variance=name == "hybrid")
    own: dict[str, dict[str, Any]] = {"progressive": {"start": 4}, "td": {"bootstrap": "own"}}
    options |= own.get(name, {})
    parametrisation = {"prediction_type": "consistency"} if name in ("ct", "td_ct", "cd") else {}
    given = {**config, "objective": {"name": name, **options}, "chain": {**config["chain"], "x0": x0}}
    return build_objective(given, Denoiser(network, EDM(), **parametrisation), data=DATA)


def takes(config: dict[str, Any], name: str, x0: str, **options: Any) -> bool:
    """Whether a stand-in is taken and looked at: it gives another loss than the data themselves."""
    try:
        objective = build(config, name, x0, **options)
    except InputError as error:
        assert re.search("knows no stand-in for x0|makes steps of their own", str(error))
        return False
    plain = build(config, name, **options)
    losses = [
        objective.loss(of.draw(BATCH, cond=None, generator=torch.Generator().manual_seed(1)))["loss_value"]
        for of in (objective, plain)
    ]
    assert not torch.equal(*losses)
    return True


def test_every_cell_of_the_table_is_so(config: dict[str, Any]) -> None:
    shown: dict[str, tuple[str, str]] = {}
    for names, x0, transition, why in rows():
        assert names and why
        shown |= dict.fromkeys(names, (x0, transition))
    for name in OBJECTIVES:
        x0, transition = shown.get(name, ("", ""))  # one that takes nothing need not be there
        always, _, one_step = x0.partition("; with `objective.lmbda=0` also ")
        for source in SOURCES:
            assert takes(config, name, source) == (source in NAMED.findall(always)), (name, source)
            if one_step:
                assert takes(config, name, source, lmbda=0.0), (name, source)
        for source in ("reference", "teacher"):
            objective = None
            teacher = {"teacher": "exact"} if source == "teacher" else {}
            with suppress(InputError):
                objective = build(config, name, transition=source, **teacher)
            moved = getattr(getattr(objective, "draw", None), "transition", None)
            there = isinstance(moved, Transition) and moved.source == source
            assert there == (source in NAMED.findall(transition)), (name, source)
