"""The command `diffrl`: one word for each thing to do, a help for each, one line for a wrong word."""

import json
import os
import subprocess
import sys
import sysconfig
import tomllib
from importlib import import_module
from pathlib import Path

import pytest

from diffrl import __main__ as program
from diffrl import registry
from diffrl.configs.commands import COMMANDS
from diffrl.configs.names import known_names, names_in_source
from diffrl.data.dataset import Data
from diffrl.registry import registries
from diffrl.training.runs import RunFolder
from tests.kit.paths import ROOT
from tests.kit.runs import run


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A finished run."""
    return run(tmp_path_factory.mktemp("trained") / "run", "trainer.grad_steps=4", "compare=false")


def said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """What a command prints."""
    monkeypatch.setattr(sys, "argv", ["diffrl", *map(str, words)])
    program.main()
    return capsys.readouterr().out


def refused(monkeypatch: pytest.MonkeyPatch, *words: object) -> str:
    """The one line with which it ends."""
    monkeypatch.setattr(sys, "argv", ["diffrl", *map(str, words)])
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    with pytest.raises(SystemExit) as end:
        program.main()
    line = str(end.value)
    assert line.startswith("error: ") and "\n" not in line
    return line


def test_it_is_installed_under_its_name() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    module, _, function = project["scripts"]["diffrl"].partition(":")
    assert getattr(import_module(module), function) is program.main


@pytest.mark.parametrize(
    "words", [["list", "network"], ["train", "network=mine", "--cfg", "job"]], ids=["list", "train"]
)
def test_the_installed_script_finds_a_module_where_one_stands(words: list[str], tmp_path: Path) -> None:
    own = """from torch import nn
from diffrl.diffusion.networks.registry import NETWORKS
@NETWORKS.register("mine")
class Mine(nn.Module):
    def __init__(self, event_shape: tuple[int, ...], num_classes: int = 0, width: int = 73) -> None: ...
"""
    (tmp_path / "my_net.py").write_text(own, encoding="utf-8")
    script = Path(sysconfig.get_path("scripts")) / "diffrl"
    ran = subprocess.run(
        [script, *words, "--import", "my_net"],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ran.returncode == 0 and "mine" in ran.stdout, ran.stderr
    assert words[0] == "list" or "width: 73" in ran.stdout


def test_the_help_tells_every_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert program.COMMANDS.keys() == {*COMMANDS, "list"}
    told = said(monkeypatch, capsys)
    assert told == said(monkeypatch, capsys, "--help")
    assert all(f"\n  {name} " in told for name in program.COMMANDS)


@pytest.mark.parametrize("command", ["sample", "report", "evaluate", "export", "list"])
def test_each_has_a_help(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["diffrl", command, "--help"])
    with pytest.raises(SystemExit) as end:
        program.main()
    told = capsys.readouterr().out
    assert end.value.code == 0 and told.startswith(f"usage: diffrl {command} ")


def test_a_wrong_word_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    assert refused(monkeypatch, "tarin").startswith("error: there is no command 'tarin': give train, check, ")
    assert "there is no kind 'nope': give one of credit, data" in refused(monkeypatch, "list", "nope")
    assert "diffrl list --help tells what can be given" in refused(monkeypatch, "list", "data", "network")
    assert "required: folder; diffrl report --help tells" in refused(monkeypatch, "report")


# list


def test_names_in_the_source_are_those_that_are_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    read = names_in_source()
    monkeypatch.setattr(registry, "_USERS", {})
    assert known_names(["json"]) == read  # with a module of the user's all is imported
    own = {kind: {e.name: e for e in of.entries()} for kind, of in registries().items()}
    for kind, entries in own.items():
        said = [e.summary for e in entries.values()]
        shipped = {n: e.summary for n, e in entries.items() if said.count(e.summary) == 1 or e.also is None}
        assert shipped.items() <= read[kind].items() and len(read[kind]) == len(entries)
        assert len(set(read[kind].values())) == len(read[kind])  # each is told from the others
    assert read["objective"]["edm"].startswith("One noisy state of each datum, at a log-normal ratio")
    assert min(map(len, read["objective"].values())) > 20


def test_list(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    names = names_in_source()
    kinds = said(monkeypatch, capsys, "list").splitlines()
    assert [line.split()[0] for line in kinds[: len(names)]] == sorted(names)
    lines = said(monkeypatch, capsys, "list", "sampler").splitlines()
    assert [line.split()[0] for line in lines] == sorted(names["sampler"])
    assert all(line.endswith(names["sampler"][line.split()[0]]) for line in lines)


def test_list_imports_no_torch() -> None:
    code = (
        "import sys; sys.argv = ['diffrl', 'list', 'network']\n"
        "from diffrl.__main__ import main; main(); assert 'torch' not in sys.modules and 'hydra' not in sys.modules"
    )
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert ran.returncode == 0 and "unet" in ran.stdout, ran.stderr


# evaluate


def test_measured_again_the_figures_are_the_same(
    trained: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {file: file.stat().st_mtime_ns for file in trained.path.rglob("*")}
    out = tmp_path / "found.json"
    table = said(monkeypatch, capsys, "evaluate", trained.path, "--out", out)
    kept = trained.results()["objectives"]["td"]
    found = json.loads(out.read_text(encoding="utf-8"))
    assert found == {name: kept[name] for name in found} and found["value_error"]
    assert f"{kept['value_error']['1']:#.3g}" in table and "NFE 3 " in table
    assert {file: file.stat().st_mtime_ns for file in trained.path.rglob("*")} == before


def test_other_settings_are_taken(
    trained: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "found.json"
    words = ["eval.sigmas=[2]", "--weights", "model", "eval.num_steps=[3]", "eval.samples=50", "--out", out]
    said(monkeypatch, capsys, "evaluate", trained.path, *words)
    found = json.loads(out.read_text(encoding="utf-8"))
    assert found["denoising_error"].keys() == {"2"}
    distance = found["sample_distance"]
    assert distance["metric"] == "sliced_w2@50_seed2718281" and distance["by_nfe"].keys() == {"5"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["eval.samplez=5"], "unknown config key 'eval.samplez'; did you mean eval.samples"),
        (["eval.samples=many"], "eval.samples: Value 'many'"),
        (["eval.samples=0"], "eval.samples is 0"),
        (["eval.sigmas=[nan]"], "eval.sigmas[0] is nan: give a finite number"),
        (["seed=1"], "seed=1: give settings of eval, such as 'eval.num_steps=[4,9]'; all else is the run's"),
        (["eval=default"], "eval=default: give settings of eval"),
        (["--weights", "best"], "weights is 'best', but"),
        (["--objective", "nope"], "has nope been trained?"),
        (["--out", "a.csv"], "give a name that ends with .json"),
        (["--device", "nothing"], "device is 'nothing'"),
    ],
)
def test_wrong_settings_are_one_line(
    words: list[str], message: str, trained: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert message in refused(monkeypatch, "evaluate", trained.path, *words)


def test_other_data_than_in_training_are_refused(trained: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Data, "fingerprint", "another")
    assert "are others than in its training" in refused(monkeypatch, "evaluate", trained.path)


# report


def test_a_folder_without_a_comparison_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert refused(monkeypatch, "report", tmp_path).endswith(
        "holds no comparison: there is no index.json in it"
    )
    for text in ("{}", '{"cells": []}', '{"cells": [3]}'):
        (tmp_path / "index.json").write_text(text, encoding="utf-8")
        assert "index.json lists no cells" in refused(monkeypatch, "report", tmp_path)
