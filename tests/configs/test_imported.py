"""Training on from a pipeline of diffusers by one command: network, process and form come with its folder."""

import shutil
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from diffusers import DDIMScheduler

import diffrl
from diffrl import __main__ as program
from diffrl.configs.cells import plan_seeds
from diffrl.configs.cli import settings
from diffrl.configs.imported import with_imported_model
from diffrl.diffusion.pipelines import export_pipeline
from diffrl.errors import InputError
from diffrl.experiments.train import run_experiment
from tests.kit.configs import composed
from tests.kit.diffusers_unets import stock_pipeline

GREY = {"in_channels": 1, "out_channels": 1}
QUICK = (
    *("data=digits", "objective=td", "compare=false", "chain.num_steps=4", "trainer.grad_steps=2"),
    *("trainer.batch_size=2", "eval.sigmas=[1]", "eval.points=4", "eval.samples=8", "eval.num_steps=[2]"),
)


def test_one_command_trains_on_from_a_pipeline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stock_pipeline(tmp_path / "mine", unet=GREY)
    start = diffrl.from_pretrained(tmp_path / "mine")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["diffrl", "train", "init=mine", *QUICK, "run_dir=run"])
    program.main()
    command = (tmp_path / "run" / "command.txt").read_text(encoding="utf-8")
    assert "init=mine" in command and "network" not in command  # it is what was typed
    kept = safetensors.torch.load_file("run/init.safetensors")
    assert all(torch.equal(kept[name], x) for name, x in start.state_dict().items())
    shutil.rmtree(tmp_path / "mine")
    run = diffrl.load("run")
    assert run.denoiser.process == diffrl.DDPM() and run.results["objectives"].keys() == {"td"}
    assert run.sampler == diffrl.Ancestral() and run.denoiser.network.unet.config.freq_shift == 1
    export_pipeline(run.denoiser, tmp_path / "back")  # and so on


def test_what_is_given_stands_above_the_folder(tmp_path: Path) -> None:
    cosine = {
        "beta_schedule": "squaredcos_cap_v2",
        "num_train_timesteps": 200,
        "prediction_type": "v_prediction",
    }
    stock_pipeline(tmp_path / "a=b", scheduler=DDIMScheduler, unet=GREY, **cosine)
    words = [f"init='{tmp_path / 'a=b'}'", *QUICK, "network.dropout=0.1", "sampler=ancestral"]
    config = settings(composed(*with_imported_model(words)), [])
    assert config["process"] == {"name": "ddpm", "train_steps": 200, "kind": "cosine", **{
        name: getattr(diffrl.DDPM(200, "cosine", 0.0001, 0.02), name) for name in ("beta_start", "beta_end")
    }}  # fmt: skip
    assert config["denoiser"]["prediction_type"] == "v" and config["denoiser"]["time_input"] == "t"
    assert config["network"]["dropout"] == 0.1 and config["network"]["block_out_channels"] == [8, 16]
    assert config["sampler"]["name"] == "ancestral"
    cells, _ = plan_seeds({**config, "seeds": [1]}, words)  # of several seeds and of plans too
    assert cells[0].config["network"] == config["network"] and cells[0].config["process"] == config["process"]
    another = settings(composed(*with_imported_model([*words, "process=vp"])), [])
    with pytest.raises(InputError, match=r"init is .*a=b, trained on DDPM\(.* and this run is on VP\("):
        run_experiment(another, progress=False)


def test_other_words_stay_as_they_are(tmp_path: Path) -> None:
    stock_pipeline(tmp_path / "mine", unet=GREY)
    start = f"init={tmp_path / 'mine'}"
    for words in (
        [],
        ["seed=1"],
        ["init=runs/a"],
        ["init=''"],
        ["init=null"],
        ["init=a,b"],
        [start, "resume=runs/a"],
    ):
        assert with_imported_model(words) == words
    assert with_imported_model([start])[-1] == start
