"""The library's own errors, and text files."""

import ast
from pathlib import Path

import pytest

from diffrl.errors import DiffrlError, FileError, InputError, InputKeyError, InputTypeError, of_group
from diffrl.text_files import file_errors, read_json, read_text, write_atomically, write_csv
from tests.kit.paths import ROOT


@pytest.mark.parametrize(
    ("error", "builtin"),
    [(InputError, ValueError), (InputTypeError, TypeError), (InputKeyError, KeyError), (FileError, OSError)],
)
def test_an_error_is_the_built_in_one_too_and_says_its_text(error: type, builtin: type) -> None:
    assert issubclass(error, DiffrlError) and issubclass(error, builtin)
    assert str(error("x is 2: give 1")) == "x is 2: give 1"


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("lmbda is 2: give 1", "objective.lmbda is 2: give 1"),
        ("give `lmbda`", "give objective.lmbda"),
        ("objective.lmbda is 2", "objective.lmbda is 2"),
        ("lmbdas differ", "lmbdas differ"),
    ],
)
def test_errors_name_an_option_as_it_is_typed(text: str, named: str) -> None:
    with pytest.raises(InputError) as caught, of_group("objective", ["lmbda", "gamma"]):
        raise InputError(text)
    assert str(caught.value) == named


def test_an_option_that_is_none_is_named_and_other_type_errors_pass() -> None:
    def make(a: int) -> None: ...

    with pytest.raises(InputTypeError, match=r"denoiser\.b is no option"), of_group("denoiser", ["b"]):
        make(b=1)  # type: ignore[call-arg]
    with pytest.raises(TypeError) as caught, of_group("denoiser", ["b"]):
        make(c=1)  # type: ignore[call-arg]
    assert not isinstance(caught.value, DiffrlError)


def test_text_is_utf_8_whatever_the_locale(tmp_path: Path) -> None:
    file = tmp_path / "köln.txt"
    write_atomically(file, "λ = ½")
    assert file.read_bytes() == "λ = ½".encode() and read_text(file) == "λ = ½"
    file.write_bytes(b"\xef\xbb\xbfcat")
    assert read_text(file) == "cat"  # without the mark of some editors


@pytest.mark.parametrize("text", ["", "{", "[1]", "[" * 100_000, "\xff\xfe"])
def test_a_damaged_file_is_named(tmp_path: Path, text: str) -> None:
    file = tmp_path / "results.json"
    file.write_bytes(text.encode("latin-1"))
    with pytest.raises(FileError, match=r"results\.json .*(restore it from a copy, or remove it|convert it)"):
        read_json(file)


def test_an_error_of_the_system_names_the_file_and_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"nowhere\.txt cannot be read \(No such file.*it is not there"):
        read_text(tmp_path / "nowhere.txt")
    with pytest.raises(FileError, match=r"cannot be written \(File name too long\): choose a shorter name"):
        write_atomically(tmp_path / ("n" * 300), "text")
    with pytest.raises(FileError, match="make room on the disk"), file_errors(tmp_path, "written"):
        raise OSError(28, "No space left on device")


def test_a_table_is_utf_8_and_leaves_out_what_a_row_lacks(tmp_path: Path) -> None:
    write_csv(tmp_path / "t.csv", ["λ", "loss"], [{"λ": 0.5}, {"λ": 1, "loss": 2}])
    assert read_text(tmp_path / "t.csv").splitlines() == ["λ,loss", "0.5,", "1,2"]


def test_a_name_that_the_locale_could_not_read_keeps_its_bytes(tmp_path: Path) -> None:
    write_atomically(tmp_path / "command.txt", "run_dir=k\udcc3\udcb6ln")
    assert read_text(tmp_path / "command.txt") == "run_dir=köln"


@pytest.mark.parametrize("room", ["diffrl", "envs", "configs", "examples", "benchmarks", "docs", "tests"])
def test_no_text_is_read_or_written_in_the_locale_s_encoding(room: str) -> None:
    """A rule of ruff looks at `open` and at what it knows to be a path; this looks at every method of that name."""

    def is_text(call: ast.Call) -> bool:
        name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
        owner = ast.unparse(call.func).split(".")[0]
        modes = [a.value for a in call.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
        by_method = isinstance(call.func, ast.Attribute) and name in ("read_text", "write_text")
        opened = name == "open" and owner not in ("os", "gzip", "archive", "Image", "cls", "RunFolder")
        return by_method or (opened and not any("b" in mode for mode in modes))

    for file in (ROOT / room).rglob("*.py"):
        for call in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(call, ast.Call) and is_text(call):
                assert any(word.arg == "encoding" for word in call.keywords), f"{file}:{call.lineno}"
