"""The table of speed shows every figure of the benchmarks, and no promise is kept by rounding."""

import json
import operator
import re
from types import ModuleType

import pytest

from tests.kit.paths import ROOT

RIGHT = {"≤": operator.le, "≥": operator.ge}
MEASURED = json.loads((ROOT / "benchmarks" / "results.json").read_text(encoding="utf-8"))["results"]
PAGE = (ROOT / "results" / "README.md").read_text(encoding="utf-8")


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import speed_table

    return speed_table


def test_the_page_has_the_figures_that_were_measured(table: ModuleType) -> None:
    """Or run ``python benchmarks/speed_table.py``."""
    assert table.with_table(PAGE, table.speed_table(MEASURED)) == PAGE


def test_what_the_page_shows_is_what_it_says_of_it() -> None:
    """Each row's figure is the measured one and on the side of its promise that the verdict tells."""
    shown = re.findall(
        r"^\| (.+?) \| ([\d.]+) \[[\d., ]+\] \| (.*?) \| (kept|missed|) \|", PAGE, re.MULTILINE
    )
    rows = [row for part in MEASURED.values() for row in part["rows"]]
    assert len(shown) == len(rows) > 20
    for (name, figure, promise, verdict), row in zip(shown, rows, strict=True):
        median = next(iter(row["ratios"].values()))["median"]
        assert (name, promise, verdict) == (row["name"], row["promise"], row["verdict"])
        assert float(figure) == pytest.approx(median, abs=0.6 * 10.0 ** -len(figure.partition(".")[2]))
        if promise:
            sign, bound = promise.split()
            hidden = float(figure) == float(bound) == median  # beyond the digits that were kept
            assert hidden or verdict == ("kept" if RIGHT[sign](float(figure), float(bound)) else "missed")
    assert {name for name, *_ in shown} >= {"DiffusionMRP-v0", "TD(λ), own, on shifted grids", "sdpo"}


@pytest.mark.parametrize(
    ("median", "promise", "shown", "verdict"),
    [
        (1.0203, "≤ 1.02", "1.0203 [1.0103, 1.0303]", "missed"),
        (1.0199, "≤ 1.02", "1.020 [1.010, 1.030]", "kept"),
        (1.02, "≤ 1.02", "1.020 [1.010, 1.030]", "kept"),
        (14.9996, "≥ 15", "14.9996 [14.9896, 15.0096]", "missed"),
        (14.6, "≥ 15", "14.60 [14.59, 14.61]", "missed"),
        (1.314, "≤ 1.15", "1.31 [1.30, 1.32]", "missed"),
        (33.17, "≥ 10", "33.2 [33.2, 33.2]", "kept"),
        (1.064, "", "1.06 [1.05, 1.07]", ""),
    ],
)
def test_a_figure_near_its_promise_has_the_digits_to_tell(
    table: ModuleType, median: float, promise: str, shown: str, verdict: str
) -> None:
    """On the terminal and, by way of the file, on the page."""
    from report import Row, as_json
    from report import table as printed
    from timing import Ratio

    row = Row("name", 1.0, {"other": Ratio(median, median - 0.01, median + 0.01)}, promise)
    cells = [shown, promise, verdict]
    written = table.speed_table({"title": {"reads": "time over", "rows": as_json([row])}}).splitlines()
    assert written[2:] == ["| **title**: time over other | | | | |", f"| name | {' | '.join(cells)} |  |"]
    assert printed("title", "time over", [row]).splitlines()[1].split() == [
        "name",
        "1",
        "ms",
        *" ".join(cells).split(),
    ]


def test_a_page_without_a_place_for_the_table_is_refused(table: ModuleType) -> None:
    for page in ("", table.BEGIN, table.END + table.BEGIN, PAGE + PAGE):
        with pytest.raises(ValueError, match="put <!-- python .* around it, once"):
            table.with_table(page, "")
