"""The metrics table as a file."""

from pathlib import Path

import pytest

from diffrl.errors import FileError
from diffrl.training.table import Table


def test_rows_are_appended_under_one_header(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    for i in range(3):  # as a resumed run would: a new object each time
        Table(path, ("step", "loss")).append({"step": i} if i == 1 else {"step": i, "loss": 0.5 * i})
    assert path.read_text(encoding="utf-8").splitlines() == ["step,loss", "0,0.0", "1,", "2,1.0"]
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
    assert table.path.read_text(encoding="utf-8").splitlines() == ["step", "0", "1", "2", "9"]
    table.keep(lambda row: False)
    assert not table.path.exists() and table.rows() == []
    assert list(tmp_path.iterdir()) == []


def test_only_an_unfinished_last_row_is_left_out_and_it_is_said(tmp_path: Path) -> None:
    table = Table(tmp_path / "t.csv", ("step", "loss"))
    table.append({"step": 1, "loss": 2})
    with table.path.open("a", encoding="utf-8") as file:
        file.write("2")
    with pytest.warns(RuntimeWarning, match=r"t\.csv ends with half a row, which is left out"):
        assert [row["step"] for row in table.rows()] == ["1"]
    with pytest.warns(RuntimeWarning, match="half a row"):
        table.keep(lambda row: True)
    assert table.path.read_text(encoding="utf-8").splitlines() == ["step,loss", "1,2"]
    assert [row["step"] for row in table.rows()] == ["1"]  # and no warning any more


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("step,loss\n1\n2,3\n", "line 2: 1 cells for 2 columns"),
        ("step,loss\n1,2,3\n", "line 2: 3 cells for 2 columns"),
        ("step,loss\n1,2\n1,two\n", "line 3: could not convert string to float: 'two'"),
        ("step,other\n1,2\n", "line 1: column 'other' is none of this run's"),
        ('step,loss\n1,"2\n', "unexpected end of data"),
        ("a text of somebody else\n", "none of this run's"),
    ],
)
def test_anything_else_is_named_with_its_line(text: str, says: str, tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text(text, encoding="utf-8")
    for read in (Table(path, ("step", "loss")).rows, lambda: Table(path, ("step", "loss")).keep(bool)):
        with pytest.raises(FileError, match=r"t\.csv is damaged") as refused:
            read()
        assert says in str(refused.value) and "\n" not in str(refused.value)
    assert path.read_text(encoding="utf-8") == text


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_bytes(b"step,loss\n\xff\xfe,1\n")
    with pytest.raises(FileError, match="not a text file in UTF-8"):
        Table(tmp_path / "t.csv", ("step", "loss")).rows()


def test_words_stand_in_columns_of_words(tmp_path: Path) -> None:
    table = Table(tmp_path / "t.csv", ("who", "step"), labels=("who",))
    table.append({"who": "λ", "step": 1})
    assert table.rows() == [{"who": "λ", "step": "1"}] and "λ".encode() in table.path.read_bytes()


def test_a_table_with_fewer_columns_is_brought_to_those_of_now(tmp_path: Path) -> None:
    Table(tmp_path / "t.csv", ("step",)).append({"step": 1})
    table = Table(tmp_path / "t.csv", ("loss", "step"))
    table.keep(lambda row: True)
    table.append({"step": 2, "loss": 0.5})
    assert table.rows() == [{"loss": "", "step": "1"}, {"loss": "0.5", "step": "2"}]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no full device")
def test_a_full_disk_is_named(tmp_path: Path) -> None:
    (tmp_path / "t.csv").symlink_to("/dev/full")
    with pytest.raises(FileError, match=r"t\.csv cannot be written \(No space left on device\): make room"):
        Table(tmp_path / "t.csv", ("step",)).append({"step": 1})
