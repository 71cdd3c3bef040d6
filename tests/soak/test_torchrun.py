"""torchrun itself: two processes of which one is killed, or torchrun is, or which are stopped; they go on to the same.

python -m pytest -m soak tests/soak/test_torchrun.py        # minutes
"""

import signal
import time
from pathlib import Path
from typing import Any

import pytest

from diffrl.experiments.train import run_experiment
from diffrl.ranks import RANK_TIMEOUT
from tests.experiments.test_many_processes import assert_close
from tests.kit.configs import SMALL, small
from tests.kit.processes import Running, ended, members, send, start, wait_until
from tests.kit.run_states import assert_equal, state

pytestmark = [pytest.mark.soak, pytest.mark.timeout(900)]

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
SECONDS = 60  # from a death to the end of all; torchrun gives the others 30 to end by themselves
OF_TWO = [*(word for word in SMALL if not word.startswith("trainer.")), "compare=false", "dtype=float64"]
WORDS = [
    *(*OF_TWO, "trainer.batch_size=7", "trainer.report_every=1", "trainer.grad_steps=200"),
    *("trainer.eval_every=200", "trainer.checkpoint_every=10"),
]
KINDS = {
    "plain": ["train", *WORDS],
    "cut": ["train", *WORDS, "trainer.sharded=true"],
    "tuned": [
        *("finetune", "compare=[]", "reward=mode_distance", "reward.point=[0.8,0]", "heldout_reward=none"),
        *("policy.num_steps=4", "rollouts.trajectories=15", "loop.iterations=80", "loop.eval_every=40"),
        *("loop.checkpoint_every=10", "evaluation.samples=32", "stop.patience=50"),
    ],
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What is tuned."""
    folder = tmp_path_factory.mktemp("base") / "run"
    run_experiment(small("compare=false", "trainer.grad_steps=40", f"run_dir={folder}"), progress=False)
    return f"model.path={folder}"


@pytest.fixture(scope="module")
def undisturbed(base: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What two processes make of each kind of run."""
    found = {}
    for kind in KINDS:
        folder = tmp_path_factory.mktemp("undisturbed") / kind
        code, said = ended(begun(kind, base, folder), 600)
        assert code == 0, said
        found[kind] = state(folder)
    return found


def begun(kind: str, base: str, folder: Path, *more: str, launcher: tuple[str, ...] = TORCHRUN) -> Running:
    """A run that has written 22 rows, and so two checkpoints."""
    words = [*KINDS[kind], *([base] if kind == "tuned" else [])]
    running = start(*words, *more, f"run_dir={folder}", launcher=launcher)
    taken(folder, running, 22)
    return running


def taken(folder: Path, running: Running, rows: int) -> None:
    """Wait until a run has written so many rows."""
    table = folder / "metrics.csv"
    wait_until(lambda: table.exists() and len(table.read_bytes().splitlines()) > rows, running, 300)


def gone_on(kind: str, folder: Path) -> dict[str, Any]:
    code, said = ended(start(KINDS[kind][0], f"resume={folder}", launcher=TORCHRUN), 600)
    assert code == 0, said
    return state(folder)


@pytest.mark.parametrize(
    ("kind", "victim"),
    [("plain", 0), ("plain", 1), ("cut", 1), ("cut", "torchrun"), ("tuned", 0), ("tuned", "torchrun")],
)
def test_what_is_killed_ends_soon_and_goes_on_to_the_same(
    tmp_path: Path, undisturbed: dict[str, Any], base: str, kind: str, victim: int | str
) -> None:
    """Bit for bit."""
    running, folder = begun(kind, base, tmp_path / "run"), tmp_path / "run"
    workers = _workers(running)
    pids = [running.pid] if victim == "torchrun" else [p for p in workers if _rank(p) == victim]
    send(signal.SIGKILL, pids)
    killed = time.monotonic()
    code, said = ended(running, SECONDS)
    print(f"{kind}, {victim} killed: all ended after {time.monotonic() - killed:.1f} s with status {code}")
    assert len(workers) == 2 and len(pids) == 1 and not any(map(_lives, workers))
    if victim == "torchrun":
        assert code == -signal.SIGKILL and said.count("has ended: stopped after") == 1
    else:
        assert code == 1 and said.count("lost another one") == 1
    assert not (folder / "results.json").exists()
    assert_equal(gone_on(kind, folder), undisturbed[kind])


def test_one_that_hangs_is_waited_for_no_longer_than_was_said(
    tmp_path: Path, undisturbed: dict[str, Any]
) -> None:
    running = begun("plain", "", tmp_path / "run", "rank_timeout=8")
    send(signal.SIGSTOP, [p for p in _workers(running) if _rank(p) == 1])
    code, said = ended(running, 8 + SECONDS)
    assert code == 1 and said.count("within 8 s (rank_timeout)") == 1
    found = gone_on("plain", tmp_path / "run")
    assert found["results"]["config"].pop("rank_timeout") == 8
    found["results"]["config"]["rank_timeout"] = RANK_TIMEOUT
    assert_equal(found, undisturbed["plain"])


def test_torchrun_starts_a_run_that_goes_on_again(tmp_path: Path, undisturbed: dict[str, Any]) -> None:
    folder = tmp_path / "run"
    running = begun("plain", "", folder)
    running.send_signal(signal.SIGTERM)
    ended(running)
    known = len((folder / "metrics.csv").read_bytes().splitlines())
    running = start("train", f"resume={folder}", launcher=(*TORCHRUN, "--max-restarts=1"))
    taken(folder, running, known + 12)
    send(signal.SIGKILL, _workers(running)[:1])
    code, said = ended(running)
    assert code == 0, said
    assert_equal(state(folder), undisturbed["plain"])


def test_two_commands_into_one_folder_at_once(tmp_path: Path, undisturbed: dict[str, Any], base: str) -> None:
    """One of them runs as if it were alone."""
    folder = tmp_path / "run"
    pair = [start(*KINDS["plain"], f"run_dir={folder}", launcher=TORCHRUN) for _ in range(2)]
    (code, _), (refused, said) = sorted(ended(running, 600) for running in pair)
    assert code == 0 and refused == 1
    assert said.count("run is being written by process") == 1
    assert_equal(state(folder), undisturbed["plain"])


def test_stopped_by_a_signal_it_goes_on_as_the_run_of_one_process(tmp_path: Path) -> None:
    running = begun("plain", "", tmp_path / "run")
    running.send_signal(signal.SIGTERM)
    code, said = ended(running)
    assert code != 0 and said.count("stopped after gradient step") == 1
    whole = run_experiment(small(*WORDS, f"run_dir={tmp_path}/one"), progress=False)
    assert_close(gone_on("plain", tmp_path / "run"), state(whole.path))


def _lives(pid: int) -> bool:
    """Whether it has not ended; one that nobody has asked about since is a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _workers(running: Running) -> list[int]:
    """The processes that torchrun started: each has a session of its own."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text(encoding="utf-8").rpartition(")")[2].split()[1])
        except OSError:  # it has ended
            continue
        if parent in members(running):
            found.append(int(stat.parent.name))
    return [pid for pid in found if pid != running.pid]


def _rank(pid: int) -> int:
    words = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return next(int(word.removeprefix(b"RANK=")) for word in words if word.startswith(b"RANK="))
