"""What every test process does once."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("RL_LOGGING_LEVEL", "WARNING")  # read when torchrl is imported

import torch  # noqa: E402

from diffrl import registry  # noqa: E402
from diffrl.experiments.reports.style import STYLE  # noqa: E402
from tests.kit.shell import Shell  # noqa: E402

torch.set_num_threads(1)  # the test processes run side by side

collect_ignore = ["toys"]  # doctests would import them, and so register them


@pytest.fixture(scope="session")
def shell() -> Iterator[Shell]:
    """Runs commands in processes of their own."""
    made = Shell()
    yield made
    made.close()


@pytest.fixture(autouse=True)
def no_methods_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers is no user's method in the next one, whose runs would ask for it."""
    monkeypatch.setattr(registry, "_USERS", dict(registry._USERS))


@pytest.fixture(scope="session", autouse=True)
def fonts() -> Iterator[object]:
    """The fonts of PDFs as the library has them; tests have outlines, as cutting fonts to size takes half a second."""
    published = STYLE["pdf.fonttype"]
    STYLE["pdf.fonttype"] = 3
    yield published
    STYLE["pdf.fonttype"] = published


@pytest.fixture
def unrendered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are composed and not rendered, which takes a second each: tests of figures render those of each kind."""
    from matplotlib.figure import Figure

    def savefig(self: Figure, path: Any, **options: Any) -> None:
        Path(path).write_bytes(b"unrendered")

    monkeypatch.setattr(Figure, "savefig", savefig)
