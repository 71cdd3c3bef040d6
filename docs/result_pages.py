"""Pages of the results: what each folder of `results/` says of itself, on the site, and links where a page names it."""

import os.path
import re
from pathlib import Path
from typing import Any

from docs.docstrings import write_folder

__all__ = ["link_included", "link_results", "link_sources", "named_pages", "result_page", "write_results"]

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parent
PLACE = "measured"
NAMED = re.compile(r"(?<!\[)`((?:results|docs)/[\w/]+\.md)`")
LINK = re.compile(r"\[([^\]]*)\]\((?!https?:|#)([^)#\s]+)(#[^)\s]*)?\)")


def named_pages() -> dict[str, str]:
    """Where the site has a file of the repository that a text may name: by its path from the root, the page's.

    Reports with all their figures are left out.
    """
    found = {f"docs/{path.name}": path.name for path in FOLDER.glob("*.md")}
    found["results/README.md"] = "results.md"
    for path in sorted(ROOT.glob("results/*/*.md")):
        if path.name != "report.md":
            name = path.parent.name if path.name == "README.md" else f"{path.parent.name}_{path.stem}"
            found[path.relative_to(ROOT).as_posix()] = f"{PLACE}/{name}.md"
    return found


def link_results(text: str, page: str) -> str:
    """The text of a page with a link in place of each file that it names and that the site has.

    Args:
        text: Markdown.
        page: the page's path below `docs`, such as ``limits.md``.
    """
    pages = named_pages()

    def link(match: re.Match[str]) -> str:
        file = match[1]
        if pages.get(file, page) == page:
            return match[0]
        return f"[{file.removesuffix('.md').removesuffix('/README')}]({_from(page, pages[file])})"

    return NAMED.sub(link, text)


def result_page(file: str) -> str:
    """The page of a file, its links and pictures led to where they are from there.

    Args:
        file: path from the root, one of `named_pages`.
    """
    pages, here = named_pages(), Path(file).parent
    page = pages[file]

    def led(match: re.Match[str]) -> str:
        words, target, anchor = match[1], os.path.normpath(here / match[2]), match[3] or ""
        if target in pages:
            return f"[{words}]({_from(page, pages[target])}{anchor})"
        if target.endswith(".md"):
            return f"{words} (`{target}`)"
        return f"[{words}]({_from(page, f'../{target}')})"

    return link_results(LINK.sub(led, (ROOT / file).read_text(encoding="utf-8")), page)


def write_results(folder: Path) -> None:
    """Write the page of every file of the results that has one."""
    pages = {file: Path(page).name for file, page in named_pages().items() if page.startswith(f"{PLACE}/")}
    write_folder(folder, {page: result_page(file) for file, page in pages.items()})


def link_sources(app: Any, name: str, source: list[str]) -> None:
    """What Sphinx calls with the text of every page that it reads."""
    if not name.startswith(f"{PLACE}/"):
        source[0] = link_results(source[0], f"{name}.md")


def link_included(app: Any, path: Any, name: str, content: list[str]) -> None:
    """What Sphinx calls with the text that a page includes."""
    content[0] = link_results(content[0], f"{name}.md")


def _from(page: str, target: str) -> str:
    return os.path.relpath(target, Path(page).parent)
