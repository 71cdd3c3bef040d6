"""A trained model handed over to diffusers: its stock pipelines draw what diffrl draws."""

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMPipeline, DDPMPipeline, UNet2DModel
from torch import Tensor

import diffrl
from diffrl import __main__ as program
from diffrl.diffusion.pipelines import export_pipeline
from diffrl.errors import FileError, InputError, InputTypeError
from tests.kit.diffusers_unets import tiny_unet
from tests.kit.paths import ROOT
from tests.kit.runs import run

SHAPE, SAMPLES, STEPS = (1, 8, 8), 3, 10
SAMPLERS = {DDPMPipeline: diffrl.Ancestral(), DDIMPipeline: diffrl.DDIM()}
PROCESSES = [diffrl.DDPM(), diffrl.DDPM(50, "scaled_linear", 0.01, 0.4), diffrl.DDPM(200, "cosine")]


def made(process: Any = PROCESSES[0], prediction_type: Any = "eps", **options: Any) -> diffrl.Denoiser:
    form: dict[str, Any] = {"time_input": "t", "scale_input": False, **options}
    form["prediction_type"] = prediction_type
    return diffrl.Denoiser(tiny_unet(SHAPE), process, **form).eval()


def ours(denoiser: diffrl.Denoiser, pipeline: type) -> Tensor:
    """Samples of diffrl's sampler, from the start ε of diffusers and the same noise."""
    g, left = torch.Generator().manual_seed(3), [denoiser.process.sigma(denoiser.process.time_grid(STEPS)[0])]

    def noise(like: Tensor) -> Tensor:
        scale = left.pop() if left else torch.tensor(1.0)
        return torch.randn(like.shape, generator=g) / scale.float()

    return diffrl.sample(
        denoiser, (SAMPLES, *SHAPE), sampler=SAMPLERS[pipeline], num_steps=STEPS, noise=noise
    )


def theirs(folder: Path, pipeline: Any) -> tuple[Tensor, Tensor]:
    """What a stock pipeline returns, and its last state, before it is clipped."""
    pipe = pipeline.from_pretrained(folder, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    step, states = pipe.scheduler.step, list[Tensor]()

    def watched(*given: Any, **more: Any) -> Any:
        found = step(*given, **more)
        states.append(found.prev_sample)
        return found

    pipe.scheduler.step = watched
    drawn = pipe(
        SAMPLES, generator=torch.Generator().manual_seed(3), num_inference_steps=STEPS, output_type="np"
    )
    assert len(states) == STEPS
    return torch.as_tensor(drawn.images).permute(0, 3, 1, 2), states[-1]


def compare(denoiser: diffrl.Denoiser, folder: Path, pipeline: type) -> None:
    images, last = theirs(folder, pipeline)
    x = ours(denoiser, pipeline)
    size = max(1.0, float(x.abs().max()))  # ε of random weights leads far beyond the images
    torch.testing.assert_close(last / size, x / size, rtol=0, atol=1e-5)
    torch.testing.assert_close(images, (x / 2 + 0.5).clamp(0, 1), rtol=0, atol=1e-5 * size)


@pytest.mark.parametrize("pipeline", SAMPLERS)
@pytest.mark.parametrize(("prediction_type", "process"), [*zip(("eps", "v", "x0"), PROCESSES, strict=True)])
def test_stock_pipelines_draw_the_same(
    prediction_type: str, process: Any, pipeline: type, tmp_path: Path
) -> None:
    denoiser = made(process, prediction_type)
    compare(denoiser, export_pipeline(denoiser, tmp_path / "out"), pipeline)


EDM_FORM = {"prediction_type": "edm", "time_input": "c_noise_x1000", "scale_input": True}


@pytest.mark.parametrize(
    ("process", "sigma_data"),
    [(diffrl.EDM(), 0.5), (diffrl.EDM(0.01, 20.0, 5.0), 0.7)],
    ids=("usual", "other"),
)
def test_the_ten_lines_of_the_docs_draw_the_same(
    process: diffrl.EDM, sigma_data: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (ROOT / "docs" / "interop.md").read_text(encoding="utf-8")
    (lines,) = (code for code in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "EDMEuler" in code)
    denoiser = made(process, sigma_data=sigma_data, **EDM_FORM)
    export_pipeline(denoiser, tmp_path / "edm_folder")
    assert {file.name for file in (tmp_path / "edm_folder").iterdir()} == {"unet", "scheduler"}
    monkeypatch.chdir(tmp_path)
    found: dict[str, Any] = {}
    exec(lines, found)  # as it stands
    g = torch.Generator().manual_seed(0)
    x = diffrl.sample(
        denoiser,
        (16, *SHAPE),
        sampler=diffrl.Euler(),
        num_steps=18,
        noise=lambda like: torch.randn(like.shape, generator=g),
    )
    size = max(1.0, float(x.abs().max()))
    torch.testing.assert_close(found["x"] / size, x / size, rtol=0, atol=1e-5)
    torch.testing.assert_close(found["images"], (x / 2 + 0.5).clamp(0, 1), rtol=0, atol=1e-5)
    assert not torch.allclose(
        x, diffrl.sample(denoiser, x.shape, sampler=diffrl.Euler(), num_steps=18, seed=1)
    )


def test_labels_go_along_with_edm(tmp_path: Path) -> None:
    denoiser = made(diffrl.EDM(), **EDM_FORM)
    denoiser.network = tiny_unet(SHAPE, num_classes=2)
    unet = UNet2DModel.from_pretrained(export_pipeline(denoiser, tmp_path / "out") / "unet")
    x, t, labels = torch.randn(3, *SHAPE), torch.tensor([0.1, 1.0, 60.0]), torch.tensor([0, 1, 2])
    c_in = (t**2 + 0.25).rsqrt()[:, None, None, None]
    with torch.no_grad():
        F_x = unet(c_in * x, 250 * t.log(), class_labels=labels).sample
        torch.testing.assert_close(
            denoiser(x, t, labels), (0.25 * c_in * x + 0.5 * t[:, None, None, None] * F_x) * c_in
        )


def test_a_run_is_exported_by_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        *("experiment=diffusers_ddpm", "data=digits", "network=diffusers_unet", "trainer.grad_steps=4"),
        *("network.block_out_channels=[8,16]", "network.norm_num_groups=4", "chain.num_steps=1000"),
    ]
    folder = run(tmp_path / "run", *words).path
    monkeypatch.setattr(sys, "argv", ["diffrl", "export", str(folder), str(tmp_path / "out")])
    program.main()
    assert capsys.readouterr().out == f"pipeline  {tmp_path / 'out'}\n"
    trained = diffrl.load(folder).denoiser
    assert any(p.any() for p in trained.network.unet.conv_out.parameters())
    compare(trained, tmp_path / "out", DDPMPipeline)


def test_a_run_that_cannot_be_exported_says_so_before_its_first_step(tmp_path: Path) -> None:
    """By the fewest words: a process of discrete times brings its sampler along."""
    words = ["data=digits", "network=diffusers_unet", "process=ddpm", "network.block_out_channels=[8,16]"]
    told = (
        "train denoiser.prediction_type=eps, v or x0; denoiser.time_input=t; denoiser.scale_input=false; "
        "experiment=diffusers_ddpm and diffusers_edm do$"
    )
    with pytest.warns(UserWarning, match=told):
        folder = run(tmp_path / "run", *words, "trainer.grad_steps=1")
    trained = diffrl.load(folder.path)
    assert isinstance(trained.sampler, diffrl.DDIM)
    with pytest.raises(InputError, match="cannot be exported: train denoiser.prediction_type=eps, v or x0"):
        export_pipeline(trained.denoiser, tmp_path / "out")


def test_float64_is_written_in_float32_and_stays_what_it_was(tmp_path: Path) -> None:
    denoiser = made(prediction_type="v").double()
    export_pipeline(denoiser, tmp_path / "out")
    assert {p.dtype for p in denoiser.parameters()} == {torch.float64}
    compare(denoiser.float(), tmp_path / "out", DDIMPipeline)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"process": diffrl.VP()}, "cannot be exported: train process=ddpm or edm$"),
        (
            {"process": diffrl.EDM()},
            "train denoiser.prediction_type=edm; denoiser.time_input=c_noise_x1000; denoiser.scale_input=true$",
        ),
        ({"process": diffrl.EDM(), **EDM_FORM, "prediction_type": "consistency"}, "prediction_type=edm$"),
        ({"prediction_type": "edm"}, "train denoiser.prediction_type=eps, v or x0$"),
        (
            {"time_input": "c_noise", "scale_input": True},
            "denoiser.time_input=t; denoiser.scale_input=false$",
        ),
        ({"prior": "data"}, "denoiser.prior=standard"),
        (
            {"process": diffrl.DDPM(50)},
            "the noisiest level keeps 0.7.* of the data, but diffusers starts from",
        ),
    ],
)
def test_what_diffusers_cannot_express_is_refused(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message) as error:
        export_pipeline(made(**options), tmp_path / "out")
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_other_networks_are_refused_in_one_line(tmp_path: Path) -> None:
    unet = diffrl.Denoiser(diffrl.networks.UNet(SHAPE, channels=4), diffrl.DDPM(), prediction_type="eps")
    with pytest.raises(
        InputError, match="^UNet is no network of diffusers and cannot be exported: train network="
    ):
        export_pipeline(unet, tmp_path)
    labelled: Any = made()
    labelled.network = tiny_unet(SHAPE, num_classes=2)
    with pytest.raises(InputError, match="train data.conditional=false, as these pipelines give no labels"):
        export_pipeline(labelled, tmp_path)
    exact: Any = diffrl.GaussianDenoiser(diffrl.DDPM(), torch.zeros(2), torch.eye(2))
    with pytest.raises(InputTypeError, match="denoiser is a GaussianDenoiser"):
        export_pipeline(exact, tmp_path)


@contextmanager
def full_disk() -> Iterator[None]:
    """No file longer than a few kilobytes can be written within."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("write", [export_pipeline, diffrl.save_pretrained])
def test_what_a_full_disk_broke_off_is_not_in_the_way(write: Any, tmp_path: Path) -> None:
    """Told in one line, nothing is left, and the same command is right once there is room."""
    with (
        full_disk(),
        pytest.raises(FileError, match="out cannot be written|cannot be written .File too") as error,
    ):
        write(made(), tmp_path / "out")
    assert "\n" not in str(error.value) and not any((tmp_path / "out").iterdir())
    write(made(), tmp_path / "out")
    assert diffrl.from_pretrained(tmp_path / "out").process == made().process


def test_nothing_is_written_over(tmp_path: Path) -> None:
    (tmp_path / "mine").touch()
    for place in (tmp_path, tmp_path / "mine"):
        with pytest.raises(InputError, match="holds something already: give a new folder"):
            export_pipeline(made(), place)
    with pytest.raises((FileError, InputError)):
        export_pipeline(made(), tmp_path / "mine" / "below")
