"""Configs and command line: everything composes and builds; a mistake is one line that names it."""

import inspect
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf
from PIL import Image

from diffrl.configs.cli import EXPECTED, command, explain, settings
from diffrl.configs.groups import TrainConfig, register
from diffrl.configs.schema import schema
from diffrl.data.registry import DATASETS
from diffrl.diffusion.chains import Chain
from diffrl.diffusion.denoisers import Denoiser
from diffrl.diffusion.networks.registry import NETWORKS
from diffrl.diffusion.samplers.registry import SAMPLERS
from diffrl.diffusion.schedules.registry import PROCESSES
from diffrl.diffusion.trajectories import ChainSampler
from diffrl.errors import InputError
from diffrl.objectives.registry import OBJECTIVES
from diffrl.objectives.scheme import build_objective
from diffrl.objectives.stand_ins import StandIn
from diffrl.training.build import build_data, build_denoiser, build_oracle, build_sampler
from diffrl.training.evaluation import Evaluation
from diffrl.training.optim import Optim
from diffrl.training.runs import RunFolderError
from diffrl.training.trainer import Average, Length, Target
from tests.kit.configs import FINETUNING, IMAGE_RECIPES, composed, small
from tests.kit.maps import MAPS
from tests.kit.paths import ROOT

EXPERIMENTS = sorted(
    path.stem
    for path in (ROOT / "configs" / "experiment").glob("*.yaml")
    if path.stem not in FINETUNING  # tests/experiments/test_tuning_runs.py builds those
    and path.stem not in IMAGE_RECIPES  # tests/experiments/test_image_recipes.py those
)


# Everything composes and builds


no_updater = pytest.mark.filterwarnings("ignore:No target network updater")


def built(config: dict[str, Any]) -> None:
    """Build all of a configuration, and take the loss of one batch."""
    data = build_data(config)
    denoiser = build_denoiser(config, data)
    objective = build_objective(config, denoiser, data=data)
    build_sampler(config)
    build_oracle(data, denoiser.process)
    objective.set_progress(0, 10)
    x0, _ = data.batch(4, torch.Generator().manual_seed(0))
    states = objective.draw(x0, cond=None, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert bool(objective.loss(states)["loss_value"].isfinite())


@no_updater
@no_updater
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_builds(name: str) -> None:
    words = [f"experiment={name}"]
    built(settings(composed(*words), words))


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    """A path for each data set that reads files."""
    pixels = np.random.default_rng(0).integers(0, 256, (20, 4, 4), dtype=np.uint8)
    np.savez(tmp_path / "x.npz", x=pixels)
    (tmp_path / "x.idx").write_bytes(
        bytes([0, 0, 8, 3, *(b for n in (20, 4, 4) for b in (0, 0, 0, n))]) + pixels.tobytes()
    )
    for i, image in enumerate(pixels):
        folder = tmp_path / "images" / str(i % 2)
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"{i:02}.png")
    return {
        "npz": str(tmp_path / "x.npz"),
        "idx": str(tmp_path / "x.idx"),
        "folder": str(tmp_path / "images"),
    }


@no_updater
@pytest.mark.parametrize("name", DATASETS)
def test_every_data_set_builds(name: str, files: dict[str, str], tmp_path: Path) -> None:
    if name == "hf":
        library = pytest.importorskip("datasets")
        cells = [{"bytes": file.read_bytes(), "path": None} for file in Path(files["folder"]).rglob("*.png")]
        features = library.Features({"image": library.Image()})
        files["hf"] = str(tmp_path / "hf")
        library.Dataset.from_dict({"image": cells}, features=features).save_to_disk(files["hf"])
    built(small(f"data={name}", *([f"data.path={files[name]}"] if name in files else [])))


@no_updater
@pytest.mark.parametrize("name", PROCESSES)
def test_every_process_builds(name: str) -> None:
    built(small(f"process={name}"))


@no_updater
@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_builds(name: str) -> None:
    built(small(f"network={name}", "data=digits"))


@no_updater
@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_builds(name: str) -> None:
    built(small(f"sampler={name}"))


@no_updater
@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_builds(name: str) -> None:
    special = {
        **dict.fromkeys(("ct", "cd", "td_ct"), ["denoiser.prediction_type=consistency"]),
        **dict.fromkeys(MAPS, ["network.second_time=true"]),
        "priorgrad": ["denoiser.prior=data"],
        "hybrid": ["network.variance=true"],
        "progressive": ["process=flow"],
    }.get(name, [])
    built(small(f"objective={name}", *special, *(["objective.teacher=exact"] if name == "cd" else [])))


def test_every_group_of_the_configuration_has_options() -> None:
    register()
    groups = {name for name, options in ConfigStore.instance().repo.items() if isinstance(options, dict)}
    assert {field.name for field in fields(TrainConfig) if field.default == "???"} <= groups


# The constructors' signatures are the only home of a default


def constructors() -> list[tuple[str, str, Callable[..., Any]]]:
    registries = {"data": DATASETS, "process": PROCESSES, "network": NETWORKS, "sampler": SAMPLERS}
    found = [(g, name, f) for g, registry in registries.items() for name, f in registry.items()]
    found += [("objective", entry.name, f) for entry in OBJECTIVES.entries() for f in entry.functions]
    singles = {"chain": ChainSampler, "denoiser": Denoiser, "optim": Optim, "ema": Average, "target": Target}
    singles |= {"trainer": Length, "eval": Evaluation}
    return (
        found
        + [(g, "default", f) for g, f in singles.items()]
        + [("chain", "default", f) for f in (Chain, StandIn)]
    )


@pytest.mark.parametrize(("group", "name", "function"), constructors())
def test_defaults_are_the_signatures(group: str, name: str, function: Callable[..., Any]) -> None:
    register()
    node = ConfigStore.instance().load(f"{group}/{name}.yaml").node
    config = OmegaConf.to_container(OmegaConf.create(node))
    assert isinstance(config, dict)
    for parameter in inspect.signature(function).parameters.values():
        if parameter.name in config and parameter.default is not parameter.empty:
            default = parameter.default
            assert config[parameter.name] == (list(default) if isinstance(default, tuple) else default)
    required = [p.name for p in inspect.signature(function).parameters.values() if p.default is p.empty]
    assert all(config.get(key, "???") == "???" for key in required)


def test_schema_types() -> None:
    def f(
        a: int,
        b: float | None = None,
        c: tuple[float, ...] = (1.0, 2.0),
        d: Literal["x", "y"] = "x",
        e: float | Path | torch.Tensor = 1.0,
        *,
        skipped: torch.Tensor | None = None,
    ) -> None: ...

    config = OmegaConf.structured(schema("f", f, omit=("skipped",)))
    assert OmegaConf.to_container(config) == {
        "name": "f", "a": "???", "b": None, "c": [1.0, 2.0], "d": "x", "e": 1.0,
    }  # fmt: skip
    for key, wrong in (("a", "x"), ("b", "x"), ("c", ["x"]), ("c", 3)):
        with pytest.raises(EXPECTED):
            OmegaConf.update(config, key, wrong)
    OmegaConf.update(config, "e", "somewhere")
    OmegaConf.update(config, "e", 2)  # a whole number is a number


# A mistake is one line


def mistake(*words: str, name: str = "train") -> str:
    with pytest.raises(EXPECTED) as error:
        settings(composed(*words, name=name), list(words))
    line = explain(error.value)
    assert "\n" not in line and len(line) < 400
    return line


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["objective.lmbd=0.5"], "unknown config key 'objective.lmbd'; did you mean objective.lmbda?"),
        (["lmbda=0.5"], "unknown config key 'lmbda'; did you mean objective.lmbda?"),
        (["grad_steps=5"], "did you mean trainer.grad_steps?"),
        (["sed=1"], "unknown config key 'sed'; did you mean seed"),
        (
            ["trainer.zzz=1"],
            "unknown config key 'trainer.zzz'; trainer has accumulate, augment, batch_size, ",
        ),
        (["foo=1"], "unknown config key 'foo'; --help lists all that can be set"),
        (["s=1"], "unknown config key 's'; --help lists all that can be set"),
        (["batch=512"], "unknown config key 'batch'; did you mean trainer.batch_size?"),
        (["data=folder", "cond=1"], "unknown config key 'cond'; did you mean data.conditional?"),
        (["data=folder", "xflip=true"], "unknown config key 'xflip'; did you mean data.flip?"),
        (
            ["beside.a.chain.coupling=0"],
            "unknown config key 'beside.a'; to add it, write a + before the word",
        ),
        (["credit=critic"], "unknown config key 'credit'; the command finetune has it"),
        (["experiment=sd15_ddpo"], "unknown config key 'recipe'"),
        (["data=digits", "data.dim=3"], "unknown config key 'data.dim'"),
        (["data=nope"], "Could not find 'data/nope' Available options in 'data': checkerboard digits"),
        (["data=digit"], "spirals; did you mean data=digits?"),
        (["process=mine"], "; one of your own is known after --import MODULE"),
        (
            ["seeds=1,2"],
            "seeds=1,2 holds several values: write 'seeds=[1,2]' for a list, or add --multirun for one run",
        ),
        (["seeds=[1,"], "; or, if a list is meant, close it and quote it whole: 'seeds=[1,2]'"),
        (
            ["data.path=~/x.npz"],
            "cannot be read: a shell does not replace ~ there: write data.path=$HOME/x.npz",
        ),
        (["nope=digits"], "unknown config key 'nope'"),
        (
            ["experiment=nope"],
            "'experiment/nope': --help lists them; one of your own is found by --config-dir",
        ),
        (["experiment=cifar_edm"], "--help lists them; did you mean experiment=cifar10_edm"),
        (
            ["trainer.grad_steps=many"],
            "trainer.grad_steps: Value 'many' of type 'str' could not be converted",
        ),
        (["trainer.grad_steps=1.5"], "trainer.grad_steps: Value '1.5'"),
        (["seed=null"], "seed: "),
        (["compare=perhaps"], "compare: Value 'perhaps'"),
        (["data=idx"], "data.path has no default: give data.path=..."),
        (["+foo=1"], r"+foo=1: keys are neither added (+) nor removed (~)"),
        (["~seed"], "~seed: keys are neither added"),
        (["objective.lmbda"], "objective.lmbda"),
        (["seed=[1"], """'seed=[1' cannot be read: quote what it holds, as in 'seed="[1"'"""),
        (["run_dir=köln"], """quote what it holds, as in 'run_dir="köln"'"""),
        (["a b"], "'a b' cannot be read: write key=value"),
        (["objective.lmbda=nan"], "objective.lmbda is nan: give a finite number"),
        (["eval.sigmas=[1,inf]"], "eval.sigmas[1] is inf: give a finite number"),
        (["trainer.grad_steps=1e30"], "trainer.grad_steps"),
        (["seed=10000000000000000000000"], "seed is 10000000000000000000000: give a number up to"),
        (["resume=/nowhere/at/all"], "/nowhere/at/all holds no run"),
        (["resume=x", "seed=1", "data=gmm"], "seed=1, data=gmm: a run is resumed as it was started"),
    ],
)
def test_mistakes(words: list[str], message: str) -> None:
    assert message in mistake(*words)


def test_a_folder_is_given_in_place_of_a_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pics").mkdir()
    monkeypatch.chdir(tmp_path)
    assert "; files of yours are data=folder data.path=pics, or npz, idx or hf" in mistake("data=pics")


def test_resume_takes_the_old_run_s_settings(tmp_path: Path) -> None:
    stored = {**small("seed=5"), "run_dir": str(tmp_path)}
    OmegaConf.save(OmegaConf.create(stored), tmp_path / "config.yaml")
    words = [f"resume={tmp_path}"]
    assert settings(composed(*words), words) == {**stored, "resume": str(tmp_path)}
    words.append("device=meta")
    assert settings(composed(*words), words)["device"] == "meta"


# The command


def test_command_passes_a_plain_dict(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, Any]] = []
    monkeypatch.setattr(sys, "argv", ["train", "objective.lmbda=0.5", "eval.sigmas=[1]"])
    command("train")(seen.append)()
    assert (
        type(seen[0]) is dict and seen[0]["objective"]["lmbda"] == 0.5 and seen[0]["eval"]["sigmas"] == [1.0]
    )


@pytest.mark.parametrize(
    ("words", "remedy"),
    [
        (["--data", "gmm"], "--data: settings are written without dashes: data=..."),
        (["--seed=3", "data=gmm"], "--seed=3: settings are written without dashes: seed=3"),
    ],
)
def test_settings_with_dashes_are_one_line(
    words: list[str], remedy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["train", *words])
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    with pytest.raises(SystemExit) as stop:
        command("train")(lambda config: None)()
    assert stop.value.code == f"error: {remedy}"


@pytest.mark.parametrize("error", [RunFolderError("that\nfolder"), InputError("that folder")])
def test_expected_errors_are_one_line(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def failing(config: dict[str, Any]) -> None:
        raise error

    monkeypatch.setattr(sys, "argv", ["train"])
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    with pytest.raises(SystemExit) as stop:
        command("train")(failing)()
    assert stop.value.code == "error: that folder"
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(type(error)):
        command("train")(failing)()


def test_unexpected_errors_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(config: dict[str, Any]) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(sys, "argv", ["train"])
    with pytest.raises(ZeroDivisionError):
        command("train")(failing)()


def never(config: dict[str, Any]) -> None:
    raise AssertionError("run")


def test_help_and_cfg(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["train", "--help"])
    with pytest.raises(SystemExit) as stop:
        command("train")(never)()
    assert stop.value.code in (0, None)
    text = capsys.readouterr().out
    # Hydra lists the options of a group in one line, however many there are
    ours = [line for line in text.splitlines() if not re.fullmatch(r"\w+: \w+(, \w+)+", line)]
    for group in ("data: checkerboard, digits", "objective: ", "process: ddpm, edm", "experiment: "):
        assert group in text
    assert "resume=runs/..." in text and "lmbda: null" in text and max(map(len, ours)) <= 120

    monkeypatch.setattr(sys, "argv", ["train", "--cfg", "job", "data=gmm", "objective.lmbda=0.5"])
    command("train")(never)()
    shown = OmegaConf.to_container(OmegaConf.create(capsys.readouterr().out))
    assert isinstance(shown, dict) and shown["data"]["name"] == "gmm" and shown["objective"]["lmbda"] == 0.5


@pytest.mark.parametrize(
    ("words", "added"),
    [
        ([], True),
        (["seed=1", "trainer.grad_steps=9", "eval.samples=10", "run_dir=x", "seeds=[1]"], True),
        (["objective.lmbda=0.5"], False),
        (["data=gmm", "data.dim=3"], False),
        (["compare=false"], False),
        (["network.hidden=8"], False),
        (["+beside.a.chain.coupling=0"], False),
        (["experiment=gmm16"], False),
    ],
)
def test_without_words_it_is_the_main_job(
    words: list[str], added: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The word is added as if it were typed, so that the folder's command tells it; any choice is the user's own."""
    seen: list[dict[str, Any]] = []
    monkeypatch.setattr(sys, "argv", ["train", *words])
    command("train", "experiment=bootstrapping")(seen.append)()
    assert sys.argv == ["train", *words, *["experiment=bootstrapping"] * added]
    assert ("td_shared" in seen[0]["beside"]) is added and (seen[0]["sampler"]["name"] == "ddim") is added


def test_the_main_job_is_nobody_else_s() -> None:
    """Plans, and what fine-tuning trains first, start from what `train` composes without it."""
    assert not composed().beside and composed().sampler.name == "heun" and composed().objective.lmbda is None


def test_a_sweep_runs_each_combination(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[dict[str, Any]] = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train", "--multirun", "objective.lmbda=0,0.5", "seed=0,1"])
    command("train")(seen.append)()
    assert [(c["objective"]["lmbda"], c["seed"]) for c in seen] == [(0, 0), (0, 1), (0.5, 0), (0.5, 1)]


def test_from_a_shell() -> None:
    """Status 1 and one line, nothing else."""
    environment = {k: v for k, v in os.environ.items() if k != "HYDRA_FULL_ERROR"}
    ran = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "examples/train_td_lambda.py", "objective.lmbd=0.5"],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ran.returncode == 1 and ran.stdout == ""
    assert ran.stderr == "error: unknown config key 'objective.lmbd'; did you mean objective.lmbda?\n"
