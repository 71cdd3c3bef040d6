"""A run whose data worker processes read ahead, stopped and killed again and again: it ends as one without them.

python -m pytest -m soak tests/soak/test_reading_ahead.py        # a minute
"""

import signal
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.kit.processes import Running, ended, members, send, start, wait_until, workers
from tests.kit.run_states import assert_equal, state

pytestmark = [pytest.mark.soak, pytest.mark.timeout(600)]

SECONDS = 30  # from a kill to the end of all; a worker looks for its parent every 5
WORDS = (
    *(
        "data=folder",
        "data.mapped=true",
        "network=mlp",
        "network.hidden=8",
        "network.depth=1",
        "compare=false",
    ),
    *("data.test_fraction=0.25", "chain.num_steps=4", "trainer.batch_size=4", "trainer.grad_steps=400"),
    *("trainer.report_every=1", "trainer.eval_every=200", "trainer.checkpoint_every=20"),
    *("eval.points=16", "eval.samples=16", "eval.num_steps=[2,3]"),
)
RNG = np.random.default_rng(5)


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    """The command but for its workers and its folder."""
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(40):
        Image.fromarray(RNG.integers(0, 256, (4, 4), dtype=np.uint8)).save(folder / f"{i}.png")
    return ["train", *WORDS, f"data.path={folder}"]


def rows_of(folder: Path) -> int:
    table = folder / "metrics.csv"
    return len(table.read_bytes().splitlines()) if table.exists() else 0


def until_it_reads_ahead(running: Running, folder: Path) -> list[int]:
    """Its workers, once it has taken some more steps."""
    known = rows_of(folder)
    wait_until(lambda: rows_of(folder) > known + 25 and len(workers(running)) == 2, running)
    return workers(running)


def test_interrupted_it_ends_the_same_and_leaves_no_worker(tmp_path: Path, words: list[str]) -> None:
    code, said = ended(start(*words, "data.workers=0", f"run_dir={tmp_path}/whole"))
    assert code == 0, said
    folder = tmp_path / "run"
    command = [*words, "data.workers=2", f"run_dir={folder}"]
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
        running = start(*command)
        assert len(until_it_reads_ahead(running, folder)) == 2
        send(number, [running.pid])
        begun = time.monotonic()
        code, said = ended(running, SECONDS)
        print(f"{number.name}: all ended after {time.monotonic() - begun:.1f} s with status {code}")
        while left := members(running):  # one that has closed its files may still be about to end
            assert time.monotonic() < begun + SECONDS, left
            time.sleep(0.1)
        assert "Traceback" not in said
        assert code == (-number if number == signal.SIGKILL else 1)
        assert ("stopped after gradient step" in said) == (number != signal.SIGKILL)
        command = ["train", f"resume={folder}"]
    code, said = ended(start(*command))
    assert code == 0, said
    found, expected = state(folder), state(tmp_path / "whole")
    for known in (found, expected):
        known["results"]["config"]["data"].pop("workers")
    assert_equal(found, expected)
