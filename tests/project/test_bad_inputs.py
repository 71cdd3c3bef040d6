"""Bad inputs of every kind, thrown at the commands: one line that names them, no traceback, nothing lost."""

import gzip
import itertools
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from diffrl.configs.groups import COMMANDS
from tests.kit.bad_inputs import DAMAGES, FAST, VALUES, Accepted, contents, keys, throw
from tests.kit.paths import ROOT

SECONDS = 20
"""Most for one input: what takes longer hangs."""

FILES = ("npz", "idx", "folder")
"""Data sets that are read from a path."""

BIG = 12 * 2**30
"""Bytes that a soak may take: what wants more is told so at once, and not by the system's killer."""


@pytest.fixture(autouse=True)
def quiet_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A folder of its own, and an end to what hangs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)

    def hang(number: int, frame: Any) -> None:
        raise AssertionError(f"took more than {SECONDS} s")

    old = signal.signal(signal.SIGALRM, hang)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, old)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished training run, `base`, and a finished fine-tuning run of it, `tuned`."""
    folder = tmp_path_factory.mktemp("runs")
    assert throw("train", [*FAST["train"], f"run_dir={folder / 'base'}"], begin=True, real=True) == ""
    words = [*FAST["finetune"], f"model.path={folder / 'base'}", f"run_dir={folder / 'tuned'}"]
    assert throw("finetune", words, begin=True, real=True) == ""
    return folder


def thrown(command: str, words: list[str], **how: bool) -> str:
    """What is said, after a look at whether it is one line; a traceback fails the test, with the words."""
    signal.alarm(SECONDS)
    try:
        said = throw(command, words, **how)
    except (Exception, AssertionError) as error:
        raise AssertionError(f"{command} {words[-1]}: {type(error).__name__}: {error}") from error
    signal.alarm(0)
    assert said == "" or (said.startswith("error: ") and "\n" not in said and len(said) > 15), (words, said)
    return said


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


def fuzz(runs: Path, take: Callable[[int], bool]) -> Counter[str]:
    """Throw the values at the keys, or those whose number is taken; how many there were, by what became of them."""
    before, counts, fell = contents(runs), Counter[str](), list[str]()
    cases = [(c, *key, value) for c in COMMANDS if c != "compare" for key in keys(c) for value in VALUES]
    for number, (command, choice, key, value) in enumerate(cases):
        if not take(number):
            continue
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


def test_every_key_with_a_wrong_value(runs: Path, record_property: Callable[[str, object], None]) -> None:
    """Each key gets one or two of the values, another one than its neighbours; a soak test throws all."""
    counts = fuzz(runs, lambda number: number % (len(VALUES) - 1) == 0)
    record_property("counts", dict(counts))
    print(f"keys: {counts.total()} inputs, {counts['refused']} refused, {counts['accepted']} accepted")
    assert counts["refused"] > 300 and counts["accepted"] > 10


@pytest.mark.soak
def test_every_key_with_every_wrong_value(runs: Path) -> None:
    import resource

    old = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (BIG, old[1]))
    try:
        counts = fuzz(runs, lambda number: True)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, old)
    print(f"keys: {counts.total()} inputs, {counts['refused']} refused, {counts['accepted']} accepted")


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
    print(
        f"files of runs: {counts.total()} inputs, {counts['refused']} refused, {counts['accepted']} accepted"
    )
    assert counts["refused"] > 10 and counts["accepted"] > 10


@pytest.mark.soak
def test_every_file_of_a_run_with_every_damage(runs: Path, tmp_path: Path) -> None:
    counts = throw_at_files(runs, tmp_path, lambda number: True)
    print(
        f"files of runs: {counts.total()} inputs, {counts['refused']} refused, {counts['accepted']} accepted"
    )


# The user's own files


def own_files(place: Path) -> list[tuple[Path, list[str]]]:
    """Data in every form, and the words that name them."""
    pixels = np.random.default_rng(0).integers(0, 256, (20, 4, 4), dtype=np.uint8)
    idx = bytes([0, 0, 8, 3, *(b for n in (20, 4, 4) for b in (0, 0, 0, n))]) + pixels.tobytes()
    np.savez(place / "x.npz", x=pixels)
    (place / "x.idx").write_bytes(idx)
    (place / "x.idx.gz").write_bytes(gzip.compress(idx))
    for i, image in enumerate(pixels):
        folder = place / "images" / str(i % 2)
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"{i:02}.png")
    shutil.make_archive(str(place / "images"), "zip", place / "images")
    return [
        (place / "x.npz", ["data=npz", f"data.path={place / 'x.npz'}"]),
        (place / "x.idx", ["data=idx", f"data.path={place / 'x.idx'}"]),
        (place / "x.idx.gz", ["data=idx", f"data.path={place / 'x.idx.gz'}"]),
        (place / "images.zip", ["data=folder", f"data.path={place / 'images.zip'}"]),
        (place / "images" / "0" / "00.png", ["data=folder", f"data.path={place / 'images'}"]),
    ]


def test_data_of_one_s_own_damaged(tmp_path: Path) -> None:
    counts = Counter[str]()
    train = [w for w in FAST["train"] if not w.startswith("data")]
    for file, words in own_files(tmp_path):
        whole = file.read_bytes()
        assert thrown("train", [*train, *words]) == ""
        for damage, change in DAMAGES.items():
            file.write_bytes(change(whole))
            said = thrown("train", [*train, *words])
            counts["refused" if said else "accepted"] += 1
            assert (file.name in said or str(file.parent) in said) if said else damage == "flipped", said
        file.write_bytes(whole)
    print(f"data: {counts.total()} inputs, {counts['refused']} refused, {counts['accepted']} accepted")


PLANS = (
    *(
        "",
        "3",
        "- a",
        "name: [",
        "name: x",
        "\xff\xfe",
        "name: x\ncases: {a: [b]}\nstudies: {s: 3}",
        "cases: {a: 3}",
    ),
    "name: x\ncases: {a: [nope=1]}\nstudies: {s: {cases: [a], seeds: [1], baseline: b, schemes: {b: []}}}",
    "name: x\ncases: {a: []}\nstudies: {s: {cases: [z], seeds: [1], baseline: b, schemes: {b: []}}}",
    "name: x\ncases: {a: []}\nstudies: {s: {cases: [a], seeds: [x], baseline: b, schemes: {b: []}}}",
    "name: x\ncases: {a: []}\nstudies: {s: {cases: [a], seeds: [1], baseline: b, axes: {λ: objective.lmbda}}}",
    "name: x\ncases: {a: ['data=[']}\nstudies: {s: {cases: [a], seeds: [1], baseline: b, schemes: {b: []}}}",
    "name: x\ncases: {a: ['data=3']}\nstudies: {s: {cases: [a], seeds: [1], baseline: b, schemes: {b: []}}}",
    "name: ${nope}\ncases: {a: []}\nstudies: {s: {cases: [a], seeds: [1], baseline: b, schemes: {b: []}}}",
)
"""Files that are no plan of a comparison."""


@pytest.mark.parametrize("plan", PLANS)
def test_plans_that_are_none(plan: str, tmp_path: Path) -> None:
    (tmp_path / "conf" / "plan").mkdir(parents=True)
    (tmp_path / "conf" / "plan" / "mine.yaml").write_bytes(
        plan.encode("latin-1" if "\xff" in plan else "utf-8")
    )
    said = thrown("compare", ["--config-dir", str(tmp_path / "conf"), "plan=mine", "out=out"], real=True)
    assert said and not (tmp_path / "out").exists()


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
        ["sample", "/nowhere"],
        ["nope"],
    ],
)
@pytest.mark.slow
def test_from_a_shell(words: list[str], tmp_path: Path) -> None:
    """Status 1, one line of errors, nothing written."""
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "diffrl", *words],
        cwd=tmp_path, env={"PYTHONPATH": str(ROOT), "PATH": ""}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ran.returncode == 1 and ran.stdout == "" and ran.stderr.startswith("error: "), ran.stderr
    assert ran.stderr.count("\n") == 1 and [*tmp_path.iterdir()] == []


def test_the_kit_lets_tracebacks_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else this file could not fail."""
    monkeypatch.setattr("diffrl.configs.commands.run_experiment", lambda config: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        throw("train", [*FAST["train"], "seed=1"])
    assert not issubclass(Accepted, Exception)
