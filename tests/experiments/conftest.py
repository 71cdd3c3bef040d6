"""Runs that several files of this folder look at."""

import pytest

from diffrl.training.runs import RunFolder
from tests.kit.runs import run


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A run that was not interrupted."""
    return run(tmp_path_factory.mktemp("whole") / "run")
