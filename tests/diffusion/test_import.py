"""A pipeline of diffusers as a denoiser: it draws what the pipeline draws, and says what it cannot take."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from diffusers import DDIMScheduler, UNet2DModel

import diffrl
from diffrl.diffusion.pipelines import export_pipeline, import_pipeline
from diffrl.errors import DiffrlError, InputError
from tests.kit.diffusers_unets import stock_pipeline

TIMES = (0, 1, 400, 999)
PREDICTIONS = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}


@pytest.mark.parametrize("name", PREDICTIONS)
def test_its_estimate_is_that_of_the_scheduler(name: str, tmp_path: Path) -> None:
    """The witness is the scheduler's own estimate of x0, unclipped, at the end points of time too."""
    options = {"clip_sample": False, "timestep_spacing": "trailing", "prediction_type": name}
    pipe = stock_pipeline(tmp_path, scheduler=DDIMScheduler, beta_schedule="squaredcos_cap_v2", **options)
    denoiser = import_pipeline(tmp_path)
    assert denoiser.prediction_type == PREDICTIONS[name] and denoiser.network.event_shape == (3, 8, 8)
    pipe.scheduler.set_timesteps(1000)
    x = torch.randn(1, 3, 8, 8)
    with torch.no_grad():
        for t in TIMES:
            theirs = pipe.scheduler.step(pipe.unet(x, t).sample, t, x).pred_original_sample
            torch.testing.assert_close(denoiser(x, torch.tensor([float(t)])), theirs, rtol=1e-4, atol=1e-5)


def test_it_draws_what_the_pipeline_draws(tmp_path: Path) -> None:
    """A clipping scheduler is taken: clipping is of its steps, and nothing is clipped where estimates are small."""
    pipe = stock_pipeline(tmp_path, prediction_type="sample", timestep_spacing="trailing")
    denoiser = import_pipeline(tmp_path)
    assert denoiser.process == diffrl.DDPM() and not denoiser.training
    g = torch.Generator().manual_seed(0)
    ours = diffrl.sample(
        denoiser,
        (2, 3, 8, 8),
        sampler=diffrl.Ancestral(),
        num_steps=10,
        noise=lambda like: torch.randn(like.shape, generator=g),
    )
    drawn = pipe(
        2, generator=torch.Generator().manual_seed(0), num_inference_steps=10, output_type="np"
    ).images
    theirs = torch.as_tensor(drawn).permute(0, 3, 1, 2)
    assert float(ours.abs().max()) < 1  # no estimate was clipped on the way here
    # the pipeline starts at ε, and this at σ ε, σ = 0.99998
    torch.testing.assert_close((ours / 2 + 0.5), theirs, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("unet", "scheduler", "message"),
    [
        ({"out_channels": 6}, {}, "has a second output or labels: wrap it yourself, by diffrl.wrap_network"),
        ({"num_class_embeds": 4}, {}, "has a second output or labels"),
        ({"sample_size": None}, {}, "has another form .this UNet tells no sample_size"),
        ({}, {"beta_schedule": "sigmoid"}, "has beta_schedule 'sigmoid': known are linear"),
        ({}, {"rescale_betas_zero_snr": True}, "has other betas"),
    ],
)
def test_what_is_not_known_is_refused(
    unet: dict[str, Any], scheduler: dict[str, Any], message: str, tmp_path: Path
) -> None:
    stock_pipeline(tmp_path, unet=unet, **scheduler)
    with pytest.raises(InputError, match=message) as error:
        import_pipeline(tmp_path)
    assert "\n" not in str(error.value)


def test_it_keeps_every_option_of_its_unet_and_goes_on_travelling(tmp_path: Path) -> None:
    """Saved as a model and loaded, and exported again: the same function, and the same configuration in diffusers."""
    blocks = {
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    }
    unet = {
        **blocks,
        "attention_head_dim": None,
        "downsample_padding": 0,
        "resnet_time_scale_shift": "scale_shift",
    }
    pipe = stock_pipeline(tmp_path / "theirs", unet=unet, timestep_spacing="trailing", clip_sample=False)
    before = torch.get_rng_state()
    denoiser = diffrl.from_pretrained(tmp_path / "theirs")
    assert torch.equal(torch.get_rng_state(), before)
    saved = diffrl.from_pretrained(diffrl.save_pretrained(denoiser, tmp_path / "ours"))
    export_pipeline(saved, tmp_path / "back")
    again: Any = UNet2DModel.from_pretrained(tmp_path / "back" / "unet")
    private = {"_name_or_path", "_diffusers_version", "_use_default_values"}
    told = [{k: v for k, v in of.config.items() if k not in private} for of in (pipe.unet, again)]
    assert json.dumps(told[0]) == json.dumps(told[1])
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([3, 400])
    with torch.no_grad():
        F_x = pipe.unet(x, t).sample
        assert torch.equal(again.eval()(x, t).sample, F_x)
        assert torch.equal(saved.network(x, t.float()), F_x) and torch.equal(
            denoiser.network(x, t.float()), F_x
        )


def weights_of(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = safetensors.torch.load_file(file)
    change(tensors)
    safetensors.torch.save_file(tensors, file, {"format": "pt"})


def config_of(folder: Path, name: str, **options: Any) -> None:
    told = json.loads((folder / name).read_text(encoding="utf-8"))
    (folder / name).write_text(json.dumps({**told, **options}), encoding="utf-8")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: weights_of(f, lambda w: w.pop("conv_in.weight")), "unet lacks the weights conv_in.weight"),
        (lambda f: weights_of(f, lambda w: w.update(more=torch.ones(1))), "unet has no place for .* more"),
        (lambda f: weights_of(f, lambda w: w["conv_in.bias"].fill_(torch.nan)), "NaN .* conv_in.bias"),
        (
            lambda f: config_of(f, "unet/config.json", add_attention=False),
            "unet has no place for .* mid_block",
        ),
        (
            lambda f: config_of(f, "unet/config.json", new_norm="rms"),
            "its option new_norm is none of UNet2DModel",
        ),
        (
            lambda f: config_of(
                f, "model_index.json", scheduler=["diffusers", "FlowMatchEulerDiscreteScheduler"]
            ),
            "FlowMatchEulerDiscreteScheduler is not the scheduler of its configuration",
        ),
    ],
)
def test_parts_that_do_not_fit_each_other_are_refused(
    change: Callable[[Path], None], message: str, tmp_path: Path
) -> None:
    """diffusers itself draws weights that are missing, and leaves out what it does not know, with a warning."""
    stock_pipeline(tmp_path)
    change(tmp_path)
    with pytest.raises(DiffrlError, match=message) as error:
        import_pipeline(tmp_path)
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value) or "Flow" in message


def test_no_pipeline(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="holds no model_index.json"):
        import_pipeline(tmp_path)
