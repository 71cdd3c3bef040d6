"""How large files and functions may be: one idea a file, and a function that is read in one go."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kit.paths import ROOT

LINKS = (ROOT / "diffrl" / "envs", ROOT / "diffrl" / "configs")  # to the folders at the root
LIBRARY = [
    path
    for folder in ("diffrl", "envs", "configs")
    for path in sorted((ROOT / folder).rglob("*.py"))
    if not any(path.is_relative_to(link) for link in LINKS)
]


def functions(path: Path) -> Iterator[tuple[str, int]]:
    """Name and lines of each function, its docstring not counted."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first, lines = node.body[0], (node.end_lineno or 0) - node.lineno + 1
            if ast.get_docstring(node) is not None:
                lines -= (first.end_lineno or 0) - first.lineno + 1
            yield node.name, lines


@pytest.mark.parametrize("path", LIBRARY, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_has_at_most_400_lines_and_a_function_50(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400
    assert {name: lines for name, lines in functions(path) if lines > 50} == {}


def test_readme_has_at_most_150_lines() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


def test_the_package_holds_rooms_and_ground_files_only() -> None:
    found = {p.name for p in (ROOT / "diffrl").iterdir() if p.name != "__pycache__"}
    rooms = {
        "data",
        "rl",
        "diffusion",
        "objectives",
        "rewards",
        "metrics",
        "training",
        "finetuning",
        "experiments",
    }
    ground = {
        *(
            "errors.py",
            "extras.py",
            "keys.py",
            "moved.py",
            "ranges.py",
            "ranks.py",
            "registry.py",
            "shapes.py",
        ),
        *("devices.py", "shell_words.py", "text_files.py", "text_tables.py", "worker_kinds.py", "workers.py"),
    }
    assert found == rooms | ground | {
        "__init__.py",
        "__init__.pyi",
        "__main__.py",
        "py.typed",
        "envs",
        "configs",
    }
