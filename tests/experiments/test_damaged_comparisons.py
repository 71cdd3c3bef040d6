"""Folders of comparisons that somebody else writes to, or that are damaged, read-only or of something else."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from diffrl.configs.cells import plan_comparison
from diffrl.errors import DiffrlError
from diffrl.experiments.comparison import cell_error, run_cells
from diffrl.experiments.studies import Comparison, run_comparison
from diffrl.experiments.study_findings import StudyFindings
from diffrl.training.lock import folder_lock
from tests.experiments.test_comparison import plan, study
from tests.kit.configs import MC


@pytest.fixture(scope="module")
def made() -> Comparison:
    return plan_comparison(plan(a=study(seeds=[0], schemes={"MC": MC})))


@pytest.fixture(scope="module")
def finished(made: Comparison, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("finished")
    assert run_comparison(made, out, workers=0, progress=False).finished == 1
    return out


def in_one_line(out: Path, made: Comparison) -> str:
    """What both the command that runs it and the one that reports on it say, which must be the same."""
    said = []
    for use in (lambda: run_comparison(made, out, workers=0, progress=False), lambda: StudyFindings(out)):
        with pytest.raises(DiffrlError) as caught:
            use()
        said.append(str(caught.value))
    assert said[0] == said[1] and "\n" not in said[0]
    return said[0]


@pytest.mark.parametrize(
    "text",
    ["", "{", '{"cells": [', "[]", "null", "{}", '{"cells": {}}', '{"cells": [1], "commands": []}',
     '{"cells": [{"study": "a"}], "commands": []}', '{"cells": []}', "\udcff", "[" * 100_000],
)  # fmt: skip
def test_an_index_that_is_none_is_named(tmp_path: Path, made: Comparison, text: str) -> None:
    file = tmp_path / "index.json"
    file.write_bytes(text.encode(errors="surrogateescape"))
    before = file.read_bytes()
    assert str(file) in in_one_line(tmp_path, made)
    assert file.read_bytes() == before


@pytest.mark.parametrize(
    ("key", "value"),
    [("studies", None), ("studies", [{"name": "a"}]), ("plan", None), ("tuning", [{"study": "a"}])],
)
def test_an_index_without_its_studies_is_read_by_nobody_and_written_anew(
    finished: Path, made: Comparison, key: str, value: Any
) -> None:
    file = finished / "index.json"
    index: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    del index[key]
    file.write_text(json.dumps(index | ({key: value} if value else {})), encoding="utf-8")
    with pytest.raises(
        DiffrlError, match=r"index.json is damaged: .* the comparison's own command writes it anew"
    ):
        StudyFindings(finished)
    run_comparison(made, finished, workers=0, progress=False)
    assert StudyFindings(finished).cells[0].status == "finished"


def test_text_is_in_utf8_whatever_the_locale(finished: Path, tmp_path: Path) -> None:
    made = plan_comparison(plan(a=study(seeds=[0], schemes={"λ=1, köln": MC}, baseline="λ=1, köln")))
    run_comparison(made, tmp_path / "köln", workers=0, progress=False)
    assert "λ=1, köln" in (tmp_path / "köln" / "index.json").read_bytes().decode("utf-8")


def test_two_cannot_run_one_comparison(tmp_path: Path, made: Comparison) -> None:
    with (
        folder_lock(tmp_path),
        pytest.raises(DiffrlError, match=f"is being written by process {os.getpid()} on "),
    ):
        run_comparison(made, tmp_path, workers=0, progress=False)
    assert not (tmp_path / "index.json").exists()


def test_a_place_where_no_folder_can_be(tmp_path: Path, made: Comparison) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(DiffrlError, match=r"file/out.* cannot be written .*: a part of its path is a file"):
        run_cells(made.cells, tmp_path / "file" / "out", workers=0, progress=False)
    with pytest.raises(
        DiffrlError, match=r"file/\.lock cannot be written .*: a file is where a folder is to be"
    ):
        run_cells(made.cells, tmp_path / "file", workers=0, progress=False)


def test_a_reason_that_was_lost(tmp_path: Path) -> None:
    assert cell_error(tmp_path) is None
    (tmp_path / "error.txt").write_text("", encoding="utf-8")
    assert cell_error(tmp_path) == "no reason was written"
