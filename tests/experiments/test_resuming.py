"""A run goes on as it was started: what was changed meanwhile is named, what is damaged is named, nothing is lost."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

import diffrl
from diffrl.configs.cli import settings
from diffrl.errors import DiffrlError, FileError, InputError
from diffrl.experiments.finetune import run_finetuning
from diffrl.experiments.run import Interrupted
from diffrl.experiments.train import run_experiment
from diffrl.training.checkpoints import list_checkpoints
from diffrl.training.identity import RunChanged
from diffrl.training.lock import FolderInUse, folder_lock
from diffrl.training.runs import RunFolder, RunFolderError
from diffrl.training.table import Table
from diffrl.training.trainer import Trainer
from tests.kit.configs import composed, small
from tests.kit.runs import checkpoint, run

CONSTANT = ("optim.decay=none", "compare=false")


def resume(path: Path, **words: Any) -> RunFolder:
    config = {**RunFolder.open(path).config(), **words, "resume": str(path)}
    return run_experiment(config, progress=False)


def command(path: Path, *words: str) -> dict[str, Any]:
    """The configuration that the command `train` follows."""
    given = [f"resume={path}", *words]
    return settings(composed(*given), given)


@pytest.fixture
def stopped(whole: RunFolder, tmp_path: Path) -> RunFolder:
    """A run without results: its checkpoints are those of the last step."""
    path = shutil.copytree(whole.path, tmp_path / "stopped")
    (path / "results.json").unlink()
    return RunFolder(path)


# What was changed


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("optim.lr", 0.5, "optim.lr 0.002 → 0.5"),
        ("optim.lr", "much", "optim.lr 0.002 → 'much'"),
        ("seed", 7, "seed 0 → 7"),
        ("trainer.grad_steps", 20, "trainer.grad_steps 30 → 20"),
        ("trainer.grad_steps", 40, "trainer.grad_steps 30 → 40; to train on for more steps, say `extend`"),
        ("process.sigma_max", 40.0, "process.sigma_max 80.0 → 40.0"),
        ("objective.lmbda", 0.1, "objective.lmbda None → 0.1"),
        ("compare", False, "compare True → False"),
    ],
)
@pytest.mark.parametrize("finished", [False, True])
def test_an_edited_configuration_is_refused(
    key: str, value: Any, says: str, finished: bool, whole: RunFolder, stopped: RunFolder
) -> None:
    if finished:
        shutil.copy(whole.path / "results.json", stopped.path)
    config = OmegaConf.load(stopped.config_file)
    OmegaConf.update(config, key, value)
    OmegaConf.save(config, stopped.config_file)
    for go_on in (
        lambda: resume(stopped.path),
        lambda: run_experiment(command(stopped.path), progress=False),
    ):
        with pytest.raises(RunChanged, match="step_000030 belongs to a run that is not this one") as refused:
            go_on()
        assert says in str(refused.value) and "\n" not in str(refused.value)


def test_a_group_that_is_gone_is_named(stopped: RunFolder) -> None:
    config = OmegaConf.to_container(OmegaConf.load(stopped.config_file))
    assert isinstance(config, dict)
    OmegaConf.save(OmegaConf.create({k: v for k, v in config.items() if k != "optim"}), stopped.config_file)
    with pytest.raises(RunChanged, match=r"optim.lr 0\.002 → 'nothing'"):
        resume(stopped.path)


def test_changes_are_accepted_by_their_word_and_kept(tmp_path: Path) -> None:
    folder = run(tmp_path / "run", *CONSTANT, "trainer.grad_steps=10", "trainer.checkpoint_every=5")
    (folder.path / "results.json").unlink()
    shutil.rmtree(folder.checkpoints("td") / "step_000010")
    resume(folder.path, optim={**folder.config()["optim"], "lr": 1e-4}, accept_changes=True)
    assert folder.config()["optim"]["lr"] == 1e-4 == folder.results()["config"]["optim"]["lr"]
    rates = [row["lr"] for row in Table(folder.path / "metrics.csv", ()).rows() if row["lr"]]
    assert float(rates[-1]) == pytest.approx(1e-4 * 10 / 100)  # of the warm-up
    resume(folder.path)  # and is the run from now on
    with pytest.raises(RunChanged, match=r"optim.lr 0\.0001 → 0\.002"):
        resume(folder.path, optim={**folder.config()["optim"], "lr": 2e-3})


def test_data_that_changed_between_stop_and_resume(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((64, 2)).astype(np.float32)
    np.savez(tmp_path / "points.npz", x=x)
    words = ("data=npz", f"data.path={tmp_path / 'points.npz'}", "compare=false", "eval.sigmas=[1]")
    folder = run(tmp_path / "run", *words)
    np.savez(tmp_path / "points.npz", x=np.concatenate([x, x[:4]]))
    with pytest.raises(RunChanged, match="data.fingerprint '[0-9a-f]{16}' → '[0-9a-f]{16}'"):
        resume(folder.path)
    resume(folder.path, accept_changes=True)


# More steps


def test_a_longer_run_is_one_that_was_as_long_from_the_start(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", *CONSTANT, "trainer.grad_steps=30")
    short = run(tmp_path / "short", *CONSTANT, "trainer.grad_steps=20")
    longer = run_experiment(command(short.path, "extend=30"), progress=False)
    assert longer.config()["trainer"]["grad_steps"] == 30 and longer.config()["extend"] == 30
    one, two = checkpoint(whole), checkpoint(longer)
    assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)
    found, wanted = (f.results()["objectives"]["td"] for f in (longer, whole))
    assert found["grad_steps"] == 30 and found["value_error"] == wanted["value_error"]
    steps = [int(row["grad_steps"]) for row in Table(longer.path / "metrics.csv", ()).rows()]
    assert steps == sorted(set(steps)) and steps[-1] == 30


def test_a_longer_run_that_is_killed_goes_on_without_another_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = run(tmp_path / "run", "optim.decay=none", "trainer.grad_steps=10")  # with Monte Carlo beside it
    monkeypatch.setattr(Trainer, "save", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        resume(folder.path, extend=20)
    monkeypatch.undo()
    found = run_experiment(command(folder.path), progress=False).results()["objectives"]
    assert [figures["grad_steps"] for figures in found.values()] == [20, 20]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ({"extend": 20}, "trainer.grad_steps 30 → 20; take that back"),
        ({"extend": 40, "seed": 3}, "seed 0 → 3"),
    ],
)
def test_more_steps_are_all_that_extend_allows(words: dict[str, Any], says: str, stopped: RunFolder) -> None:
    with pytest.raises(RunFolderError, match=says):
        resume(stopped.path, **words)


def test_no_word_makes_a_run_shorter_than_it_is(stopped: RunFolder) -> None:
    with pytest.raises(
        RunFolderError, match=r"step_000030 is beyond the 20 of trainer.grad_steps: give at least 30"
    ):
        resume(stopped.path, extend=20, accept_changes=True)
    assert stopped.config()["trainer"]["grad_steps"] == 30
    assert not (stopped.path / "results.json").exists()


@pytest.mark.parametrize("word", ["extend=5", "accept_changes=true"])
def test_words_for_a_run_that_goes_on(word: str, tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match="extend and accept_changes are for a run that goes on: give resume=PATH"
    ):
        run(tmp_path / "run", word)
    assert not (tmp_path / "run").exists()


# The folder


def test_a_folder_that_is_written_to_is_refused(whole: RunFolder, tmp_path: Path) -> None:
    with folder_lock(whole.path):
        with pytest.raises(FolderInUse, match=f"is being written by process {os.getpid()} on "):
            resume(whole.path)
        diffrl.load(whole.path).sample(1, num_steps=2)  # readers never need it
    with folder_lock(tmp_path / "new"), pytest.raises(FolderInUse):
        run(tmp_path / "new")


def test_what_a_kill_left_of_a_finished_run_is_swept(whole: RunFolder, tmp_path: Path) -> None:
    folder = RunFolder(shutil.copytree(whole.path, tmp_path / "run"))
    td = folder.checkpoints("td")
    (td / "step_000010.tmp-discarded").mkdir()
    (td / "step_000010").mkdir()
    resume(folder.path)
    assert [p.name for p in list_checkpoints(td)] == ["step_000020", "step_000030"]
    assert not list(td.glob("*.tmp-*"))


def test_the_wrong_command(whole: RunFolder, tmp_path: Path) -> None:
    given = [f"resume={whole.path}"]
    with pytest.raises(
        RunFolderError, match="holds a run of the command train, and not of finetune: resume it"
    ):
        settings(composed(*given, name="finetune"), given)
    with pytest.raises(RunFolderError, match="of the command train, and not of finetune"):
        run_finetuning({**whole.config(), "resume": str(whole.path)}, progress=False)
    with pytest.raises(RunFolderError, match="load it with diffrl.load$"):
        diffrl.load_tuned(whole.path)


def test_loading_needs_neither_data_nor_optimiser(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    np.savez("points.npz", x=np.random.default_rng(0).standard_normal((64, 2)).astype(np.float32))
    folder = run(tmp_path / "run", "data=npz", "data.path=points.npz", "compare=false", "eval.sigmas=[1]")
    before = diffrl.load(folder.path).sample(3, num_steps=3)
    Path("points.npz").unlink()
    for path in folder.path.rglob("training.pt"):
        path.unlink()
    loaded = diffrl.load(folder.path)
    assert torch.equal(loaded.sample(3, num_steps=3), before)
    with pytest.raises(DiffrlError, match=r"points\.npz"):
        print(loaded.data)


# Files that are damaged, and files that cannot be written

DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda raw: b"",
    "half": lambda raw: raw[: len(raw) // 2],
    "foreign": lambda raw: b"[1, 2]",
    "no text": lambda raw: b"\xff\xfe\x00" + raw,
    "deep": lambda raw: b"[" * 100_000,
}


FILES = ("config.yaml", "results.json", "metrics.csv", "modules.json")


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        (name, damage)
        for name in FILES
        for damage in DAMAGE
        if name != "metrics.csv" or damage not in ("empty", "half")  # rows that are written again
    ],
)
def test_a_damaged_file_is_named_and_left_as_it_is(
    name: str, damage: str, whole: RunFolder, stopped: RunFolder
) -> None:
    file = stopped.path / name
    source = whole.path / name
    file.write_bytes(DAMAGE[damage](source.read_bytes() if source.exists() else b'["a_module"]'))
    before = {path: path.read_bytes() for path in stopped.path.rglob("*") if path.suffix in (".pt", ".yaml")}
    with pytest.raises(DiffrlError) as refused:
        resume(stopped.path)
    assert "\n" not in str(refused.value) and str(stopped.path) in str(refused.value)
    assert before == {path: path.read_bytes() for path in before}


@pytest.mark.parametrize("key", ["data", "process", "network", "sampler", "objective"])
def test_a_name_that_is_unknown_in_a_configuration(key: str, stopped: RunFolder) -> None:
    shutil.rmtree(stopped.path / "checkpoints")
    config = OmegaConf.load(stopped.config_file)
    OmegaConf.update(config, f"{key}.name", "x")
    OmegaConf.save(config, stopped.config_file)
    with pytest.raises(InputError, match=f"{key} is 'x': give one of"):
        resume(stopped.path)


full = pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no full device")


@full
@pytest.mark.parametrize("name", ["versions.json", "command.txt", "config.yaml"])
def test_a_disk_that_is_full_at_the_start(name: str, tmp_path: Path) -> None:
    path = tmp_path / "run"
    path.mkdir()
    (path / f"{name}.tmp").symlink_to("/dev/full")
    with pytest.raises(FileError, match=f"{name} cannot be written .No space left on device.: make room"):
        run(path)
    assert not (path / f"{name}.tmp").is_symlink()  # nothing is left of it
    assert run(path, "compare=false", "trainer.grad_steps=2").results()  # the same command again


@full
@pytest.mark.parametrize("name", ["results.json", "samples/td.safetensors"])
def test_a_disk_that_is_full_at_the_end_loses_nothing(
    name: str, stopped: RunFolder, whole: RunFolder
) -> None:
    temporary = stopped.path / f"{name}.tmp"
    temporary.symlink_to("/dev/full")
    with pytest.raises(FileError, match=r"cannot be written \(No space left on device\): make room"):
        resume(stopped.path)
    temporary.unlink(missing_ok=True)
    found, wanted = resume(stopped.path).results()["objectives"], whole.results()["objectives"]
    for name in wanted:
        assert found[name]["sample_distance"] == wanted[name]["sample_distance"]


def test_a_folder_that_is_removed_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = Trainer._advance

    def removing(self: Trainer) -> dict[str, float]:
        if self.step == 9:
            shutil.rmtree(tmp_path / "run")
        return step(self)

    monkeypatch.setattr(Trainer, "_advance", removing)
    with pytest.raises(RunFolderError, match="run was removed while the run went on"):
        run(tmp_path / "run", "compare=false")


def test_a_name_that_is_too_long(tmp_path: Path) -> None:
    with pytest.raises(
        RunFolderError, match=r"cannot be made a run folder \(File name too long\): choose a shorter"
    ):
        run(tmp_path / ("x" * 300))


def test_a_read_only_folder_at_resume(stopped: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = Path.open

    def read_only(self: Path, mode: str = "r", *more: Any, **options: Any) -> Any:
        if "r" not in mode:
            raise OSError(30, "Read-only file system", str(self))
        return opened(self, mode, *more, **options)

    monkeypatch.setattr(Path, "open", read_only)
    with pytest.raises(FileError, match=r"\.lock cannot be written \(Read-only file system\)"):
        resume(stopped.path)


def test_names_and_texts_are_utf8(tmp_path: Path) -> None:
    config = {**small("compare=false", "trainer.grad_steps=2"), "run_dir": str(tmp_path / "köln λ")}
    folder = run_experiment(config, progress=False)
    assert (
        folder.config()["run_dir"].endswith("köln λ") and "köln".encode() in folder.config_file.read_bytes()
    )
    assert json.loads((folder.path / "results.json").read_bytes())["config"]["run_dir"].endswith("köln λ")
    assert resume(folder.path).path == folder.path


def test_interruption_is_saved_and_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fit = Trainer.fit
    monkeypatch.setattr(Trainer, "fit", lambda self, **o: fit(self, **{**o, "stop": lambda: self.step == 7}))
    with pytest.raises(
        Interrupted, match="stopped after gradient step 7 of td, and saved; continue with resume="
    ):
        run(tmp_path / "run")
    monkeypatch.undo()
    assert set(resume(tmp_path / "run").results()["objectives"]) == {"td", "monte_carlo"}
