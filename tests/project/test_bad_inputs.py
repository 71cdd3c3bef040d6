"""Bad inputs of every kind, thrown at the commands: one line that names them, no traceback, nothing lost."""

import itertools
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from diffrl.configs.groups import COMMANDS
from tests.kit.bad_inputs import DAMAGES, FAST, VALUES, Accepted, contents, keys, tell, throw, thrown
from tests.kit.paths import ROOT
from tests.kit.shell import Shell

pytestmark = pytest.mark.usefixtures("quiet_place")

FILES = ("npz", "idx", "folder")
"""Data sets that are read from a path."""

BIG = 12 * 2**30
"""Bytes that a soak may take: what wants more is told so at once, and not by the system's killer."""


def words_for(command: str, choice: tuple[str, ...], key: str, value: str, runs: Path) -> list[str]:
    """A command line that is right but for the last word."""
    group = choice[0].partition("=")[0] if choice else None
    base = [*FAST[command], *([f"model.path={runs / 'base'}"] if command == "finetune" else [])]
    base = [w for w in base if group is None or w.partition("=")[0].partition(".")[0] != group]
    if key != group:
        base += [w for w in choice if w != f"{group}=run"]
        base += ["data.path=/nowhere"] if choice and choice[0].removeprefix("data=") in FILES else []
    if choice == ("model=run",):
        base.append(f"model.path={runs / 'base'}")
    return [*base, f"{key}={value}"]


def fuzz(runs: Path, take: Callable[[int], bool], commands: Iterable[str] = COMMANDS) -> Counter[str]:
    """Throw the values at the keys, or those whose number is taken; how many there were, by what became of them."""
    before, counts, fell = contents(runs), Counter[str](), list[str]()
    cases = [(c, *key, value) for c in commands for key in keys(c) for value in VALUES]
    for number, (command, choice, key, value) in enumerate(cases):
        if not take(number):
            continue
        counts[command] += 1
        try:
            said = thrown(command, words_for(command, choice, key, value, runs))
        except AssertionError as error:
            fell.append(f"{' '.join(choice)} {key}={value}: {error}")
        else:
            counts["refused" if said else "accepted"] += 1
    assert not fell, "\n".join(fell)
    assert contents(runs) == before
    assert {*Path.cwd().iterdir()} == set()  # nothing is left where a run was refused
    return counts


def test_every_key_with_a_wrong_value(runs: Path) -> None:
    """Every fourth key gets one of the values, another one than its neighbours; a soak test throws all."""
    counts = fuzz(runs, lambda number: number % (4 * len(VALUES) - 1) == 0, ("train", "finetune"))
    tell("keys", counts)
    assert counts["refused"] > 70 and counts["accepted"] > 2
    assert counts["train"] > 25 and counts["finetune"] > 25


def test_every_key_of_a_comparison_with_wrong_values(runs: Path) -> None:
    counts = fuzz(runs, lambda number: number % 2 == 0, ("compare",))
    tell("keys", counts)
    assert counts["refused"] > 40 and counts["accepted"] > 8


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_every_key_with_every_wrong_value(runs: Path) -> None:
    import resource

    old = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (BIG, old[1]))
    try:
        counts = fuzz(runs, lambda number: True)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, old)
    tell("keys", counts)
    assert counts["refused"] > 4000 and counts["compare"] > 100


@pytest.mark.parametrize(
    ("command", "words", "says"),
    [
        ("train", ["process.sigma_max=1e30"], "process.sigma_max is 1e+30"),
        ("train", ["optim.lr=1e38"], "Lower optim.lr"),
        ("finetune", ["optim.lr=1000"], "samples are as large as"),
        ("finetune", ["optim.lr=1e20"], "Lower optim.lr"),
        ("finetune", ["optim.lr=1e38"], "an update by the learning rate 1e+38 overflows"),
        ("finetune", ["policy.std_floor=1e30"], "policy.std_floor"),
        ("finetune", [f"evaluation.samples={10**15}"], "evaluation.samples is 1000000000000000"),
        ("finetune", ["reward.scale=1e-300"], "reward.scale"),
    ],
)
def test_numbers_that_would_fail_late_are_named(
    command: str, words: list[str], says: str, runs: Path
) -> None:
    """At once where a limit is known, else as soon as something is not finite; no sample is blamed."""
    before = contents(runs)
    base = [*FAST[command], *([f"model.path={runs / 'base'}"] if command == "finetune" else [])]
    said = thrown(command, [*base, "run_dir=run", *words], begin=True, real=True)
    assert says in said and "failed for samples" not in said and "RuntimeError" not in said
    assert contents(runs) == before


# Files of runs


def run_files(runs: Path) -> list[Path]:
    """What a run folder holds, but for pictures and checkpoints before the last."""
    newest = {max(f.parent.iterdir()) for f in runs.rglob("checkpoints/*/*") if f.is_dir()}
    found = [f.relative_to(runs) for f in sorted(runs.rglob("*")) if f.is_file() and "plots" not in f.parts]
    return [f for f in found if "checkpoints" not in f.parts or runs / Path(*f.parts[:4]) in newest]


def damaged(runs: Path, file: Path, damage: str, place: Path) -> Path:
    """A copy of the runs in which one file is damaged; what it finished is forgotten, so that it is read."""
    copy = place / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(runs, copy)
    if file.name != "results.json":
        (copy / file.parts[0] / "results.json").unlink()
    (copy / file).write_bytes(DAMAGES[damage]((copy / file).read_bytes()))
    return copy


def readers(file: Path, copy: Path) -> list[tuple[str, list[str]]]:
    """The commands that read a file of a run."""
    run = copy / file.parts[0]
    if file.parts[0] == "base":
        tune = [*FAST["finetune"], f"model.path={run}", f"run_dir={copy / 'new'}"]
        return [("train", [f"resume={run}"]), ("sample", [str(run), "--nfe", "3"]), ("finetune", tune)]
    return [("finetune", [f"resume={run}"])]


def throw_at_files(runs: Path, place: Path, take: Callable[[int], bool]) -> Counter[str]:
    """Damage the files, and let the commands read them."""
    counts, number, fell = Counter[str](), itertools.count(), list[str]()
    for file, damage in itertools.product(run_files(runs), DAMAGES):
        for i in range(len(readers(file, place))):
            if not take(next(number)):
                continue
            copy = damaged(runs, file, damage, place)
            command, words = readers(file, copy)[i]
            before = contents(copy)
            try:
                said = thrown(command, words, begin=True)
            except AssertionError as error:
                fell.append(f"{file} {damage}: {error}")
                continue
            counts["refused" if said else "accepted"] += 1
            after = contents(copy)
            for name in before if said else ():  # what was whole is as it was
                assert name == str(file) or name.endswith(".lock") or after.get(name) == before[name], (
                    said,
                    name,
                )
    assert not fell, "\n".join(fell)
    return counts


def test_every_file_of_a_run_damaged(runs: Path, tmp_path: Path) -> None:
    """Each file with some of the damages, for some of its readers; a soak test tries all."""
    counts = throw_at_files(runs, tmp_path, lambda number: number % 7 == 0)
    tell("files of runs", counts)
    assert counts["refused"] > 10 and counts["accepted"] > 10


@pytest.mark.soak
def test_every_file_of_a_run_with_every_damage(runs: Path, tmp_path: Path) -> None:
    counts = throw_at_files(runs, tmp_path, lambda number: True)
    tell("files of runs", counts)


# As processes


def check_refusal(status: int, out: str, err: str, folder: Path) -> None:
    """Status 1, one line of errors, nothing written."""
    assert status == 1 and out == "" and err.startswith("error: "), err
    assert err.count("\n") == 1 and [*folder.iterdir()] == []


def test_from_a_shell(tmp_path: Path) -> None:
    """A command; tests/configs/test_cli.py does so with an example."""
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "diffrl", "nope"],
        cwd=tmp_path, env={"PYTHONPATH": str(ROOT), "PATH": ""}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    check_refusal(ran.returncode, ran.stdout, ran.stderr, tmp_path)


@pytest.mark.parametrize(
    "words",
    [
        ["train", "seed=-1"],
        ["train", "chain.num_steps=1"],
        ["train", "process.sigma_max=1e30"],
        ["train", "data=npz", "data.path=/nowhere.npz"],
        ["train", "resume=/nowhere"],
        ["train", "a b"],
        ["finetune", "recipe=nope"],
        ["finetune", "compare=[]", "model.path=/nowhere"],
        ["compare", "plan.studies.x.overrides=[trainer.grad_steps=500]"],
        ["compare", "report=true", "out=/nowhere"],
        ["compare", "plan=quick", "out="],
        ["sample", "/nowhere"],
    ],
)
def test_in_a_process(words: list[str], shell: Shell, tmp_path: Path) -> None:
    check_refusal(*shell.run("-m", "diffrl", *words, folder=tmp_path), tmp_path)


def test_the_kit_lets_tracebacks_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else this file could not fail."""
    monkeypatch.setattr("diffrl.configs.commands.run_experiment", lambda config: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        throw("train", [*FAST["train"], "seed=1"])
    assert not issubclass(Accepted, Exception)
