"""Models as folders: bit for bit what was saved, sampled elsewhere without the data, with a card that is right."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor, nn

import diffrl
from diffrl import __main__ as program
from diffrl.configs.cli import settings
from diffrl.diffusion.networks.registry import NETWORKS
from diffrl.diffusion.pipelines import export_pipeline
from diffrl.errors import DiffrlError, InputError
from diffrl.experiments.finetune import run_finetuning
from diffrl.experiments.train import run_experiment
from diffrl.training.checkpoints import latest_checkpoint, load_weights
from diffrl.training.starting import start_from
from tests.kit.configs import composed
from tests.kit.diffusers_unets import tiny_unet
from tests.kit.paths import ROOT
from tests.kit.runs import run

WORDS = (
    *(
        "data=npz",
        "data.conditional=true",
        "network=mlp",
        "network.hidden=8",
        "network.depth=1",
        "compare=false",
    ),
    *("sampler=edm_stochastic", "sampler.S_churn=3", "trainer.grad_steps=6", "optim.lr=0.1"),
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with labels, three times as many of one as of the other."""
    folder, rng = tmp_path_factory.mktemp("trained"), np.random.default_rng(0)
    np.savez(folder / "points.npz", images=rng.normal(size=(80, 2)), labels=np.arange(80) % 4 // 3)
    return run(folder / "run", f"data.path={folder / 'points.npz'}", *WORDS).path


def equal(one: diffrl.Denoiser, other: diffrl.Denoiser) -> bool:
    mine, theirs = one.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_a_run_travels_and_samples_without_its_data(trained: Path, tmp_path: Path) -> None:
    """In a process that finds neither the data nor the run, by the lines of the card as they stand."""
    source = diffrl.load(trained)
    folder = diffrl.save_pretrained(source, tmp_path / "model")
    card = (folder / "README.md").read_text(encoding="utf-8")
    (lines,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    away = tmp_path / "away"
    shutil.copytree(folder, away / "model")
    data = trained.parent / "points.npz"
    hidden = [(path, path.with_name(f"{path.name}.gone")) for path in (data, trained, folder)]
    code = f"{lines}\nimport numpy, sys\nnumpy.save('x.npy', samples.numpy())"
    for path, gone in hidden:
        path.rename(gone)
    try:
        ran = subprocess.run(
            [sys.executable, "-c", code], cwd=away, env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
    finally:
        for path, gone in hidden:
            gone.rename(path)
    assert ran.returncode == 0, ran.stderr
    x = torch.from_numpy(np.load(away / "x.npy"))
    assert torch.equal(x, source.sample(16, num_steps=4, seed=0)) and bool(x.isfinite().all())


def test_averaged_and_last_weights(trained: Path, tmp_path: Path) -> None:
    newest = latest_checkpoint(trained / "checkpoints" / "td")
    assert newest is not None
    folder = diffrl.save_pretrained(diffrl.load(trained), tmp_path / "model")
    for weights in ("ema", "model"):
        found = diffrl.from_pretrained(folder, weights=weights)
        known = load_weights(newest, weights)
        assert not found.training and all(
            torch.equal(x, known[name]) for name, x in found.state_dict().items()
        )
        start = diffrl.load(trained).denoiser
        start_from(start, str(folder), weights)
        assert equal(start, found)
    assert not equal(diffrl.from_pretrained(folder), diffrl.from_pretrained(folder, weights="model"))
    again = diffrl.save_pretrained(
        diffrl.load(folder), tmp_path / "again"
    )  # what travelled once may travel on
    for name in ("config.json", "model.safetensors", "model.non_ema.safetensors"):
        assert (again / name).read_bytes() == (folder / name).read_bytes()


class Mine(torch.nn.Module):
    """A network of the user's own."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(3, 2)

    def forward(self, x: Tensor, c_noise: Tensor, cond: Tensor | None = None) -> Tensor:
        out: Tensor = self.layer(torch.cat([x, c_noise[:, None]], 1))
        return out


def test_any_denoiser_is_saved_bit_for_bit(tmp_path: Path) -> None:
    mlp = diffrl.networks.MLP((2,), 2, hidden=8)
    like = diffrl.Denoiser(mlp, diffrl.EDM(sigma_max=50.0), sigma_data=0.7, prior="class")
    like.prior.fit(torch.randn(20, 2), torch.arange(20) % 2)
    unet = diffrl.Denoiser(
        diffrl.networks.UNet((1, 8, 8), channels=8).double(), diffrl.VP("cosine"), 0.3, "v"
    ).double()
    for number, saved in enumerate((like, unet)):
        found = diffrl.from_pretrained(diffrl.save_pretrained(saved, tmp_path / str(number)))
        assert equal(found, saved) and found.process == saved.process
        shape: Any = found.network.event_shape
        x, t = torch.randn(3, *shape).to(next(saved.parameters())), found.process.time_grid(3)[:3]
        assert torch.equal(found(x, t), saved.eval()(x, t))
        card = (tmp_path / str(number) / "README.md").read_text(encoding="utf-8")
        assert "Nothing is recorded of its training" in card and "## Figures" not in card
    own = diffrl.Denoiser(Mine(), diffrl.EDM())
    folder = diffrl.save_pretrained(own, tmp_path / "own", event_shape=(2,))
    assert equal(diffrl.from_pretrained(folder, network=Mine()), own)
    with pytest.raises(
        DiffrlError, match=r"author's own: build it, and give it as diffrl\.load\(path, network="
    ):
        diffrl.from_pretrained(folder)


# The card


def test_the_card_of_a_run_has_its_figures_with_their_numbers(trained: Path, tmp_path: Path) -> None:
    source = diffrl.load(trained)
    card = (diffrl.save_pretrained(source, tmp_path / "model") / "README.md").read_text(encoding="utf-8")
    _, head, text = card.split("---\n", 2)
    assert "license" not in yaml.safe_load(head) and yaml.safe_load(head)["library_name"] == "diffrl"
    found = source.results["objectives"]["td"]
    cells = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if "|" in line
    ]
    rows = {row[0]: row[1] for row in cells}
    for sigma, error in found["value_error"].items():
        assert rows[f"value error, σ = {sigma}"] == f"{error:#.3g}"
    for nfe, distance in found["sample_distance"]["by_nfe"].items():
        assert rows[f"sliced W2 distance, 40 samples, seed 2718281, NFE {nfe}"] == f"{distance:#.3g}"
    assert rows["data"] == "points.npz" and rows["seed"] == "0" and rows["labels"] == "0 to 1"
    assert rows["length"] == "6 gradient steps of 8 data"
    assert "n = 1" in text and "distances between the data and 40 samples" in text and "up to 32 data" in text
    assert "## Licence" in text and str(trained.parent) not in card


def test_what_was_tuned_travels_too(tmp_path: Path) -> None:
    base = run(tmp_path / "base", "compare=false", "trainer.grad_steps=4").path
    words = (
        *(
            f"model.path={base}",
            f"run_dir={tmp_path / 'tuned'}",
            "reward=mode_distance",
            "reward.point=[0.8,0]",
        ),
        *("heldout_reward=none", "policy.num_steps=4", "rollouts.trajectories=16", "loop.iterations=2"),
        *("loop.eval_every=2", "evaluation.samples=32"),
    )
    run_finetuning(settings(composed(*words, name="finetune"), []), progress=False)
    tuned = diffrl.load_tuned(tmp_path / "tuned")
    folder = diffrl.save_pretrained(tuned, tmp_path / "model")
    assert equal(diffrl.from_pretrained(folder), tuned.policy.denoiser)
    card = (folder / "README.md").read_text(encoding="utf-8")
    reward = tuned.results["finetuning"]["final"]["eval_reward"]
    assert "tuned for mode distance" in card and re.search(r"\| made from +\| base +\|", card)
    assert f"{reward:#.3g}" in card and "32 samples" in card
    assert "| distance to the base (sliced W2 distance of 32 samples, seed 3141592) |" in card
    assert diffrl.load(folder).sample(3, num_steps=4).shape == (3, 2)


# The commands


def test_a_model_is_written_and_sampled_by_the_commands(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for words in (["export", str(trained), "model", "--to", "diffrl"], ["sample", "model", "--nfe", "7"]):
        monkeypatch.setattr(sys, "argv", ["diffrl", *words])
        program.main()
    assert capsys.readouterr().out == "model  model\nsamples_model_nfe7_seed0.png\n"
    assert {file.name for file in tmp_path.iterdir()} == {"model", "samples_model_nfe7_seed0.png"}


# A network of one's own, by configuration

SEEN: set[int] = set()


class Labelled(nn.Module):
    """It tells nothing of what it was built for, and holds a buffer that is not saved."""

    def __init__(self, dims: int, rows: int, width: int) -> None:
        super().__init__()
        self.none, self.table, self.layer = rows - 1, nn.Embedding(rows, width), nn.Linear(dims + width, dims)
        self.register_buffer("gain", torch.tensor(0.5), persistent=False)

    def forward(self, x: Tensor, c_noise: Tensor, cond: Tensor | None = None) -> Tensor:
        SEEN.update([] if cond is None else cond.tolist())
        cond = torch.full((len(x),), self.none) if cond is None else cond
        out: Tensor = self.gain * self.layer(torch.cat([x, self.table(cond)], 1))
        return out


def labelled(event_shape: tuple[int, ...], num_classes: int = 0, width: int = 3) -> Labelled:
    return Labelled(event_shape[0], num_classes + 1, width)


def test_a_network_of_ones_own_gets_labels_and_is_built_again_by_name(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(NETWORKS, "_entries", {e.name: e for e in NETWORKS.entries()})
    NETWORKS.register("labelled")(labelled)
    config = {**diffrl.load(trained).config, "network": {"name": "labelled", "width": 5}}
    config = {
        **config,
        "trainer": {**config["trainer"], "label_dropout": 0.5},
        "run_dir": str(tmp_path / "run"),
    }
    SEEN.clear()
    made = diffrl.load(run_experiment(config, progress=False).path)
    assert {0, 1, 2} == SEEN  # 2 stands for none
    x0, before = made.sample(6, num_steps=3, seed=4), torch.get_rng_state()
    paths = [
        diffrl.save_pretrained(made, tmp_path / "model"),
        diffrl.save(made.denoiser, tmp_path / "m.safetensors"),
    ]
    for path in paths:
        assert equal(diffrl.load(path).denoiser, made.denoiser)
        sampled = diffrl.load(path).sample(6, num_steps=3, seed=4, sampler=made.sampler)
        assert path.suffix or torch.equal(sampled, x0)
    assert torch.equal(torch.get_rng_state(), before)
    assert repr(made) == "Run('npz', samples (2,), 2 classes)"
    assert f"import {__name__}  # " in (paths[0] / "README.md").read_text(encoding="utf-8")
    del NETWORKS._entries["labelled"]  # as elsewhere, where its module was not imported
    for path in paths:
        with pytest.raises(InputError, match="author's own, 'labelled': import the module .*--import MODULE"):
            diffrl.load(path)
        assert equal(diffrl.load(path, network=labelled((2,), 2, 5)).denoiser, made.denoiser)


# What is refused


def changed(**entries: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        file = folder / "config.json"
        told = {**json.loads(file.read_text(encoding="utf-8")), **entries}
        file.write_text(json.dumps({k: v for k, v in told.items() if v != "gone"}), encoding="utf-8")

    return change


def cut(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).write_bytes((folder / name).read_bytes()[:-9])

    return change


def exported_in_parts(folder: Path) -> None:
    """What `export_pipeline` writes of a model of EDM."""
    shutil.rmtree(folder)
    form: Any = {"time_input": "c_noise_x1000"}
    export_pipeline(diffrl.Denoiser(tiny_unet((1, 8, 8)), diffrl.EDM(), **form), folder)


@pytest.mark.parametrize(
    ("damage", "weights", "says"),
    [
        (shutil.rmtree, "ema", "model is no folder on this machine, and nothing is downloaded"),
        (lambda folder: (folder / "config.json").unlink(), "ema", "model holds no config.json"),
        (
            exported_in_parts,
            "ema",
            "process=edm has them; diffrl loads what .*`diffrl export RUN FOLDER --to diffrl`",
        ),
        (lambda folder: (folder / "model.safetensors").unlink(), "ema", "model.safetensors cannot be read"),
        (lambda folder: (folder / "model.non_ema.safetensors").unlink(), "model", "has one set of weights"),
        (cut("config.json"), "ema", "config.json is damaged"),
        (cut("model.safetensors"), "ema", "model.safetensors is damaged"),
        (cut("model.non_ema.safetensors"), "model", "model.non_ema.safetensors is damaged"),
        (changed(format="gone"), "ema", "is no model of diffrl"),
        (changed(format=9), "ema", "has format 9, and this diffrl reads 1: upgrade diffrl"),
        (changed(process=3), "ema", "cannot be followed"),
        (changed(sampler=3), "ema", "config.json cannot be followed"),
        (
            changed(sampler={"name": "os.system"}),
            "ema",
            "config.json cannot be followed .sampler is 'os.system'",
        ),
        (changed(class_shares=["a", 1]), "ema", "config.json cannot be followed"),
        (changed(class_shares=[0.5]), "ema", "config.json cannot be followed"),
        (changed(num_classes=5), "ema", "are of another network"),
        (lambda folder: None, "best", "weights is 'best': give 'ema' or 'model'"),
    ],
)
def test_what_is_missing_or_damaged_is_named(
    damage: Callable[[Path], Any], weights: str, says: str, trained: Path, tmp_path: Path
) -> None:
    folder = diffrl.save_pretrained(diffrl.load(trained), tmp_path / "model")
    damage(folder)
    with pytest.raises(DiffrlError, match=says) as refused:
        diffrl.from_pretrained(folder, weights=weights)
    assert "\n" not in str(refused.value)


def test_what_cannot_be_saved_is_named(trained: Path, tmp_path: Path) -> None:
    exact: Any = diffrl.GaussianDenoiser(diffrl.EDM(), torch.zeros(2), torch.eye(2))
    with pytest.raises(DiffrlError, match="this holds a GaussianDenoiser, and what is saved is"):
        diffrl.save_pretrained(exact, tmp_path / "model")
    assert not (tmp_path / "model").exists()
    with pytest.raises(DiffrlError, match="holds something already: give a new folder"):
        diffrl.save_pretrained(diffrl.load(trained), trained)
