"""Docstrings in Google style, taken apart into Markdown; and a folder of pages written from them."""

import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from textwrap import dedent

__all__ = ["Docstring", "markdown", "write_folder"]

SECTIONS = ("Args", "Attributes", "Returns", "Raises")


@dataclass(frozen=True)
class Docstring:
    """A docstring in Google style, taken apart.

    Args:
        summary: first paragraph.
        intro: the paragraphs up to the first formula, as Markdown.
        formula: what follows from there: formulas, which are indented, and the words about them.
        sources: paragraphs that begin with "Source".
        args: description of each parameter.
    """

    summary: str
    intro: list[str]
    formula: list[str]
    sources: list[str]
    args: dict[str, str]

    @classmethod
    def of(cls, thing: object) -> "Docstring":
        """The docstring of a class or function; an empty one if it has none."""
        text = inspect.getdoc(thing) or ""
        head, sections = _sections(text)
        summary, *rest = _blocks(head) or [""]
        sources = [" ".join(b.split()) for b in rest if re.match(r"Sources?:", b)]
        words = [b for b in rest if not re.match(r"Sources?:", b)]
        first = next((j for j, b in enumerate(words) if b.startswith("    ")), len(words))
        intro, formula = ([markdown(b) for b in part] for part in (words[:first], words[first:]))
        return cls(" ".join(summary.split()), intro, formula, sources, _items(sections.get("Args", "")))


def _sections(text: str) -> tuple[str, dict[str, str]]:
    parts = re.split(rf"^({'|'.join(SECTIONS)}):\n", text, flags=re.MULTILINE)
    return parts[0], dict(zip(parts[1::2], map(dedent, parts[2::2]), strict=True))


def _blocks(text: str) -> list[str]:
    """Paragraphs; neighbouring indented ones are one formula."""
    blocks: list[str] = []
    for block in re.split(r"\n\s*\n", text.strip("\n")):
        if blocks and block.startswith("    ") and blocks[-1].startswith("    "):
            blocks[-1] += f"\n\n{block}"
        elif block.strip():
            blocks.append(block)
    return blocks


def _items(text: str) -> dict[str, str]:
    """`name: description` items of a section."""
    items = re.split(r"^(\**\w+)(?: \([^)]*\))?:\s", text, flags=re.MULTILINE)
    return {name.lstrip("*"): " ".join(of.split()) for name, of in zip(items[1::2], items[2::2], strict=True)}


def markdown(text: str) -> str:
    """A paragraph of a docstring as Markdown: the same words, with nothing taken for markup by mistake."""
    if text.startswith("    "):
        return f"```text\n{dedent(text)}\n```"
    if text.startswith(">>>"):
        return f"```python\n{text}\n```"
    if text.startswith("|"):
        return text
    pieces = re.split(r"(``.+?``|`.+?`|https?://[^\s,;)]+)", text, flags=re.DOTALL)
    return "".join(_inline(piece) for piece in pieces)


def _inline(piece: str) -> str:
    if piece.startswith("`"):
        return piece
    if re.match("https?://", piece):
        url = piece.rstrip(".")
        return f"<{url}>{piece[len(url) :]}"
    return re.sub(r"([*<\[\]\\])", r"\\\1", piece)


def write_folder(folder: Path, wanted: Mapping[str, str]) -> None:
    """Make the Markdown below a folder these pages and no others; what has not changed is left untouched.

    Args:
        folder: made if it is missing.
        wanted: text by path below the folder.
    """
    for path in set(folder.rglob("*.md")) - {folder / name for name in wanted}:
        path.unlink()
    for name, text in wanted.items():
        path = folder / name
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
