"""Two processes share a run: it is that of one, whatever the objective; it stops, goes on and dies as a whole."""

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader

from diffrl.errors import InputError
from diffrl.experiments.run import Interrupted
from diffrl.experiments.train import run_experiment
from diffrl.training.checkpoints import list_checkpoints, load_weights
from diffrl.training.distributed import RankLost, joined
from diffrl.training.runs import load
from diffrl.training.sharding import Sharding, part_of
from diffrl.training.trainer import Trainer
from tests.kit.configs import small
from tests.kit.pairs import in_pair, lose_the_other, stopped
from tests.kit.run_states import state

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="torch was built without gloo")

CLOSE = 1e-11  # of float64: sums over shares are taken in another order
KINDS: dict[str, dict[str, dict[str, Any]]] = {
    # 3 data for one process, 4 for the other, each in two parts; a target network; a gradient in other units
    "plain": {"trainer": {"batch_size": 7, "accumulate": 2, "reduction": "sum"}},
    "groups": {
        "objective": {"name": "inductive_moments"},
        "trainer": {"batch_size": 12},
    },  # 1 group of 4, and 2
    # weights, moments, a target network and two averages cut by FSDP2, and a tensor that one process has nothing of
    "sharded": {
        "objective": {"name": "td", "bootstrap": "target"},
        "trainer": {"batch_size": 7, "accumulate": 2, "sharded": True},
        "ema": {"also": [50]},
    },
    # of one state each, a process often has no need of the target network where the other has
    "copies": {
        "chain": {"window": 1, "num_steps": 3},
        "trainer": {"batch_size": 2, "sharded": True},
        "target": {"every": 3},
    },
    "td_edm": {"objective": {"name": "td_edm"}, "trainer": {"batch_size": 7, "sharded": True}},
    "own": {
        "objective": {"name": "td", "bootstrap": "own"},
        "trainer": {"batch_size": 7, "accumulate": 2, "sharded": True},
    },
    "trials": {"objective": {"name": "td_adaptive", "trials": 1, "heldout": 8}},
    "starts": {"starts": {"name": "loss_aware", "history": 1}, "chain": {"window": 1}},
}
WORDS = (
    *("compare=false", "dtype=float64", "network.second_time=true", "trainer.grad_steps=6"),
    *("trainer.checkpoint_every=4", "trainer.eval_every=3", "trainer.report_every=1", "eval.num_steps=[2]"),
)


def configs_of(folder: Path) -> dict[str, dict[str, Any]]:
    """Of a run of each kind, in a folder of its name."""
    base, found = small(*WORDS), {}
    for kind, given in KINDS.items():
        groups = {
            group: options if "name" in options else {**base[group], **options}
            for group, options in given.items()
        }
        found[kind] = {**base, **groups, "run_dir": f"{folder}/{kind}"}
    return found


def watched(said: dict[str, Any]) -> None:
    """Let what a process holds of all that is cut be said of the time between steps, and how much there is in all."""
    apart = Sharding.apart

    def apart_and_say(self: Sharding, *given: Any) -> Any:
        moments = [x for kept in self.optimiser.algorithm.state.values() for x in kept.values() if x.ndim > 0]
        networks = [self.network, *(() if self.target is None else (self.target,))]
        averages = [x for name in self._whole for x in self._shards[name].values()]
        cut = [*moments, *averages, *(p for network in networks for p in network.parameters())]
        whole = [*self._registered, *(x for whole in self._whole.values() for x in whole.values())]
        said["held"] = (
            sum(part_of(x).numel() for x in (*cut, *whole)),
            sum(x.numel() for x in cut),
            len(moments),
            len(networks),
        )
        return apart(self, *given)

    Sharding.apart = apart_and_say  # type: ignore[method-assign, assignment]


def work(rank: int, folder: Path, meet: Callable[[], None]) -> None:
    """What each of the two does."""
    configs = json.loads((folder / "configs.json").read_text(encoding="utf-8"))
    advance, said = Trainer._advance, dict[str, Any]()
    watched(said)
    for kind in (*KINDS, "resumed"):
        meet()
        said[kind] = str(run_experiment(configs[kind], progress=False).path)
    meet()
    if rank == 1:
        stopped(Trainer, 3, lambda: signal.raise_signal(signal.SIGTERM))
    try:
        run_experiment(configs["stopped"], progress=False)
    except Interrupted as stop:
        said["stopped"] = str(stop)
    Trainer._advance = advance  # type: ignore[method-assign]
    if rank == 0:
        shutil.copytree(folder / "stopped", folder / "left")
    meet()
    again = {**configs["stopped"], "run_dir": None, "resume": f"{folder}/stopped"}
    said["again"] = str(run_experiment(again, progress=False).path)
    meet()
    with joined("cpu", 60) as ranks:
        for name, call in (
            ("failed", lambda: ranks.from_first(lambda: 1 // 0, "a division")),
            ("differ", lambda: ranks.agree({"seed": 0, "data.fingerprint": "ab"[rank]})),
        ):
            try:
                call()
            except (ZeroDivisionError, RankLost, InputError) as error:
                said[name] = f"{type(error).__name__}: {error}"
    meet()
    stopped(Trainer, 2, lambda: rank == 1 and os._exit(9))
    lose_the_other(
        lambda: run_experiment(configs["dying"], progress=False), said, folder / f"said{rank}.json"
    )


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[int | None], list[dict[str, Any]]]:
    """The folder in which two processes worked, their exit codes, and what each said."""
    folder = tmp_path_factory.mktemp("pair")
    configs = configs_of(folder)
    for kind in ("stopped", "dying", "resumed"):
        like = configs["sharded" if kind == "stopped" else "plain"]
        configs[kind] = {**like, "run_dir": f"{folder}/{kind}"}
    begun = _begun_by_one(configs["resumed"])
    configs["resumed"] |= {"run_dir": None, "resume": str(begun)}
    (folder / "configs.json").write_text(json.dumps(configs), encoding="utf-8")
    codes = in_pair(work, folder, meetings=len(KINDS) + 5)
    return (
        folder,
        codes,
        [json.loads((folder / f"said{rank}.json").read_text(encoding="utf-8")) for rank in (0, 1)],
    )


def _begun_by_one(config: dict[str, Any]) -> Path:
    """A run that was stopped after four steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_advance", Trainer._advance)  # to be put back
        stopped(Trainer, 3, lambda: signal.raise_signal(signal.SIGTERM))
        with pytest.raises(Interrupted):
            run_experiment(config, progress=False)
    return Path(config["run_dir"])


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What one process makes of the same."""
    configs = configs_of(tmp_path_factory.mktemp("one"))
    return {kind: state(run_experiment(config, progress=False).path) for kind, config in configs.items()}


def assert_close(found: Any, expected: Any, where: str = "run") -> None:
    """The same to `CLOSE`, in every number, text and tensor."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for key in expected:
            assert_close(found[key], expected[key], f"{where}.{key}")
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected), where
        for i, pieces in enumerate(zip(found, expected, strict=True)):
            assert_close(*pieces, f"{where}[{i}]")
    elif isinstance(expected, Tensor):
        torch.testing.assert_close(found, expected, rtol=CLOSE, atol=CLOSE, msg=where)
    else:
        try:
            assert float(found) == pytest.approx(float(expected), rel=CLOSE, abs=CLOSE), where
        except (TypeError, ValueError):
            assert found == expected, where


Pair = tuple[Path, list[int | None], list[dict[str, Any]]]


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_of_two_processes_is_that_of_one(pair: Pair, one: dict[str, Any], kind: str) -> None:
    """Weights, averages, target network, moments, trials, starts and every figure."""
    folder, _, said = pair
    assert {found[kind] for found in said} == {f"{folder}/{kind}"}
    assert_close(state(folder / kind), one[kind])
    assert (
        (folder / kind / "command.txt").read_text(encoding="utf-8").startswith("torchrun --nproc-per-node=")
    )


def test_more_processes_go_on_with_a_run_of_one(pair: Pair, one: dict[str, Any]) -> None:
    folder, _, said = pair
    assert {found["resumed"] for found in said} == {f"{folder}/resumed"}
    assert_close(state(folder / "resumed"), one["plain"])


def test_a_signal_to_one_stops_both_and_saves_once(pair: Pair, one: dict[str, Any]) -> None:
    """Then one process goes on."""
    folder, _, said = pair
    assert all(
        found["stopped"].startswith("stopped after gradient step 4 of td, and saved") for found in said
    )
    saved = list_checkpoints(folder / "left" / "checkpoints" / "td")
    assert [path.name for path in saved] == ["step_000004"]
    config = {**configs_of(folder)["sharded"], "run_dir": None, "resume": str(folder / "left")}
    with pytest.warns(RuntimeWarning, match=r"ranks 2 → 1\): what follows is the same but for the last bits"):
        path = run_experiment(config, progress=False).path
    assert_close(state(path), one["sharded"])


def read_by_torch(checkpoint: Path, place: Path) -> None:
    """What torch.distributed.checkpoint reads of the parts, in one process, is what diffrl reads."""
    parts = sorted(checkpoint.glob("part_*"))
    assert len(parts) == 2
    place.mkdir()
    for part in parts:
        shutil.copy(part, place / part.name)
    for weights in ("model", "ema", "ema_50", "target"):
        expected = {f"{weights}.{k}": v for k, v in load_weights(checkpoint, weights).items()}
        told = HuggingFaceStorageReader(str(place)).read_metadata().state_dict_metadata
        cut = {key: x for key, x in expected.items() if key in told}
        found = {key: torch.zeros_like(x) for key, x in cut.items()}
        dcp.load(found, storage_reader=HuggingFaceStorageReader(str(place)), no_dist=True)
        assert len(found) >= 5
        assert_close(found, cut)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_what_two_have_cut_goes_on_cut_and_is_loaded_whole(pair: Pair, one: dict[str, Any]) -> None:
    folder, _, said = pair
    assert {found["again"] for found in said} == {f"{folder}/stopped"}
    assert_close(state(folder / "stopped"), one["sharded"])
    for weights in ("ema", "ema_50", "model"):
        loaded = load(folder / "stopped", weights=weights).denoiser.state_dict()
        assert_close(loaded, one["sharded"]["td"][weights])
    read_by_torch(folder / "left" / "checkpoints" / "td" / "step_000004", folder / "parts")
    (first, all_of_it, moments, networks), (second, *_) = (found["held"] for found in said)
    assert moments > 0 and networks == 2 and 0.4 * all_of_it < second <= first < 0.6 * all_of_it
    assert first + second == all_of_it


@pytest.mark.parametrize("kind", ["copies", "td_edm"])
@pytest.mark.filterwarnings("ignore:.*ranks 2 → 1:RuntimeWarning")
def test_one_goes_on_with_a_target_network_that_two_have_cut(
    pair: Pair, one: dict[str, Any], kind: str
) -> None:
    """From the checkpoint before the last one."""
    folder = shutil.copytree(pair[0] / kind, pair[0] / f"{kind}_of_one")
    (folder / "results.json").unlink()
    (place,) = (folder / "checkpoints").iterdir()
    earlier, last = list_checkpoints(place)
    assert len([*earlier.glob("part_*")]) == 2
    shutil.rmtree(last)
    config = {**configs_of(pair[0])[kind], "run_dir": None, "resume": str(folder)}
    assert_close(state(run_experiment(config, progress=False).path), one[kind])
    for weights in ("ema", "model"):
        loaded = load(folder, weights=weights).denoiser.state_dict()
        assert_close(loaded, one[kind][place.name][weights])


def test_what_one_cannot_do_ends_the_others(pair: Pair) -> None:
    first, second = pair[2]
    assert first["failed"].startswith("ZeroDivisionError")
    assert second["failed"] == "RankLost: the first process could not go on: see what it says"
    assert "differ" not in first
    assert second["differ"].startswith(
        "InputError: process 1 is not given what process 0 is: data.fingerprint 'a' → 'b'; start all with"
    )


def test_a_process_that_dies_ends_the_run_soon(pair: Pair) -> None:
    folder, codes, said = pair
    assert codes == [3, 9]
    assert said[0]["seconds"] < 60 and said[0]["lost"].startswith("process 0 of 2 lost another one")
    assert not (folder / "dying" / "results.json").exists()
