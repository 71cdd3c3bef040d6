"""What the reports of all comparisons share: the table of commands, and the file of all numbers."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffrl.text_files import write_atomically
from diffrl.text_tables import markdown_table

__all__ = ["commands_table", "folded", "reward_label", "write_summary"]

LONG = 24  # rows; a longer table is folded away


def commands_table(commands: Sequence[Mapping[str, Any]]) -> str:
    """The commands that a comparison was run with, in Markdown.

    Args:
        commands: as the index of the comparison has them.
    """
    rows = [["command", "started", "cells", "wall time"]]
    for command in commands:
        seconds = command.get("seconds")
        took = "stopped" if seconds is None else f"{seconds / 60:.1f} min"
        rows.append([f"`{command['command']}`", command["started"], str(command.get("cells", "")), took])
    return markdown_table(rows)


def folded(title: str, rows: list[list[str]], *, fold: bool = False) -> str:
    """A table with a title, in Markdown; folded away if it is long, or where `fold` asks for it."""
    if fold or len(rows) > LONG:
        return f"<details><summary>{title}</summary>\n\n{markdown_table(rows)}\n</details>\n"
    return f"**{title}**\n\n{markdown_table(rows)}"


def reward_label(config: Mapping[str, Any]) -> str:
    """Name of a reward for people, such as "class probability (target=7)".

    Args:
        config: the part of a configuration that names it; options that are off are left out.
    """
    options = ", ".join(f"{k}={v}" for k, v in config.items() if k != "name" and v not in (None, False))
    name = config["name"].replace("_", " ")
    return f"{name} ({options})" if options else name


def write_summary(out: Path, summary: Mapping[str, Any]) -> None:
    """Write every number of a report to summary.json in the folder of the comparison."""
    write_atomically(out / "summary.json", json.dumps(summary, indent=1, ensure_ascii=False))
