"""What every test process does once."""

import os
from collections.abc import Iterator

import pytest

os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("RL_LOGGING_LEVEL", "WARNING")  # read when torchrl is imported

import torch  # noqa: E402

from tests.kit.shell import Shell  # noqa: E402

torch.set_num_threads(1)  # the test processes run side by side

collect_ignore = ["toys"]  # doctests would import them, and so register them


@pytest.fixture(scope="session")
def shell() -> Iterator[Shell]:
    """Runs commands in processes of their own."""
    made = Shell()
    yield made
    made.close()
