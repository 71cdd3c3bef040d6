"""The page of fixed points: every objective, its words, its verdicts and its grids."""

import re
from dataclasses import fields
from inspect import signature

import pytest
import torch

from diffrl.diffusion.chains import Chain
from diffrl.objectives.registry import OBJECTIVES
from docs.fixed_points import GROUPS, KS, RATIOS, SOLUTIONS, Row, fixed_points_page, verdict
from docs.normal_levels import denoiser, edm_through, flow_map, flow_through


def test_what_every_objective_of_the_library_learns_is_worked_out() -> None:
    of_library = {entry.name for entry in OBJECTIVES.entries() if entry.module.startswith("diffrl.")}
    assert set(SOLUTIONS) == of_library


def test_the_page_has_each_objective_once_or_says_that_it_is_not_there() -> None:
    OBJECTIVES.register("of_mine")(lambda D: D)
    try:
        page = fixed_points_page()
    finally:
        del OBJECTIVES._entries["of_mine"]
    links = re.findall(r"\[`(\w+)`\]\(([^)]+)\)", page)
    assert {name for name, _ in links} == {*OBJECTIVES, "of_mine"}
    assert all(link == f"../methods/objective/{name}.md" for name, link in links)
    assert page.rstrip().endswith("not worked out here: [`of_mine`](../methods/objective/of_mine.md).")
    table_rows = [line for line in page.splitlines() if line.startswith("|")]
    assert len(table_rows) == 10 + sum(map(len, SOLUTIONS.values()))
    assert {line.count("|") for line in table_rows} == {7}


def test_what_is_a_denoiser_or_a_map_is_seen_at_once() -> None:
    """Each objective by its first row, in a list and under a heading; other options may stand under another."""
    page = fixed_points_page()
    lists = dict(re.findall(r"^\* \*\*([A-Z][\w ]+)\*\*: (.+)$", page, re.MULTILINE))
    sections = dict(zip(*[iter(re.split(r"^## (.+)$", page, flags=re.MULTILINE)[1:])] * 2, strict=True))
    assert list(lists) == list(sections) == list(GROUPS.values())
    for title, names in lists.items():
        assert set(re.findall(r"`(\w+)`", names)) <= set(re.findall(r"\[`(\w+)`\]", sections[title]))
    named = [name for names in lists.values() for name in re.findall(r"`(\w+)`", names)]
    assert sorted(named) == sorted(SOLUTIONS)
    assert "`denoising`" in lists["Denoisers"] and "`ect`" in lists["Flow maps"]
    td = ("|  | 0.9174", "| `objective.lmbda=0 chain.value=clean", "| `chain.coupling=shared` |")
    for title, options in zip(lists, td, strict=True):
        assert f"[`td`](../methods/objective/td.md) {options}" in sections[title]


@pytest.mark.parametrize(
    "name", [name for name, found in SOLUTIONS.items() if any(row.words for row in found)]
)
def test_its_words_are_options(name: str) -> None:
    known = {
        "objective": {
            option for make in OBJECTIVES.entry(name).functions for option in signature(make).parameters
        },
        "chain": {field.name for field in fields(Chain)},
    }
    for word in " ".join(row.words for row in SOLUTIONS[name]).split():
        group, _, option = word.partition("=")[0].partition(".")
        assert word == "process=flow" or option in known[group]


def test_verdicts() -> None:
    """By numbers that are known: the two ends, what lies between, and what comes nearer by the number of levels."""
    assert verdict(Row(denoiser)) == ("denoiser", r"**D\***") and verdict(Row(flow_map)) == ("map", "**X**")
    between = Row(lambda s, K: (denoiser(s) * flow_map(s)) ** 0.5)
    assert verdict(between) == ("neither", "0.50 to 0.50 of the way")
    nearing = Row(lambda s, K: flow_map(s) * (1 + 1 / K))
    assert verdict(nearing) == ("map", "tends to **X** as levels are added: off by 5.6%, then 1.4%")
    assert verdict(Row(lambda s, K: denoiser(s) * 0.99)) == ("denoiser", r"**D\***, off by 1.00%")
    assert verdict(Row(lambda s, K: denoiser(s) ** 2)) == ("neither", "−2.00 to −2.00 of the way")
    goal = Row(lambda s, K: 0.7, goal=lambda s, K: 0.7)
    assert verdict(goal) == ("map", "**X_{t→s}**")


@pytest.mark.parametrize("s", RATIOS)
@pytest.mark.parametrize("K", KS)
def test_grids_have_the_level(s: float, K: int) -> None:
    process, i = edm_through(s, K)
    assert float(process.time(torch.tensor(i), K)) == pytest.approx(s, rel=1e-12)
    assert 40 < process.sigma_max < 160
    flow, j = flow_through(s, K)
    t = flow.time(torch.tensor(j), K)
    assert float(t / (1 - t)) == pytest.approx(s, rel=1e-12) and 0.5 < flow.shift < 2
