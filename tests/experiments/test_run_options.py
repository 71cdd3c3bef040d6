"""What a run may be given, and what is refused: folders, devices, loggers, precision, images."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import diffrl
from diffrl.configs.cli import settings
from diffrl.experiments.evaluate import evaluate_run
from diffrl.experiments.finetune import opened
from diffrl.experiments.reports.run_table import split_line
from diffrl.extras import MissingExtra
from diffrl.training.optim import NonFiniteLoss
from diffrl.training.runs import RunFolder, RunFolderError
from diffrl.training.table import Table
from tests.kit.configs import composed, small
from tests.kit.runs import checkpoint, run

# What is refused


def test_a_file_is_no_run_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(RunFolderError, match="cannot be made a run folder"):
        run(tmp_path / "file" / "run")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["objective.lmbda=2"], r"lmbda is 2\.0"),
        (["objective.n_steps=0"], "n_steps"),
        (["objective.lmbda=0.5", "objective.n_steps=3"], "give one of lmbda, n_steps, lookahead"),
        (["objective.weight=nope"], "weight is 'nope'"),
        (["objective.bootstrap=nope"], "bootstrap is 'nope'"),
        (["dtype=float8"], "dtype is 'float8': give float32, float64, bfloat16, float16"),
        (["ema.also=[50,50]"], r"ema\.also is \[50, 50\]"),
        (["trainer.accumulate=9"], "trainer.accumulate is 9, but there are 8 rows"),
        (["trainer.channels_last=true"], "trainer.channels_last is for images"),
        (["logger=nope"], "logger is 'nope': give csv, tensorboard, wandb"),
        (["device=nope"], "device is 'nope'"),
        (["guidance_scale=2"], "no labels in training: data.conditional=true"),
        (["network=unet"], "UNet"),
        (["eval.distance=nope"], "nope"),
        (["eval.distance=fd_digits_cnn"], "8"),
        (["eval.sigmas=[0]"], "sigma is 0"),
        (["eval.num_steps=[]"], "num_steps"),
        (["eval.points=0"], "eval.points is 0"),
        (["ema.halflife=-1"], "halflife"),
        (["optim.betas=[0.9,2]"], r"optim\.betas"),
        (["target.decay=2", "objective.bootstrap=target"], r"target\.decay is 2"),
        (["optim.lr=-1"], "optim.lr"),
        (["trainer.batch_size=0"], "batch_size"),
        (["process=ddpm", "objective=td_edm"], "EDM"),
        (["process=ddpm", "sampler=heun"], "give sampler=ddim or ancestral, or process=vp"),
        (["process=vp", "sampler=edm_stochastic"], "EDM"),
        (["chain.t_max=0"], "t_max"),
        (["seed=-1"], "seed is -1"),
    ],
)
def test_nothing_is_made_of_a_wrong_configuration(overrides: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message) as error:
        run(tmp_path / "run", *overrides)
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="device is 'cuda'"):
        run(tmp_path / "run", "device=cuda")


@pytest.mark.parametrize("package", ["tensorboard", "wandb"])
def test_a_logger_that_is_not_installed(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtra, match=rf"diffrl\[{package}\]"):
        run(tmp_path / "run", f"logger={package}")
    assert not (tmp_path / "run").exists()


def test_a_loss_that_is_not_finite(tmp_path: Path) -> None:
    overrides = (
        "optim.lr=1e30",
        "optim.warmup_steps=0",
        "optim.clip_norm=null",
        "trainer.checkpoint_every=1",
    )
    with pytest.raises(NonFiniteLoss, match=r"td: .* at gradient step \d+"):
        run(tmp_path / "run", *overrides)
    assert not (tmp_path / "run" / "results.json").exists()


def test_training_that_diverges_names_the_learning_rate(tmp_path: Path) -> None:
    words = ("optim.warmup_steps=0", "compare=false")
    with pytest.warns(
        RuntimeWarning, match=r"td has diverged: .* times that of the untrained.*Lower optim\.lr"
    ):
        run(tmp_path / "far", *words, "optim.lr=10")
    with pytest.raises(NonFiniteLoss, match=r"td: .*NaN or infinity at gradient step .*Lower optim\.lr"):
        run(tmp_path / "further", *words, "optim.lr=1000")


# Options


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_dtype(dtype: str, whole: RunFolder, tmp_path: Path) -> None:
    folder = run(tmp_path / "run", f"dtype={dtype}", "compare=false")
    stored = torch.float64 if dtype == "float64" else torch.float32
    assert {x.dtype for k, x in checkpoint(folder).items() if k.startswith(("model", "ema"))} == {stored}
    assert next(diffrl.load(folder.path).denoiser.parameters()).dtype == stored
    errors = [folder.results()["objectives"]["td"]["value_error"] for folder in (folder, whole)]
    assert errors[0] == pytest.approx(errors[1], rel=0.2)


def test_training_as_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of it at once: float16, parts, a sum, half-lives beside, and the switch of the compiler."""
    compiled: list[Any] = []

    def compile_nothing(call: Any) -> Any:
        compiled.append(call)
        return call

    monkeypatch.setattr(torch, "compile", compile_nothing)
    words = ("trainer.accumulate=2", "trainer.reduction=sum", "trainer.compile=true")
    optim = ("optim.name=radam", "optim.decay=none", "optim.clip_norm=null")
    ema = ("ema.also=[20,160]", "ema.ramp=null")
    folder = run(tmp_path / "run", "dtype=float16", "compare=false", *words, *optim, *ema)
    assert compiled
    rows = Table(folder.path / "metrics.csv", (), ()).rows()
    assert [float(row["loss_scale"]) for row in rows[1:]] == [65536.0] * (len(rows) - 1)
    found = folder.results()["objectives"]["td"]
    assert [*found["averages"]] == ["ema_20", "ema_160"]
    for weights, wanted in {"ema": found, **found["averages"]}.items():
        again = evaluate_run(folder.path, {}, weights=weights)
        assert all(wanted[name] == figures for name, figures in again.items())
    errors = [f["denoising_error"]["1"] for f in (found, *found["averages"].values())]
    assert len(set(errors)) == 3
    with pytest.raises(
        ValueError, match=r"weights is 'ema_7', but .* has model, ema, ema_20, ema_160: give one"
    ):
        diffrl.load(folder.path, weights="ema_7")


def test_fine_tuning_scales_no_losses() -> None:
    with pytest.raises(ValueError, match="dtype is 'float16', but policies act in float32"):
        opened(settings(composed("dtype=float16", name="finetune"), ["dtype=float16"]))


def test_data_without_a_known_law(tmp_path: Path) -> None:
    figures = run(tmp_path / "run", "data=checkerboard", "compare=false").results()["objectives"]["td"]
    assert figures["value_error"] == {} and figures["sample_distance"]["by_nfe"]["7"] > 0


def images(path: Path) -> str:
    rng = np.random.default_rng(0)
    pixels, labels = rng.integers(0, 256, (60, 4, 4), dtype=np.uint8), np.arange(60) % 3
    np.savez(path / "images.npz", x=pixels, labels=labels)
    return str(path / "images.npz")


def test_labelled_images_with_guidance(tmp_path: Path) -> None:
    labelled = ("data=npz", "data.conditional=true", f"data.path={images(tmp_path)}")
    folder = run(tmp_path / "run", *labelled, "guidance_scale=2")
    found = folder.results()["objectives"]["td"]
    assert list(found["sample_distance"]["by_nfe"]) == ["6", "14"]  # twice Heun's
    assert all(error > 0 for error in found["value_error"].values())
    loaded = diffrl.load(folder.path)
    assert loaded.data.num_classes == 3
    one, two = (loaded.sample(6, num_steps=3, guidance_scale=w) for w in (1.0, 2.0))
    assert one.shape == (6, 1, 4, 4) and not torch.equal(one, two)


def test_data_that_stay_in_their_file_train_the_same_network(tmp_path: Path) -> None:
    words = ("data=npz", f"data.path={images(tmp_path)}", "data.conditional=true", "compare=false")
    read, mapped = (run(tmp_path / m, *words, f"data.mapped={m}").results() for m in ("false", "true"))
    read, mapped = (found["objectives"]["td"] for found in (read, mapped))
    assert read["denoising_error"] == mapped["denoising_error"]
    assert len(read["value_error"]) > 0 and mapped["value_error"] == {}  # it needs all rows
    assert mapped["sample_distance"]["by_nfe"]["7"] > 0


def test_a_run_says_what_it_held_out(tmp_path: Path) -> None:
    results = run(tmp_path / "run", "data=npz", f"data.path={images(tmp_path)}", "compare=false").results()
    assert results["split"]["rule"] == "the last 6 of 60 samples"
    assert (results["split"]["train"], results["split"]["test"]) == (54, 6)
    line = split_line(results)
    assert line.startswith("held out    the last 6 of 60 samples (54 to train on, 6 held out, indices ")
    assert results["split"]["indices"] in line
    assert "split" not in run(tmp_path / "rings", "compare=false").results() and split_line({}) == ""


def test_tensorboard(tmp_path: Path) -> None:
    words = (
        *("trainer.grad_steps=4", "compare=false", "eval.quality_every=10"),
        "data=npz",
        f"data.path={images(tmp_path)}",
    )
    folder = run(tmp_path / "run", "logger=tensorboard", *words)
    (events,) = (folder.path / "tensorboard").rglob("events.out.tfevents.*")
    logged = events.read_bytes()
    assert b"td/loss_value" in logged and b"td/samples_nfe_7_n_" in logged and b"_seed_2718281" in logged
    assert b"_seed2718281_nfe7" in logged


def test_new_folders_never_collide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = small()
    folders = []
    for _ in range(3):
        with RunFolder.start(config) as folder:
            folders.append(folder.path)
    assert len(set(folders)) == 3 and all(path.parent == Path("runs") for path in folders)
    assert all(path.name.partition("_")[2].partition("_")[2].startswith("rings_td_s0") for path in folders)
    assert RunFolder(folders[2]).config()["run_dir"] == str(folders[2])
