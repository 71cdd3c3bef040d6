"""The edge of a command: whatever a user can mend is one line, in letters that the output can take."""

import io
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf
from safetensors.torch import load

from diffrl.configs.boundary import reported
from diffrl.configs.cli import check_words, command
from diffrl.configs.groups import commands_with, register
from diffrl.configs.output import write_utf8
from diffrl.errors import InputError
from diffrl.shell_words import requoted, setting
from tests.kit.configs import FINETUNING, SMALL
from tests.kit.paths import ROOT
from tests.kit.shell import Shell

CONFIG = {
    "trainer": {"batch_size": 16},
    "eval": {"samples": 10**12, "points": 8},
    "network": {"hidden": None},
}


def said(error: BaseException) -> str:
    """What is printed of an error."""
    with pytest.raises(SystemExit) as stop, reported(config=CONFIG, full=False):
        raise error
    assert isinstance(stop.value.code, str) and "\n" not in stop.value.code
    return stop.value.code


def torch_error() -> BaseException:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**59)
    return caught.value


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (OSError(28, "No space left on device", "out.png"), "out.png: No space left on device: make room on the disk"),
        (ConnectionResetError("gone"), "a file or connection: gone"),
        (MemoryError(), "not enough memory: lower eval.samples (now 1000000000000), trainer.batch_size (now 16)"),
        (torch.OutOfMemoryError("CUDA out of memory"), "not enough memory: lower eval.samples"),
        (torch_error(), "not enough memory: lower eval.samples"),
        (KeyboardInterrupt(), "error: interrupted"),
    ],
)  # fmt: skip
def test_errors_from_outside_are_one_line(error: BaseException, text: str) -> None:
    assert text in said(error)


def test_a_damaged_safetensors_file_is_one_line() -> None:
    with pytest.raises(SystemExit, match="safetensors file is damaged"), reported(full=False):
        load(b"x" * 100)


@pytest.mark.parametrize("error", [RuntimeError("shape"), ValueError("x"), KeyError("x"), TypeError("x")])
def test_programming_errors_keep_their_traceback(error: Exception) -> None:
    with pytest.raises(type(error)), reported(full=False):
        raise error


def test_a_reader_that_leaves_ends_a_command_quietly() -> None:
    words = f"{shlex.quote(sys.executable)} -W ignore -m diffrl train --help | head -n 1"
    ran = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {words}"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert ran.stdout.startswith("Train a denoiser") and ran.stderr == ""


# Words that mean what they hold

NAMES = [
    "köln",
    "a b",
    "a=b",
    "a[1]",
    "a(1)",
    "a'b",
    'a"b',
    "$HOME",
    "a${b}",
    "a\\${b}",
    "a\\",
    "null",
    "1e3",
    "inf",
]


@pytest.mark.parametrize(
    "name", [*NAMES, "{a}", "a,b", "~x", "@x", "a#b", "-x", "a\nb", " a", "", "runs/a-1.b"]
)
def test_a_printed_word_is_read_as_what_it_holds(name: str) -> None:
    (word,) = shlex.split(setting("resume", name))
    config = OmegaConf.create({"resume": None})
    OmegaConf.update(config, "resume", OverridesParser.create().parse_override(word).value())
    assert config.resume == name


@pytest.mark.parametrize(
    "word", ["run_dir=köln", "run_dir=a b=c", "run_dir=a'b", "x=[trainer.grad_steps=500]"]
)
def test_advice_on_quoting_can_be_read(word: str) -> None:
    _, advised = requoted(word).split(" as in ")
    (quoted,) = shlex.split(advised)
    value = OverridesParser.create().parse_override(quoted).value()
    assert (
        f"x=[{','.join(map(str, value))}]" == word if isinstance(value, list) else f"run_dir={value}" == word
    )


@pytest.mark.parametrize(
    "word", ["data=3", "data=null", "process=1.5", "experiment=true", "objective=1", "plan=null", "recipe=3"]
)
def test_a_group_takes_names_only(word: str) -> None:
    register()
    with pytest.raises(InputError, match="is a group: give the name of one of its options"):
        check_words([word])


def test_help_lists_what_the_command_has(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = {}
    for name in ("train", "finetune", "compare"):
        monkeypatch.setattr(sys, "argv", [name, "--help"])
        with pytest.raises(SystemExit):
            command(name)(lambda config: None)()
        text = capsys.readouterr().out.partition("===\n")[2].partition("\n\n")[0]
        shown[name] = dict(line.split(": ", 1) for line in text.splitlines())
        assert all(name in commands_with(g) for g in shown[name] if g not in ("experiment", "recipe"))
    assert "credit" not in shown["train"] and "objective" not in shown["finetune"]
    assert "sd15_ddpo" not in shown["train"]["experiment"] and "gmm16" in shown["train"]["experiment"]
    assert set(shown["finetune"]["experiment"].split(", ")) == FINETUNING
    assert list(shown["compare"]) == ["plan"]


# Letters


@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "utf-8"])
@pytest.mark.parametrize(
    ("given", "printed"),
    [
        ("λ=½", "λ=½"),
        (os.fsdecode(b"\xff.png"), "\xff.png"),
        ("k\udcc3\udcb6ln", "köln"),
        ("\ud800", "\\ud800"),
    ],
)
def test_files_and_pipes_get_utf_8(
    encoding: str, given: str, printed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Names keep the bytes that the locale could not read; what is no letter at all is told by its code."""
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding))
    write_utf8()
    print(given, flush=True)
    assert raw.getvalue() == printed.encode("latin-1" if "\xff" in printed else "utf-8") + os.linesep.encode()


def test_a_terminal_without_greek_letters_gets_their_code(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.TextIOWrapper):
        def isatty(self) -> bool:
            return True

    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", Terminal(raw, encoding="cp1252"))
    write_utf8()
    print("λ=½", flush=True)
    assert raw.getvalue() == b"\\u03bb=\xbd" + os.linesep.encode()


@pytest.mark.slow
def test_a_run_in_a_locale_of_ascii(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder called köln, λ in tables and figures, a second run from the first one's file."""
    for name in [name for name in os.environ if name.startswith("LC_")]:
        monkeypatch.delenv(name)
    ascii_only = Shell(LC_ALL="C", PYTHONUTF8="0")
    folder = tmp_path / "köln"
    folder.mkdir()

    def shell(*words: str) -> str:
        return ascii_only("-m", "diffrl", *words, folder=folder)

    assert "TD(λ=0.5)" in shell("train", *SMALL, "objective.lmbda=0.5", 'run_dir="λ=½"')
    assert "TD(λ=0.5)" in shell("train", *shlex.split(setting("resume", "λ=½")))
    assert (folder / shell("sample", "λ=½", "--nfe", "3", "--out", "bild_ä.png").strip()).exists()
    assert "λ=½" in (folder / "λ=½" / "command.txt").read_text(encoding="utf-8")
    ascii_only.close()
