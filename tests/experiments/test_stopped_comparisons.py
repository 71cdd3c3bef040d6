"""Comparisons whose parent, worker or whole group gets SIGTERM: all work is saved, and the same command continues."""

import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.kit.configs import SMALL, TINY
from tests.kit.processes import Running, ended, members, send, start, wait_until, workers
from tests.kit.run_states import assert_equal, state
from tests.kit.shell import Shell

UNSAVED = 10_000_000  # no checkpoint comes before the end, but of a run that is stopped


@pytest.fixture(scope="module")
def base(shell: Shell, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("base") / "run"
    shell("-m", "diffrl", "train", *SMALL, "compare=false", f"run_dir={path}", folder=path.parent)
    return path


def words(kind: str, base: Path) -> list[str]:
    """Cells of some seconds each, more than there are workers."""
    if kind == "compare":
        tiny = [*TINY, "trainer.grad_steps=1000", "trainer.eval_every=1000", "trainer.report_every=20"]
        tiny = [f"'{word}'" for word in (*tiny, f"trainer.checkpoint_every={UNSAVED}")]
        return [
            "compare", "plan=quick", "studies=[schemes]", "plan.tuning.enabled=false",
            f"plan.cases.gmm16=[{','.join(tiny)}]",
            "plan.studies.schemes.cases=[gmm16]", "plan.studies.schemes.seeds=[0]",
        ]  # fmt: skip
    return [
        "finetune", f"model.path={base}", "reward=mode_distance", "reward.point=[0.8,0]", "heldout_reward=none",
        "policy.num_steps=4", "rollouts.trajectories=16", "loop.iterations=100", "loop.eval_every=100",
        f"loop.checkpoint_every={UNSAVED}", "evaluation.samples=32", "compare=[DDPO-IS]", "seeds=[0,1,2]",
    ]  # fmt: skip


def runs(out: Path) -> dict[str, Path]:
    return {file.parent.name: file.parent for file in out.glob("cells/*/results.json")}


def have_begun(out: Path, count: int) -> bool:
    tables = list(out.glob("cells/*/metrics.csv"))
    return len([table for table in tables if table.read_text(encoding="utf-8").count("\n") > 2]) >= count


def to_a_worker(running: Running) -> None:
    send(signal.SIGTERM, workers(running)[:1])


def to_the_parent(running: Running) -> None:
    send(signal.SIGTERM, [running.pid])


def to_the_group(running: Running) -> None:
    """As a batch system does it: each process, and some more than once."""
    for _ in range(2):
        send(signal.SIGTERM, members(running))


@pytest.fixture(scope="module", params=[pytest.param("compare", marks=pytest.mark.soak), "finetune"])
def whole(
    request: pytest.FixtureRequest, base: Path, shell: Shell, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A comparison, uninterrupted; its folder has the name of the command."""
    out: Path = tmp_path_factory.mktemp("whole") / request.param
    shell("-m", "diffrl", *words(out.name, base), f"out={out}", "workers=0", folder=out.parent)
    return out


@pytest.mark.parametrize(
    "terminate",
    [
        pytest.param(to_a_worker, marks=pytest.mark.soak),
        pytest.param(to_the_group, marks=pytest.mark.slow),
        pytest.param(to_the_parent, marks=pytest.mark.soak),
    ],
)
def test_sigterm_saves_and_the_same_command_continues(
    terminate: Callable[[Running], None], base: Path, whole: Path, shell: Shell, tmp_path: Path
) -> None:
    given = [*words(whole.name, base), f"out={tmp_path}"]
    running = start(*given)
    wait_until(lambda: have_begun(tmp_path, 2), running)
    terminate(running)
    status, said = ended(running)
    assert status == 1 and "interrupted: the same command continues" in said and "Traceback" not in said
    stopped = [run for run in (tmp_path / "cells").iterdir() if run.name not in runs(tmp_path)]
    assert len(stopped) == (1 if terminate is to_a_worker else 2)  # the others have not begun
    assert all(list(run.glob("checkpoints/*/step_*/manifest.json")) for run in stopped), "work was lost"
    assert not list(tmp_path.glob("cells/*/error.txt"))
    shell("-m", "diffrl", *given, "workers=0", folder=tmp_path)
    assert runs(tmp_path).keys() == runs(whole).keys() and len(runs(tmp_path)) > 2
    for name, run in runs(tmp_path).items():
        assert_equal(state(run), state(whole / "cells" / name))
