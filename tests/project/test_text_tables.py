"""Tables of text keep every cell as it was written."""

import csv
import io
from collections.abc import Callable

import pytest

from diffrl.text_tables import markdown_table, text_table


def test_numbers_and_signs_are_kept_as_written() -> None:
    lines = text_table([["", "TD(λ=0.5)"], ["σ = 0.1", "0.620"], ["evaluations", "1,000"], ["x", "1e-3"]])
    head, rule, *body = lines.splitlines()
    assert [line.split("  ")[-1].strip() for line in (head, *body)] == ["TD(λ=0.5)", "0.620", "1,000", "1e-3"]
    assert set(rule) == {"-", " "} and {len(line) for line in (head, *body)} == {len(rule)}


def test_an_empty_row_is_a_line() -> None:
    lines = text_table([["a", "b"], ["1", "2"], [], ["3", "4"]]).splitlines()
    assert lines[3] == lines[1] == "---  ---"


@pytest.mark.parametrize("rows", [[], [["x | y", "**1.00**"]], [["λ", ""], ["", "0.10 [0.05, 0.20]"]]])
def test_markdown_reads_back(rows: list[list[str]]) -> None:
    text = markdown_table([["scheme", "n|m"], *rows])
    plain = text.replace("\\|", "¦")
    head, rule, *body = list(csv.reader(io.StringIO(plain), delimiter="|"))
    assert set("".join(rule)) == {"-"} and text.endswith("|\n")
    read = [[cell.strip().replace("¦", "|") for cell in line[1:-1]] for line in (head, *body)]
    assert read == [["scheme", "n|m"], *rows]


@pytest.mark.parametrize("table", [text_table, markdown_table])
@pytest.mark.parametrize("row", [["1"], ["1", "2", "3"]])
def test_a_row_of_another_length_is_refused(table: Callable[[list[list[str]]], str], row: list[str]) -> None:
    with pytest.raises(ValueError, match=rf"a row of {len(row)} cells in a table of 2 columns"):
        table([["a", "b"], row])
