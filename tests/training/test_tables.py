"""The metrics table as a file."""

from pathlib import Path

import pytest

from diffrl.training.table import Table


def test_rows_are_appended_under_one_header(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    for i in range(3):  # as a resumed run would: a new object each time
        Table(path, ("step", "loss")).append({"step": i} if i == 1 else {"step": i, "loss": 0.5 * i})
    assert path.read_text().splitlines() == ["step,loss", "0,0.0", "1,", "2,1.0"]
    assert Table(path, ("step", "loss")).rows()[1] == {"step": "1", "loss": ""}


def test_numbers_keep_every_bit(tmp_path: Path) -> None:
    table = Table(tmp_path / "t.csv", ("x",))
    table.append({"x": 0.1 + 0.2})
    assert float(table.rows()[0]["x"]) == 0.1 + 0.2


def test_a_figure_without_a_column_is_refused(tmp_path: Path) -> None:
    with pytest.raises(KeyError, match="no column for loss"):
        Table(tmp_path / "t.csv", ("step",)).append({"step": 1, "loss": 2.0})
    assert not (tmp_path / "t.csv").exists()


def test_keep(tmp_path: Path) -> None:
    table = Table(tmp_path / "t.csv", ("step",))
    table.keep(lambda row: False)  # there is nothing yet
    for i in range(5):
        table.append({"step": i})
    table.keep(lambda row: int(row["step"]) <= 2)
    assert [row["step"] for row in table.rows()] == ["0", "1", "2"]
    table.append({"step": 9})
    assert table.path.read_text().splitlines() == ["step", "0", "1", "2", "9"]
    table.keep(lambda row: False)
    assert not table.path.exists() and table.rows() == []
    assert list(tmp_path.iterdir()) == []


def test_a_row_cut_short_does_not_count(tmp_path: Path) -> None:
    table = Table(tmp_path / "t.csv", ("step", "loss"))
    table.append({"step": 1, "loss": 2})
    with table.path.open("a") as file:
        file.write("2")
    assert [row["step"] for row in table.rows()] == ["1"]
    table.keep(lambda row: True)
    assert table.path.read_text().splitlines() == ["step,loss", "1,2"]
