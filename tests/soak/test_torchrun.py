"""torchrun itself: two processes of which one is killed, which are stopped and go on, and what one process makes of it.

python -m pytest -m soak tests/soak/test_torchrun.py        # a minute or two
"""

import signal
import time
from pathlib import Path

import pytest

from diffrl.experiments.train import run_experiment
from diffrl.training.checkpoints import list_checkpoints
from tests.experiments.test_many_processes import assert_close
from tests.kit.configs import SMALL, small
from tests.kit.processes import Running, ended, members, send, start, wait_until
from tests.kit.run_states import state

pytestmark = [pytest.mark.soak, pytest.mark.timeout(900)]

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
SECONDS = 60  # from a death to the end of all; torchrun gives the others 30 to end by themselves
WORDS = [
    *(word for word in SMALL if not word.startswith("trainer.")),
    *("compare=false", "dtype=float64", "trainer.batch_size=7", "trainer.report_every=1"),
    *("trainer.grad_steps=400", "trainer.eval_every=400", "trainer.checkpoint_every=400"),
]


def begun(folder: Path) -> Running:
    running = start("train", *WORDS, f"run_dir={folder}", launcher=TORCHRUN)
    table = folder / "metrics.csv"
    wait_until(lambda: table.exists() and len(table.read_bytes().splitlines()) > 9, running, 300)
    return running


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_process_ends_the_run_soon(tmp_path: Path, rank: int) -> None:
    running = begun(tmp_path / "run")
    (pid,) = [p for p in _workers(running) if _rank(p) == rank]
    send(signal.SIGKILL, [pid])
    killed = time.monotonic()
    code, said = ended(running, SECONDS)
    print(f"rank {rank} killed: all ended after {time.monotonic() - killed:.1f} s with status {code}")
    assert code != 0 and "lost another one" in said
    assert not (tmp_path / "run" / "results.json").exists()


def test_stopped_by_a_signal_it_goes_on_as_the_run_of_one_process(tmp_path: Path) -> None:
    running = begun(tmp_path / "run")
    running.send_signal(signal.SIGTERM)
    code, said = ended(running)
    assert code != 0 and said.count("stopped after gradient step") == 1
    saved = list_checkpoints(tmp_path / "run" / "checkpoints" / "td")
    assert len(saved) == 1
    code, said = ended(start("train", f"resume={tmp_path}/run", launcher=TORCHRUN), 600)
    assert code == 0, said
    whole = run_experiment(small(*WORDS, f"run_dir={tmp_path}/one"), progress=False)
    assert_close(state(tmp_path / "run"), state(whole.path))


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
