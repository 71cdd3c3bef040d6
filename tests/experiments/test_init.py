"""Starting from a trained run or model: whose weights, what is refused, and that the source may go afterwards."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import diffrl
from diffrl.data.synthetic import rings
from diffrl.diffusion.denoisers import Denoiser
from diffrl.diffusion.networks.unet import UNet
from diffrl.diffusion.schedules.edm import EDM
from diffrl.errors import InputError
from diffrl.experiments.train import TrainingJob, run_experiment
from diffrl.training.build import build_data
from diffrl.training.checkpoints import latest_checkpoint, load_weights
from diffrl.training.identity import RunChanged
from diffrl.training.runs import RunFolder
from diffrl.training.starting import start_from
from tests.kit.configs import small


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("trained") / "run"
    run_experiment(small("objective=edm", "compare=false", f"run_dir={path}"), progress=False)
    return path


def weights_of(config: dict[str, Any], name: str = "ect") -> dict[str, torch.Tensor]:
    job = TrainingJob(config, build_data(config), name)
    ema, model = job.trainer.ema.module.state_dict(), job.trainer.denoiser.state_dict()
    assert all(torch.equal(ema[name], model[name]) for name in model)
    return {name: x.clone() for name, x in model.items()}


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("kind", ["ema", "model"])
def test_the_weights_are_those_of_the_run(trained: Path, kind: str) -> None:
    newest = latest_checkpoint(trained / "checkpoints" / "edm")
    assert newest is not None
    config = small("objective=ect", f"init={trained}", f"init_weights={kind}")
    expected = load_weights(newest, kind)
    assert equal(weights_of(config), expected) and equal(weights_of(config, "monte_carlo"), expected)
    assert not equal(weights_of(small("objective=ect")), expected)


def test_a_model_file_will_do_and_a_target_network_starts_there_too(trained: Path, tmp_path: Path) -> None:
    model = diffrl.load(trained).denoiser
    file = diffrl.save(model, tmp_path / "model.safetensors")
    config = small("objective.bootstrap=target", f"init={file}")
    assert equal(weights_of(config), model.state_dict())
    loss = TrainingJob(config, rings(test_size=64), config["objective"]["name"]).trainer.loss
    target = loss.bootstrap_network.module.denoiser.state_dict()
    assert loss.bootstrap_network is not loss.value_network and equal(target, model.state_dict())


def test_it_goes_on_when_the_source_is_gone(trained: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(trained, source)
    words = ["objective=ect", f"init={source}", "optim.name=radam", "optim.lr=1e-4"]
    whole = run_experiment(small(*words, f"run_dir={tmp_path / 'whole'}"), progress=False)

    class Stopped(Exception):
        pass

    def stop(self: TrainingJob) -> dict[str, float]:
        if self.trainer.step == 20:
            raise Stopped
        return evaluate(self)

    evaluate = TrainingJob.evaluate
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(TrainingJob, "evaluate", stop)
        run_experiment(small(*words, f"run_dir={tmp_path / 'cut'}"), progress=False)
    shutil.rmtree(source)  # Monte Carlo beside it has not begun: it needs the start too
    cut = RunFolder(tmp_path / "cut")
    run_experiment({**cut.config(), "resume": str(cut.path)}, progress=False)
    ends = [folder.results()["objectives"] for folder in (whole, cut)]
    assert ends[0].keys() == {"ect", "monte_carlo"}
    for end in ends:
        for figures in end.values():
            del figures["seconds"], figures["forward_equivalents"]
    assert ends[0] == ends[1]


def test_another_start_is_another_run(trained: Path, tmp_path: Path) -> None:
    config = small("compare=false", f"init={trained}", f"run_dir={tmp_path / 'run'}")
    folder = run_experiment(config, progress=False)
    file = folder.path / "init.safetensors"
    assert file.is_file()
    with pytest.raises(RunChanged, match="init .* → None"):
        run_experiment({**folder.config(), "init": None, "resume": str(folder.path)}, progress=False)
    other = {name: x + 1 for name, x in diffrl.load(trained).denoiser.state_dict().items()}
    import safetensors.torch

    safetensors.torch.save_file(other, file)
    with pytest.raises(RunChanged, match=r"init\.fingerprint"):
        run_experiment({**folder.config(), "resume": str(folder.path), "extend": 40}, progress=False)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["network.hidden=8"], "init is .*, whose weights are of another network: give its network options"),
        (["denoiser.sigma_data=1.5"], r"trained with denoiser\.sigma_data=0\.5: give that too, not 1\.5"),
        (
            ["denoiser.prediction_type=eps"],
            r"trained with denoiser\.prediction_type=edm: give that too, not eps",
        ),
        (["process=vp"], r"init is .*, trained on EDM\(.*, and this run is on VP.*: give its process"),
        (["init_weights=best"], "init_weights is 'best': give 'ema' or 'model', or"),
        (["init=/nowhere"], "/nowhere holds no run"),
        (["init=''"], "holds no run"),
    ],
)
def test_what_does_not_fit_is_named(trained: Path, words: list[str], message: str) -> None:
    with pytest.raises(diffrl.errors.DiffrlError, match=message) as error:
        run_experiment(small(f"init={trained}", *words), progress=False)
    assert "\n" not in str(error.value)


def test_heads_of_attention_are_compared_as_no_weight_has_their_number(tmp_path: Path) -> None:
    def denoiser(head_channels: int | None) -> Denoiser:
        network = UNet((1, 8, 8), channels=8, attention_resolutions=(4,), head_channels=head_channels)
        return Denoiser(network, EDM())

    file = diffrl.save(denoiser(None), tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=r"attention has heads \[1, 1\], and this run.s \[2, 2\]"):
        start_from(denoiser(8), str(file))
    start_from(denoiser(16), str(file))  # one head of the whole width


def test_a_consistency_model_starts_from_a_denoiser(trained: Path) -> None:
    config = small("objective=ct", "denoiser.prediction_type=consistency", f"init={trained}")
    assert equal(weights_of(config), diffrl.load(trained).denoiser.state_dict())
