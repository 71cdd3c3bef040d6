"""Every command that is written down, as it stands there.

All of them are read by the parser of their own command: Hydra composes and checks the words. Those of training,
checking, sampling and fine-tuning are run too (slow), with words after them that make them small. Of `make` the target
is looked up, of `pip install` the extras, of a script the file.
"""

import re
import shlex
import shutil
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import diffrl
from diffrl.__main__ import COMMANDS, main
from diffrl.configs.cli import settings
from diffrl.experiments.finetune import run_finetuning
from tests.kit.configs import composed
from tests.kit.diffusers_unets import stock_pipeline
from tests.kit.paths import ROOT
from tests.kit.runs import run

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
PAGES += [
    page for page in (ROOT / "docs").rglob("*.md") if not {"methods", "api", "measured"} & set(page.parts)
]
PAGES += (ROOT / "results").rglob("README.md")
SCRIPTS = {"train_td_lambda": "train", "finetune_reward": "finetune", "compare_bootstrapping": "compare"}
NAMED_ONLY = ("sample", "")  # in prose: it needs a folder
WITHOUT_CONFIGURATION = (
    "sample",
    "report",
    "evaluate",
    "export",
    "list",
)  # their words are paths, dashes and names
RUN = ("train", "check", "sample", "finetune")
EVALUATED = ["eval.points=8", "eval.samples=16", "eval.num_steps=[2]"]
TRAINED = ["trainer.grad_steps=4", "trainer.batch_size=4", "chain.num_steps=3", "workers=0", *EVALUATED]
TUNED = ["loop.iterations=2", "loop.eval_every=2", "rollouts.trajectories=64", "evaluation.samples=16"]
SMALL = {
    "train": TRAINED,
    "check": TRAINED,
    "finetune": [*TUNED, "workers=0"],
    "sample": ["--samples", "4"],
}


def lines() -> list[str]:
    """What stands in code blocks and between backquotes and begins with a program; comments are cut off."""
    found: set[str] = set()
    for page in PAGES:
        text = re.sub(
            r" \\\n\s*", " ", page.read_text(encoding="utf-8")
        )  # a command goes on in the next line
        blocks = re.findall(r"^```(\S*).*?\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
        prose = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
        code = [line for kind, block in blocks if kind != "python" for line in block.splitlines()]
        code += re.findall(r"^    (\S.*)$", text, flags=re.MULTILINE)
        code += [words.replace("\n", " ") for words in re.findall(r"`([^`]+)`", prose)]
        found |= {line.split("  #")[0].removeprefix("$ ").strip() for line in code}
    begins = (
        r"((?:python -m |torchrun .*-m )?diffrl [a-z]+|python (?:examples|docs|benchmarks)/\w+\.py|"
        r"make|pip install)(?: |$)"
    )
    return sorted(line for line in found if re.match(begins, line) and "COMMAND" not in line)


def of_diffrl() -> list[tuple[str, str]]:
    """(command, words) of those that are diffrl's; of words that are left out, `...`, none."""
    found = set()
    for line in lines():
        script = re.match(r"python examples/(\w+)\.py", line)
        if found_words := re.match(r"(?:python -m |torchrun .*-m )?diffrl (.*)", line):
            command, _, words = found_words[1].partition(" ")
            found.add((command, words))
        elif script and script[1] in SCRIPTS:
            found.add((SCRIPTS[script[1]], line[script.end() :].strip()))
    return sorted(found)


WRITTEN = of_diffrl()


def is_of_the_reader(words: list[str]) -> bool:
    """Whether they need a module or a plan that the reader writes: pages of own methods run those themselves."""
    return not {"--import", "--config-dir"}.isdisjoint(words)


@pytest.mark.parametrize(("command", "words"), WRITTEN)
def test_words_are_understood(command: str, words: str) -> None:
    given = shlex.split(words)
    assert command in COMMANDS
    if command == "compare" and "--import" in given:  # a plan may speak of methods that are not imported yet
        at = given.index("--import")
        given = given[:at] + given[at + 2 :]
    if command not in WITHOUT_CONFIGURATION and "--help" not in given and not is_of_the_reader(given):
        chosen = [word for word in given if not word.startswith("resume=")]
        name = "train" if command == "check" else command
        assert settings(composed(*chosen, name=name), [w for w in chosen if not w.startswith("extend=")])


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the commands speak of: pictures, pairs of them, runs on digits and rings, and models."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "my_pictures").mkdir()
    rng = np.random.default_rng(0)
    for n in range(40):
        Image.fromarray(rng.integers(0, 256, (8, 8), dtype=np.uint8)).save(
            folder / "my_pictures" / f"{n}.png"
        )
    pairs = rng.integers(0, 256, (2, 8, 1, 8, 8), dtype=np.uint8)
    np.savez(folder / "pairs.npz", preferred=pairs[0], rejected=pairs[1])
    for name, data in (("a", "digits"), ("a_rings", "rings")):
        run(
            folder / "runs" / name, f"data={data}", "trainer.grad_steps=4", "eval.points=8", "eval.samples=16"
        )
    diffrl.save_pretrained(diffrl.load(folder / "runs" / "a"), folder / "digits_model")
    stock_pipeline(folder / "my_ddpm", unet={"in_channels": 1, "out_channels": 1})
    return folder


@pytest.fixture
def place(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, to work in."""
    monkeypatch.chdir(tmp_path)
    return shutil.copytree(made, tmp_path, dirs_exist_ok=True)


@pytest.mark.slow
@pytest.mark.parametrize(("command", "words"), [w for w in WRITTEN if w[0] in RUN and w != NAMED_ONLY])
@pytest.mark.usefixtures("unrendered")
def test_commands_run(command: str, words: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = shlex.split(words)
    if is_of_the_reader(given) or "device=cuda" in given or "--help" in given:
        pytest.skip("needs a module of the reader's, a GPU, or prints only")
    given = [re.sub("^extend=.*", "extend=6", word.replace("runs/...", "runs/a")) for word in given]
    given = [re.sub(r"^seeds=.*", "seeds=[1,2]" if command == "train" else "seeds=[1]", w) for w in given]
    resumed = any(word.startswith("resume=") for word in given)
    small = [] if resumed else SMALL[command]
    if command == "finetune":
        config = None if resumed else composed(*given, name="finetune")
        if config is not None and config.model.name == "pipeline":
            pytest.skip("needs a pipeline: tests of adapters run these experiments on tiny ones")
        kind = "a_rings" if "experiment=finetune_rings" in given else "a"
        given = [re.sub(r"^model\.path=runs/.*", f"model.path=runs/{kind}", word) for word in given]
        if config is None or config.model.name == "tuned":
            tuned = settings(composed("model.path=runs/a", *SMALL["finetune"], name="finetune"), [])
            run_finetuning({**tuned, "run_dir": "runs/a_tuned"}, progress=False)
            given = [word.replace("runs/a", "runs/a_tuned") for word in given]
        if config is not None:
            trained = [*config.pretrain, "trainer.grad_steps=4", *EVALUATED]
            small = [*small, "pretrain=[" + ",".join(f'"{word}"' for word in trained) + "]"]
            small += [f"policy.num_steps={min(4, config.policy.num_steps)}"]
    monkeypatch.setattr(sys, "argv", ["diffrl", command, *given, *small])
    main()


# Other programs


@pytest.mark.parametrize("line", [line for line in lines() if line.startswith("make")])
def test_targets_of_make_are_there(line: str) -> None:
    targets = re.findall(r"^(\w[\w-]*):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert [word for word in shlex.split(line)[1:] if "=" not in word][0] in targets


@pytest.mark.parametrize("line", [line for line in lines() if line.startswith("pip install")])
def test_extras_are_there(line: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    asked = re.search(r"(?:diffrl|\.)\[([\w,]+)\]", line)
    assert asked is None or set(asked[1].split(",")) <= set(project["optional-dependencies"])
    assert asked is not None or "diffrl" not in line
    if "-c " in line:
        assert (ROOT / shlex.split(line)[shlex.split(line).index("-c") + 1]).is_file()


@pytest.mark.parametrize("line", [line for line in lines() if re.match(r"python \w+/", line)])
def test_scripts_are_there(line: str) -> None:
    assert (ROOT / line.split()[1]).is_file()


def test_commands_are_found_where_they_are_written() -> None:
    words = {command for command, _ in WRITTEN}
    assert words == COMMANDS.keys()
    assert ("train", "") in WRITTEN and len(WRITTEN) > 25
