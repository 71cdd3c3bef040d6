"""The snippets of docs/tour.md run one after the other, as a reader would type them."""

import re
from pathlib import Path

import pytest

from tests.kit.paths import ROOT

TOUR = (ROOT / "docs" / "tour.md").read_text(encoding="utf-8")


def test_the_snippets_run_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    snippets = re.findall(r"```python\n(.*?)```", TOUR, re.DOTALL)
    names: dict[str, object] = {}
    shapes = []
    for snippet in snippets:
        exec(compile(snippet, "tour.md", "exec"), names)
        shapes.append(tuple(getattr(names.get("samples"), "shape", ())))
    assert len(snippets) == 6 and shapes == [(), (), (64, 16), (64, 16), (64, 2), (64, 2)]
    assert (tmp_path / "model.safetensors").is_file()
    assert len(names["rows"]) == 21
