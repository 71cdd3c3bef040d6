"""Methods of one's own, each in one file outside the library: in the help, in workers, after a resume, in the docs."""

from pathlib import Path

import pytest

from tests.kit.configs import TINY
from tests.kit.paths import ROOT
from tests.kit.shell import Shell

TOYS = ROOT / "tests" / "toys"
KINDS = ("objective", "sampler", "schedule", "network", "credit", "placement", "rollouts", "method", "reward")
TRAINING = ("objective", "sampler", "schedule", "network")
TUNING = ("credit", "placement", "rollouts", "method", "reward")
SETTINGS = [word for word in TINY if not word.startswith("network")]
SETTINGS += ["objective=toy_objective", "sampler=toy_sampler", "process=toy_process", "compare=false"]
SETTINGS += ["network=toy_network", "network.width=6"]
QUICK = [
    *("reward=toy_reward", "reward.scale=2", "heldout_reward=none", "policy.num_steps=4"),
    *("loop.iterations=4", "loop.eval_every=2", "loop.checkpoint_every=2", "evaluation.samples=16"),
]


def imports(*kinds: str) -> list[str]:
    return [word for kind in kinds for word in ("--import", f"tests.toys.{kind}")]


@pytest.mark.parametrize("kind", KINDS)
def test_a_method_is_one_small_file(kind: str) -> None:
    lines = (TOYS / f"{kind}.py").read_text(encoding="utf-8").splitlines()
    assert sum(bool(line.strip()) for line in lines) < 40


def test_they_are_in_the_help(shell: Shell, tmp_path: Path) -> None:
    shown = shell("-m", "diffrl", "train", *imports(*TRAINING), "--help", folder=tmp_path)
    for name in ("toy_objective", "toy_sampler", "toy_process", "toy_network"):
        assert name in shown
    shown = shell("-m", "diffrl", "finetune", *imports(*TUNING), "--help", folder=tmp_path)
    for name in ("toy_credit", "toy_placement", "toy_rollouts", "toy_method", "toy_surrogate", "toy_reward"):
        assert name in shown


@pytest.mark.slow
def test_a_run_of_own_methods_is_resumed_by_name_only(shell: Shell, tmp_path: Path) -> None:
    train = ["-m", "diffrl", "train"]
    shown = shell(*train, *imports(*TRAINING), *SETTINGS, "run_dir=run", folder=tmp_path)
    assert "Toy(λ=0.7) on a mixture of 3 Gaussians" in shown
    recorded = (tmp_path / "run" / "command.txt").read_text(encoding="utf-8")
    assert recorded.startswith(
        "python -m diffrl train --import tests.toys.objective --import tests.toys.sampler"
    )

    error = shell(*train, "resume=run", folder=tmp_path, ok=False)
    assert error.startswith("error: run was made with methods of tests.toys.objective, tests.toys.sampler")
    assert "give --import tests.toys.objective" in error
    again = shell(*train, *imports(*TRAINING), "resume=run", folder=tmp_path)
    assert again == shown
    error = shell("-m", "diffrl", "sample", "run", "--nfe", "3", folder=tmp_path, ok=False)
    assert "give --import" in error
    picture = shell("-m", "diffrl", "sample", "run", "--nfe", "3", *imports(*TRAINING), folder=tmp_path)
    assert (tmp_path / picture.strip()).exists()


@pytest.mark.slow
def test_they_run_in_worker_processes(shell: Shell, tmp_path: Path) -> None:
    (tmp_path / "conf" / "plan").mkdir(parents=True)
    (tmp_path / "conf" / "plan" / "mine.yaml").write_text(
        "name: mine\ntuning: {enabled: false}\ncases:\n  tiny: ["
        + ", ".join(f'"{word}"' for word in TINY)
        + "]\n"
        "studies:\n  a:\n    title: a question\n    cases: [tiny]\n    baseline: Toy\n    seeds: [1]\n"
        "    schemes:\n      Toy: [objective=toy_objective]\n"
        "      Toy, other sampler: [objective=toy_objective, sampler=toy_sampler, process=toy_process]\n",
        encoding="utf-8",
    )
    words = ["plan=mine", "workers=2", "out=out", "--config-dir", "conf"]
    shown = shell("-m", "diffrl", "compare", *imports(*TRAINING), *words, folder=tmp_path)
    assert "2 of 2 cells are finished" in shown


@pytest.mark.slow
def test_own_pieces_tune_in_worker_processes(shell: Shell, tmp_path: Path) -> None:
    base = [word for word in TINY if not word.startswith(("data.dim", "data.components"))]
    shell("-m", "diffrl", "train", *base, "data.dim=2", "compare=false", "run_dir=base", folder=tmp_path)
    (tmp_path / "conf" / "experiment").mkdir(parents=True)
    (tmp_path / "conf" / "experiment" / "mine.yaml").write_text(
        "# @package _global_\ncompare: [samples, pieces]\nmethods:\n"
        "  samples: [recipe=toy_method]\n"
        "  pieces: [credit=rewards_to_go, placement=toy_placement, rollouts=toy_rollouts, rollouts.trajectories=16]\n"
        "seeds: [1]\nworkers: 2\nout: out\n",
        encoding="utf-8",
    )
    words = ["--config-dir", "conf", "experiment=mine", "model.path=base", *QUICK]
    shown = shell("-m", "diffrl", "finetune", *imports(*TUNING), *words, folder=tmp_path)
    assert "samples" in shown and "pieces" in shown and (tmp_path / "out" / "report.md").exists()


@pytest.mark.parametrize(
    ("command", "kind", "words", "refusal"),
    [
        (
            "train",
            "objective",
            [*TINY, "objective=toy_objective", "objective.mix=0.2"],
            "objective.mix is 0.2",
        ),
        ("train", "objective", ["objective=toy_objektive"], "toy_objective"),
    ],
)
def test_they_state_what_they_refuse(
    command: str, kind: str, words: list[str], refusal: str, shell: Shell, tmp_path: Path
) -> None:
    error = shell("-m", "diffrl", command, *imports(kind), *words, folder=tmp_path, ok=False)
    assert refusal in error


def test_an_unknown_module_is_one_line(shell: Shell, tmp_path: Path) -> None:
    error = shell("-m", "diffrl", "train", "--import", "no_such_module", folder=tmp_path, ok=False)
    assert error.startswith("error: --import no_such_module: there is no such module here")
    error = shell("-m", "diffrl", "train", "--import", "mine.py", folder=tmp_path, ok=False)
    assert error.endswith("there is no such module here; give its name without .py: --import mine")
    error = shell("-m", "diffrl", "train", "--import", folder=tmp_path, ok=False)
    assert error == "error: --import needs the name of a module"


@pytest.mark.parametrize(
    ("kind", "file", "name"),
    [
        *(("objective", "objective", "toy_objective"), ("sampler", "sampler", "toy_sampler")),
        *(("process", "schedule", "toy_process"), ("credit", "credit", "toy_credit")),
        *(("placement", "placement", "toy_placement"), ("rollouts", "rollouts", "toy_rollouts")),
        ("recipe", "method", "toy_method"),
    ],
)
def test_they_have_a_page_in_the_docs(kind: str, file: str, name: str, shell: Shell, tmp_path: Path) -> None:
    pages = str(ROOT / "docs" / "method_pages.py")
    page = shell(pages, kind, name, "--import", f"tests.toys.{file}", folder=tmp_path)
    assert name in page and "Not run" in page
