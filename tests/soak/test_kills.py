"""Commands killed at random moments, again and again: what they end with is what an uninterrupted one ends with.

python -m pytest -m soak tests/soak/test_kills.py        # minutes; writes results/soak/README.md
"""

import multiprocessing
import os
import random
import signal
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from diffrl import __main__ as commands
from diffrl.text_files import write_atomically
from diffrl.text_tables import markdown_table
from tests.kit.configs import SMALL, TINY
from tests.kit.paths import ROOT
from tests.kit.processes import members_of, send
from tests.kit.run_states import assert_equal, state

Hits = list[tuple[signal.Signals, bool]]
"""Signals to send, and whether to the command alone or to all that it has started."""

FORK = multiprocessing.get_context("fork")  # from a process that has imported everything: kills hit work
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")

TRAINING = [
    *(word for word in SMALL if not word.startswith("trainer.")),
    *("trainer.grad_steps=400", "trainer.batch_size=8", "trainer.report_every=5", "trainer.eval_every=100"),
    "trainer.checkpoint_every=20",
]
TUNING = [
    *(
        "compare=[]",
        "reward=mode_distance",
        "reward.point=[0.8,0]",
        "heldout_reward=none",
        "policy.num_steps=4",
    ),
    *("rollouts.trajectories=16", "loop.iterations=60", "loop.eval_every=15", "loop.checkpoint_every=5"),
    "evaluation.samples=32",
]
CELL = [
    *TINY,
    *("trainer.grad_steps=600", "trainer.report_every=20", "trainer.eval_every=200"),
    "trainer.checkpoint_every=50",
]
COMPARISON = [
    *(
        "plan=quick",
        "studies=[schemes]",
        "plan.tuning.enabled=false",
        "plan.studies.schemes.cases=[gmm16]",
        "plan.studies.schemes.seeds=[0]",
    ),
    f"plan.cases.gmm16=[{','.join(map(repr, CELL))}]",
]


def words(kind: str, place: Path, base: Path) -> list[str]:
    """The command that makes or continues what lies in a folder."""
    if (place / "config.yaml").exists():
        return [kind, f"resume={place}"]
    return {
        "train": ["train", *TRAINING, f"run_dir={place}"],
        "finetune": ["finetune", *TUNING, f"model.path={base}", f"run_dir={place}"],
        "compare": ["compare", *COMPARISON, f"out={place}"],
    }[kind]


class Command:
    """A command in a process and session of its own, forked from this one, which has imported everything."""

    def __init__(self, given: list[str], log: Path) -> None:
        self.log = log
        self.process = FORK.Process(target=_command, args=(given, log))
        self.process.start()

    def ends_within(self, seconds: float | None) -> bool:
        """Whether it ends by itself in that time, which it must do without an error."""
        self.process.join(seconds)
        if self.process.exitcode is None:
            return False
        assert self.process.exitcode == 0, self.log.read_text(encoding="utf-8")
        return True

    def hit(self, number: signal.Signals, *, alone: bool) -> None:
        """Signal it, alone or with all that it has started, and wait until all of them are gone."""
        pid = self.process.pid
        assert pid is not None
        send(number, [pid] if alone else [*members_of(pid), pid])
        self.process.join()
        end = time.monotonic() + 120
        while members_of(pid):  # its workers save their work
            assert time.monotonic() < end, "a worker outlives its parent"
            time.sleep(0.02)
        assert "Traceback" not in self.log.read_text(encoding="utf-8"), self.log.read_text(encoding="utf-8")


def _command(given: list[str], log: Path) -> None:
    os.setsid()
    with log.open("a", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__
    sys.argv = ["diffrl", *given]
    commands.main()


@dataclass
class Soak:
    """What the kills of one kind of command came to."""

    title: str
    seconds: float  # of the uninterrupted command
    moments: list[float] = field(default_factory=list)
    finished: int = 0


def runs(place: Path) -> dict[str, Path]:
    """Every run in a folder, which is one or holds the cells of a comparison."""
    return {str(file.parent.relative_to(place)): file.parent for file in place.rglob("results.json")}


class Kind:
    """A kind of command, and what it ends with where nobody stops it."""

    def __init__(self, kind: str, folder: Path, base: Path) -> None:
        self.kind, self.folder, self.base = kind, folder, base
        self.folder.mkdir()
        begun = time.monotonic()
        assert Command(words(kind, self.folder / "whole", base), self.folder / "log").ends_within(None)
        self.seconds = time.monotonic() - begun
        self.expected = {name: state(path) for name, path in runs(self.folder / "whole").items()}
        assert self.expected

    def soak(self, title: str, hits: Hits) -> Soak:
        """Start it, hit it at random moments until it ends by itself, and compare; until all hits are used."""
        number = hits[0][0]
        rng, done, left = random.Random(title), Soak(title, self.seconds), list(hits)
        while left:
            self._end(self.folder / f"{number.name}_{done.finished}", done, left, rng)
            done.finished += 1
        return done

    def _end(self, place: Path, done: Soak, left: Hits, rng: random.Random) -> None:
        while True:
            command = Command(words(self.kind, place, self.base), self.folder / "log")
            moment = rng.uniform(0, 0.6 * self.seconds) if left else None
            if command.ends_within(moment):
                break
            assert moment is not None
            number, alone = left.pop()
            command.hit(number, alone=alone)
            done.moments.append(moment)
        found = runs(place)
        assert found.keys() == self.expected.keys()
        for name, path in found.items():
            assert_equal(state(path), self.expected[name], f"{place.name}, {name}")


def soak(folder: Path, base: Path, given: tuple[str, str, Hits]) -> Soak:
    """One row of the table: kind of command, title, hits."""
    kind, title, hits = given
    return Kind(kind, folder / title.replace(" ", "_").replace(",", ""), base).soak(title, hits)


def soaks(kills: int, groups: int, folder: Path) -> list[Soak]:
    """Kill -9 of every kind of command, and SIGTERM to all processes of a comparison, side by side."""
    base = folder / "base"
    pretrain = ["train", *TRAINING, "trainer.grad_steps=40", "compare=false", f"run_dir={base}"]
    assert Command(pretrain, folder / "log").ends_within(None)
    alone = [(signal.SIGKILL, bool(i % 2)) for i in range(kills)]  # every other one with its workers
    rows = [(kind, f"{kind}, kill -9", alone) for kind in ("train", "finetune", "compare")]
    rows.append(("compare", "compare, SIGTERM to the group", [(signal.SIGTERM, False)] * groups))
    with ProcessPoolExecutor(len(rows), mp_context=FORK) as pool:
        return list(pool.map(partial(soak, folder, base), rows))


@pytest.mark.soak
@pytest.mark.timeout(1200)
def test_killed_once_of_each_kind_it_ends_the_same(tmp_path: Path) -> None:
    assert [len(done.moments) for done in soaks(1, 1, tmp_path)] == [1, 1, 1, 1]


@pytest.mark.soak
@pytest.mark.timeout(7200)
def test_killed_twenty_times_of_each_kind_it_ends_the_same(tmp_path: Path) -> None:
    begun = time.monotonic()
    found = soaks(20, 10, tmp_path)
    assert [len(done.moments) for done in found] == [20, 20, 20, 10]
    rows: list[Any] = [["command", "kills", "runs that ended", "moments, s", "uninterrupted, s"]]
    for done in found:
        moments = f"{min(done.moments):.1f} to {max(done.moments):.1f}"
        rows.append([done.title, str(len(done.moments)), str(done.finished), moments, f"{done.seconds:.1f}"])
    text = HEAD.format(minutes=(time.monotonic() - begun) / 60) + markdown_table(rows) + "\n"
    write_atomically(ROOT / "results" / "soak" / "README.md", text)


HEAD = """# Kills

    python -m pytest -m soak tests/soak/test_kills.py

Each command was hit at random moments, continued, and hit again until it ended by itself; every other kill -9 was of
all its processes at once, and SIGTERM always. Every run that ended holds what an uninterrupted one holds: weights,
optimiser and samples bit for bit, the rows of metrics.csv, and results.json but for seconds. It took {minutes:.0f} min.

"""
