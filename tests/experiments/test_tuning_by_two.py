"""Two processes tune as one: rollouts, rewards, groups that are split, updates; they stop and die as a whole."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from diffrl import finetune, recipes
from diffrl.configs.cli import settings
from diffrl.errors import InputError
from diffrl.experiments.finetune import run_finetuning
from diffrl.experiments.run import Interrupted
from diffrl.experiments.train import run_experiment
from diffrl.finetuning.credit.critic import LearnedCritic
from diffrl.finetuning.credit.group import GroupRelative
from diffrl.finetuning.credit.standardised import Standardised
from diffrl.finetuning.finetuner import Finetuner, Iterations
from diffrl.finetuning.methods.diffusion_nft import diffusion_nft
from diffrl.finetuning.placement.gains import Gains
from diffrl.finetuning.recipe import Recipe, Regulariser
from diffrl.finetuning.rollouts.chains import Rollouts
from diffrl.finetuning.run_checks import check_tuner
from diffrl.finetuning.updates.steps import Updates
from diffrl.rewards.black_box import BlackBox
from diffrl.rewards.weighted_sum import WeightedSum
from diffrl.training.checkpoints import list_checkpoints
from diffrl.training.distributed import ALONE, Ranks, joined
from diffrl.training.optim import Optim
from tests.experiments.test_many_processes import assert_close
from tests.kit.configs import composed, small
from tests.kit.pairs import in_pair, lose_the_other, stopped
from tests.kit.policies import make_policy, right
from tests.kit.run_states import state

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="torch was built without gloo")

IN_FLOAT32 = 1e-4  # of a run of six updates; in float64 `assert_close` asks for 1e-11
KINDS: dict[str, Callable[[], Recipe]] = {
    # 7 trajectories of 3 prompts: 3 for one process, 4 for the other, in parts of 5 states
    "sf": lambda: recipes.ddpo_sf(
        rollouts=Rollouts(7),
        credit=Standardised(min_count=2),
        updates=Updates(minibatches=1, micro_batch=5),
        regulariser=Regulariser(0.1),
    ),
    # 3 groups of 3, of which one is split; minibatches of 5 and of 4 rows; a moving average; drawn in parts
    "groups": lambda: recipes.flow_grpo(
        rollouts=Rollouts(9, group_size=3, at_once=6), regulariser=Regulariser(0.1, "ema", 0.5, by_time=True)
    ),
    "is": lambda: recipes.ddpo_is(
        rollouts=Rollouts(10, group_size=5), placement=Gains(), credit=GroupRelative(of="step")
    ),
    # 5 pairs: 2 for one, 3 for the other, and of minibatches 1 and 2, 1 and 1; 3 queries a trajectory
    "sdpo": lambda: recipes.sdpo(rollouts=Rollouts(10, pairs=True)),
}
WORDS = (
    *(
        "reward=mode_distance",
        "reward.point=[0.8,0]",
        "heldout_reward=none",
        "policy.num_steps=4",
        "compare=[]",
    ),
    *("rollouts.trajectories=9", "loop.iterations=3", "loop.eval_every=2", "loop.checkpoint_every=2"),
    *("evaluation.samples=16", "stop.patience=50"),
)


def tuner_of(recipe: Recipe, ranks: Ranks = ALONE, reward: Any = right) -> Finetuner:
    return Finetuner(
        make_policy(num_classes=3),
        reward,
        recipe,
        event_shape=(2,),
        conditions=torch.arange(3),
        length=Iterations(3),
        optim=Optim(1e-2, warmup_steps=0),
        ranks=ranks,
    )


def tuned(kind: str, ranks: Ranks = ALONE) -> dict[str, Any]:
    """All that a run in float64 holds, and its rows, after its self-checks."""
    torch.set_default_dtype(torch.float64)
    try:
        box = BlackBox(right)
        tuner, rows = tuner_of(KINDS[kind](), ranks, box), list[dict[str, float]]()
        check_tuner(tuner)
        tuner.fit(report=rows.append, progress=False)
        weights, training = tuner._state()
    finally:
        torch.set_default_dtype(torch.float32)
    for own in ("known", "worst"):  # rewards that a process has heard
        del training["reward"][own]
    kept = [{k: v for k, v in row.items() if k != "seconds"} for row in rows]
    found = {"weights": weights, "training": training, "rows": kept if ranks.first else []}
    return {**found, "counts": box.metrics()}


def quick(folder: Path, name: str) -> dict[str, Any]:
    words = (*WORDS, f"model.path={folder}/base", f"run_dir={folder}/{name}")
    return settings(composed(*words, name="finetune"), [])


def work(rank: int, folder: Path, meet: Callable[[], None]) -> None:
    """What each of the two does."""
    configs = json.loads((folder / "configs.json").read_text(encoding="utf-8"))
    advance, said = Finetuner._advance, dict[str, Any]()
    meet()
    with joined("cpu", 60) as ranks:
        torch.save({kind: tuned(kind, ranks) for kind in KINDS}, folder / f"tuned{rank}.pt")
    meet()
    rows = finetune(make_policy(), right, KINDS["is"](), event_shape=(2,), iterations=2, progress=False)
    said["rows"] = [row["queries"] for row in rows]
    meet()
    said["run"] = str(run_finetuning(configs["run"], progress=False).path)
    meet()
    if rank == 1:
        stopped(Finetuner, 1, lambda: signal.raise_signal(signal.SIGTERM))
    try:
        run_finetuning(configs["stopped"], progress=False)
    except Interrupted as stop:
        said["stopped"] = str(stop)
    Finetuner._advance = advance  # type: ignore[method-assign]
    meet()
    if rank == 1:
        stopped(Finetuner, 2, lambda: os.kill(os.getpid(), signal.SIGKILL))
    lose_the_other(
        lambda: run_finetuning(configs["dying"], progress=False), said, folder / f"said{rank}.json"
    )


Pair = tuple[Path, list[int | None], list[dict[str, Any]]]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """The folder in which two processes worked, their exit codes, and what each said."""
    folder = tmp_path_factory.mktemp("pair")
    run_experiment(small("compare=false", "trainer.grad_steps=2", f"run_dir={folder}/base"), progress=False)
    configs = {name: quick(folder, name) for name in ("run", "stopped", "dying")}
    (folder / "configs.json").write_text(json.dumps(configs), encoding="utf-8")
    codes = in_pair(work, folder, meetings=5)
    said = [json.loads((folder / f"said{rank}.json").read_text(encoding="utf-8")) for rank in (0, 1)]
    return folder, codes, said


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_tune_as_one(pair: Pair, kind: str) -> None:
    """Weights, references, moments, buffers of credit, counts and every figure, in float64."""
    one = tuned(kind)
    assert any(bool(x.abs().max() > 0) for x in one["weights"]["policy"].values())
    for rank in (0, 1):
        found = torch.load(pair[0] / f"tuned{rank}.pt", weights_only=False)[kind]
        assert_close(found, one if rank == 0 else {**one, "rows": []})


def test_a_run_of_two_processes_is_that_of_one(pair: Pair) -> None:
    """From a configuration, in float32; the first process alone writes."""
    folder, _, said = pair
    assert [found["rows"] for found in said] == [[0, 50, 100], []]
    assert [found["run"] for found in said] == [f"{folder}/run"] * 2
    one = run_finetuning({**quick(folder, "one")}, progress=False)
    assert_near(state(folder / "run"), state(one.path))
    assert sorted(p.name for p in (folder / "run").iterdir()) == sorted(p.name for p in one.path.iterdir())


def assert_near(found: Any, expected: Any, where: str = "run") -> None:
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for key in expected:
            assert_near(found[key], expected[key], f"{where}.{key}")
    elif isinstance(expected, list | tuple):
        for i, pieces in enumerate(zip(found, expected, strict=True)):
            assert_near(*pieces, f"{where}[{i}]")
    elif isinstance(expected, Tensor):
        torch.testing.assert_close(found, expected, rtol=IN_FLOAT32, atol=IN_FLOAT32, msg=where)
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=IN_FLOAT32, abs=IN_FLOAT32), where


def gone_on(folder: Path, name: str) -> dict[str, Any]:
    """What one process makes of a run of two."""
    config = {**quick(folder, name), "run_dir": None, "resume": str(folder / name)}
    with pytest.warns(RuntimeWarning, match=r"ranks 2 → 1\)"):
        return state(run_finetuning(config, progress=False).path)


def test_a_signal_to_one_stops_both_and_one_goes_on(pair: Pair) -> None:
    folder, _, said = pair
    assert all(found["stopped"].startswith("stopped after iteration 2, and saved") for found in said)
    saved = list_checkpoints(folder / "stopped" / "checkpoints" / "policy")
    assert [path.name for path in saved] == ["step_000002"]
    assert_near(gone_on(folder, "stopped"), state(folder / "run"))


def test_a_process_that_dies_ends_the_tuning_soon(pair: Pair) -> None:
    """Then one process goes on from the last checkpoint, to the same."""
    folder, codes, said = pair
    assert codes == [3, -signal.SIGKILL]
    assert said[0]["seconds"] < 60 and said[0]["lost"].startswith("process 0 of 2 lost another one")
    assert not (folder / "dying" / "results.json").exists()
    saved = list_checkpoints(folder / "dying" / "checkpoints" / "policy")
    assert [path.name for path in saved] == ["step_000002"]
    assert_near(gone_on(folder, "dying"), state(folder / "run"))


def test_what_is_not_shown_is_refused_by_name() -> None:
    two, rows = Ranks(0, 2), Rollouts(8)
    add = {"a": (right, 1.0)}
    for recipe, reward, text in (
        (
            recipes.ddpo_is(rollouts=rows, credit=LearnedCritic()),
            right,
            "LearnedCritic, a piece of the method,",
        ),
        (diffusion_nft(rollouts=Rollouts(8, group_size=4)), right, "SampleUpdates, a piece of the method,"),
        (recipes.ddpo_is(rollouts=Rollouts(8, at_once=4, overlap=True)), right, "rollouts.overlap=true"),
        (recipes.ddpo_is(rollouts=rows), BlackBox(right, on_failure="mean"), "reward_calls.on_failure=mean"),
        (recipes.ddpo_is(rollouts=rows), WeightedSum(add, normalise="running"), "a running sum of rewards"),
    ):
        with pytest.raises(InputError, match=f"^{text}.* takes one process: it is not shown that"):
            tuner_of(recipe, two, reward)
    with pytest.raises(
        InputError, match="^a minibatch has 1 pairs for 2 processes: raise rollouts.trajectories"
    ):
        tuner_of(recipes.sdpo(rollouts=Rollouts(4, pairs=True)), two)
