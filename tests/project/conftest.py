"""Fixtures of the tests that throw bad inputs at the commands."""

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.kit.bad_inputs import FAST, SECONDS, Hangs, throw


@pytest.fixture
def quiet_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A folder of its own, and an end to what hangs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)

    def hang(number: int, frame: Any) -> None:
        raise Hangs(f"took more than {SECONDS} s")

    old = signal.signal(signal.SIGALRM, hang)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, old)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished training run, `base`, and a finished fine-tuning run of it, `tuned`."""
    folder = tmp_path_factory.mktemp("runs")
    assert throw("train", [*FAST["train"], f"run_dir={folder / 'base'}"], begin=True, real=True) == ""
    words = [*FAST["finetune"], f"model.path={folder / 'base'}", f"run_dir={folder / 'tuned'}"]
    assert throw("finetune", words, begin=True, real=True) == ""
    return folder
