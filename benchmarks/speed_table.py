"""The table of speed in results/README.md, made of benchmarks/results.json; `make bench` writes both.

python benchmarks/speed_table.py    # the table alone, of the figures as they are
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from report import shown
from timing import Ratio

from diffrl.text_files import write_atomically

__all__ = ["RESULTS", "speed_table", "with_table", "write"]

RESULTS = Path(__file__).with_name("results.json")
PAGE = Path(__file__).parents[1] / "results" / "README.md"
BEGIN, END = "<!-- python benchmarks/speed_table.py writes this table -->\n\n", "\n<!-- it ends here -->\n"


def speed_table(parts: Mapping[str, Mapping[str, Any]]) -> str:
    """All rows of all parts in Markdown, each with its verdict and what else it was compared with.

    Args:
        parts: what `results.json` has under "results": title → "reads" and "rows" (`report.as_json`).
    """
    lines = ["| | ratio | promised | | over others |", "|---|---|---|---|---|"]
    for title, part in parts.items():
        lines.append(f"| **{title}**: {part['reads']} {next(iter(part['rows'][0]['ratios']))} | | | | |")
        for row in part["rows"]:
            promise, verdict = row["promise"], row["verdict"]
            (_, ratio), *others = ((name, Ratio(**x)) for name, x in row["ratios"].items())
            cells = (
                *(row["name"], shown(ratio, promise, verdict), promise, verdict),
                ", ".join(f"{name} {x.median:.2f}" for name, x in others),
            )
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def with_table(text: str, table: str) -> str:
    """A page with this table in place of the one between its two comments.

    Raises:
        ValueError: if the comments are not there, once each and in order.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end or BEGIN in rest or END in after:
        raise ValueError(f"the table stands nowhere: put {BEGIN.strip()} and {END.strip()} around it, once")
    return before + BEGIN + table + END + after


def write() -> None:
    """Write the table anew."""
    parts = json.loads(RESULTS.read_text(encoding="utf-8"))["results"]
    write_atomically(PAGE, with_table(PAGE.read_text(encoding="utf-8"), speed_table(parts)))


if __name__ == "__main__":
    write()
