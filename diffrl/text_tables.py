"""Tables of text: aligned for a terminal, or in Markdown; `tabulate` lays them out."""

from collections.abc import Sequence

from tabulate import SEPARATING_LINE, tabulate

__all__ = ["markdown_table", "text_table"]

Rows = Sequence[Sequence[str]]


def text_table(rows: Rows) -> str:
    """A table for a terminal: the first row is its head, and an empty row is a line across it.

    The first column is flush left, the others are flush right.

    >>> print(text_table([["", "TD", "MC"], ["value error", "0.62", "1.00"], [], ["seconds", "1.84", "12"]]))
                   TD    MC
    -----------  ----  ----
    value error  0.62  1.00
    -----------  ----  ----
    seconds      1.84    12
    """
    head, *body = _whole(rows)
    sides = ["left", *["right"] * (len(head) - 1)]
    lines = [row or SEPARATING_LINE for row in body]
    return tabulate(lines, head, tablefmt="simple", disable_numparse=True, colalign=sides)


def markdown_table(rows: Rows) -> str:
    r"""A table in Markdown: the first row is its head; a line feed ends it.

    >>> print(markdown_table([["scheme", "error"], ["TD", "0.62"], ["MC", "|x|"]]), end="")
    | scheme   | error   |
    |----------|---------|
    | TD       | 0.62    |
    | MC       | \|x\|   |
    """
    head, *body = [[cell.replace("|", "\\|") for cell in row] for row in _whole(rows)]
    return tabulate(body, head, tablefmt="github", disable_numparse=True) + "\n"


def _whole(rows: Rows) -> Rows:
    """The rows, if each but an empty one is as long as the head: tabulate would shift a shorter head to the right."""
    if wrong := [row for row in rows if row and len(row) != len(rows[0])]:
        raise ValueError(f"a row of {len(wrong[0])} cells in a table of {len(rows[0])} columns: {wrong[0]}")
    return rows
