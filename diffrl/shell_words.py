"""Words of a command line that mean what they hold: quoted for Hydra, and for the shell."""

import re
import shlex
from pathlib import Path

from hydra.core.override_parser.types import Quote, QuotedString

__all__ = ["override", "requoted", "setting"]

PLAIN = re.compile(r"(?!(null|true|false|nan|inf)$)[a-z_/][\w/.:-]*", re.IGNORECASE | re.ASCII)
"""What Hydra reads as the same text without quotes."""

KEY = re.compile(r"[+~]{0,2}[\w./@:-]+", re.ASCII)
"""What can stand before ``=``."""


def override(key: str, value: str | Path) -> str:
    r"""The word ``key=value`` as Hydra takes it.

    >>> override("run_dir", "runs/a"), override("run_dir", "a=b"), override("run_dir", "${x}")
    ('run_dir=runs/a', 'run_dir="a=b"', 'run_dir="\\${x}"')
    """
    return f"{key}={_as_text(value)}"


def setting(key: str, value: str | Path) -> str:
    """The word ``key=value`` as it is typed in a shell.

    >>> print(setting("resume", "runs/a=b"))
    'resume="runs/a=b"'
    """
    return shlex.quote(override(key, value))


def requoted(word: str) -> str:
    """How to write a word that Hydra cannot read.

    >>> requoted("data.path=~/pictures")
    'a shell does not replace ~ there: write data.path=$HOME/pictures'
    >>> print(requoted("words=[trainer.grad_steps=500, b]"))
    quote what it holds, as in 'words=["trainer.grad_steps=500",b]'
    """
    key, equals, value = word.partition("=")
    if not equals or not KEY.fullmatch(key):
        return "write key=value, without spaces around ="
    if value.startswith("~/"):
        return f"a shell does not replace ~ there: write {key}=$HOME{value[1:]}"
    if value.startswith("[") and value.endswith("]"):
        text = f"[{','.join(_as_text(part.strip()) for part in value[1:-1].split(','))}]"
    else:
        text = _as_text(value)
    advice = f"quote what it holds, as in {shlex.quote(f'{key}={text}')}"
    if value.startswith("[") and not value.endswith("]"):
        advice += f"; or, if a list is meant, close it and quote it whole: '{key}=[1,2]'"
    return advice


def _as_text(value: str | Path) -> str:
    """A text as Hydra's grammar writes it."""
    text = re.sub(r"(\\*)\$\{", r"\1\1\\${", str(value))  # else OmegaConf looks up a key of that name
    return text if PLAIN.fullmatch(text) else str(QuotedString(text, Quote.double).with_quotes())
