"""docs/reliability.md: each row names a fault, what happens, and a test that is there."""

import re

import pytest

from tests.kit.paths import ROOT

PAGE = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
ROWS = [
    [cell.strip() for cell in line.strip("|").split(" | ")]
    for line in PAGE.splitlines()
    if line.startswith("| ") and not line.startswith("| fault |")
]


def names_a_test(text: str) -> bool:
    """Whether the text is the name of one test of this repository, such as `tests/a.py::test_b`."""
    named = re.fullmatch(r"`(tests/[\w/]+\.py)::(test_\w+)`", text)
    if named is None or not (ROOT / named[1]).is_file():
        return False
    return f"\ndef {named[2]}(" in (ROOT / named[1]).read_text(encoding="utf-8")


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0].replace(" ", "_"))
def test_a_row_names_a_fault_what_happens_and_a_test(row: list[str]) -> None:
    fault, happens, test = row
    assert fault and happens
    assert names_a_test(test), test


def test_a_test_that_is_not_there_is_noticed() -> None:
    assert names_a_test("`tests/project/test_reliability.py::test_a_test_that_is_not_there_is_noticed`")
    assert not names_a_test("`tests/project/test_reliability.py::test_nothing`")
    assert not names_a_test("`tests/project/test_nowhere.py::test_a_test_that_is_not_there_is_noticed`")


def test_faults_of_every_kind_are_there_once() -> None:
    assert len({fault for fault, *_ in ROWS}) == len(ROWS)
    text = PAGE.lower()
    for kind in (
        "killed",
        "sigterm",
        "lock",
        "damaged",
        "disk is full",
        "data",
        "worker",
        "sweep",
        "utf-8",
        "memory",
    ):
        assert kind in text
