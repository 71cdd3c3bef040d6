"""The page of the map: every objective once, with links to pages that there are, and a picture that can be read."""

import re
from itertools import combinations
from pathlib import Path

import pytest
from PIL import Image

from diffrl import registry
from diffrl.objectives.place import Place
from diffrl.objectives.registry import OBJECTIVES
from docs.map_page import map_page, write_map
from docs.map_picture import map_figure, slots
from docs.map_places import WORDS, description, placed
from docs.method_pages import write_pages
from tests.kit.paths import ROOT


@pytest.fixture
def mine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OBJECTIVES, "_entries", {e.name: e for e in OBJECTIVES.entries()})
    monkeypatch.setattr(registry, "_USERS", {})
    place = Place("map", "pairs", "shared", "n_steps", "own", "own", begins="end")
    OBJECTIVES.register("of_mine", place=place)(lambda D: D)
    OBJECTIVES.register("without")(lambda D: D)


def test_each_objective_stands_on_the_page_once_with_a_link_to_its_page(tmp_path: Path) -> None:
    write_pages(tmp_path / "methods")
    page = map_page()
    links = re.findall(r"\[`(\w+)`\]\(([^)]+)\)", page)
    assert sorted(name for name, _ in links) == list(OBJECTIVES)
    for name, link in links:
        assert (tmp_path / "map" / link).resolve() == tmp_path / "methods" / "objective" / f"{name}.md"
        assert (tmp_path / "methods" / "objective" / f"{name}.md").is_file()
    rows = [line for line in page.splitlines() if line.startswith("| [")]
    assert len(rows) == len(placed()) and {row.count("|") for row in rows} == {9}


@pytest.mark.usefixtures("mine")
def test_methods_of_ones_own_stand_there_too() -> None:
    page = map_page()
    assert (
        "| [`of_mine`](../methods/objective/of_mine.md) | X_{t→r}, to any level | pairs | shared noise |"
        in page
    )
    assert "at first to the end, then λ or n steps" in page
    assert page.rstrip().endswith("are registered): [`without`](../methods/objective/without.md).")
    shown = {text.get_text() for text in map_figure().axes[0].texts}
    assert "of_mine" in shown and "without" not in shown


def test_every_value_of_a_coordinate_has_its_own_words() -> None:
    for name in OBJECTIVES:
        for field, words in WORDS.items():
            assert getattr(OBJECTIVES.entry(name).place, field) in words
    assert all(len(set(words.values())) == len(words) for words in WORDS.values())


def test_boxes_do_not_cover_each_other() -> None:
    """One whose target changes covers the columns between."""
    columns, found = list(WORDS["look"]), placed()
    covered = []
    for name, (row, slot) in slots(found).items():
        ends = sorted(
            columns.index(look) for look in (found[name].look, found[name].begins or found[name].look)
        )
        covered += [(row, slot, x) for x in range(ends[0], ends[1] + 1)]
    assert len(covered) == len(set(covered)) > len(found)


def test_words_of_the_picture_lie_apart_and_inside() -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure = map_figure()
    renderer = FigureCanvasAgg(figure).get_renderer()
    texts = [text for text in figure.axes[0].texts if text.get_text()]
    boxes = {text: text.get_window_extent(renderer) for text in texts}
    for text, box in boxes.items():
        assert 0 <= box.x0 and box.x1 <= figure.bbox.x1 and 0 <= box.y0 and box.y1 <= figure.bbox.y1, text
    for (one, box), (other, another) in combinations(boxes.items(), 2):
        assert not box.overlaps(another), f"{one.get_text()} {other.get_text()}"
    assert sorted(text.get_text() for text in texts if text.get_text() in OBJECTIVES) == sorted(placed())


def test_page_and_picture_are_written(tmp_path: Path) -> None:
    write_map(tmp_path / "map")
    assert (tmp_path / "map" / "index.md").read_text(encoding="utf-8") == map_page()
    with Image.open(tmp_path / "map" / "map.png") as picture:
        assert picture.width == 1500 and picture.info["Description"] == description()


def test_the_picture_of_the_readme_is_the_present_one() -> None:
    with Image.open(ROOT / "docs" / "images" / "map.png") as picture:
        assert picture.info["Description"] == description(), (
            "python docs/map_page.py --picture docs/images/map.png draws it anew"
        )
    assert "(docs/images/map.png)" in (ROOT / "README.md").read_text(encoding="utf-8")
    assert "<map/index>" in (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
