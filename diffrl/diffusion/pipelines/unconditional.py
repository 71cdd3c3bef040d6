"""A pipeline of diffusers without prompts, such as DDPM's, as a denoiser of images."""

import copy
import os
from typing import Any

from diffrl.diffusion.denoisers import Denoiser
from diffrl.diffusion.networks.diffusers_unet import DiffusersUNet
from diffrl.diffusion.pipelines.parts import load_pipeline, plain, prediction_of, process_of
from diffrl.errors import InputError
from diffrl.extras import require
from diffrl.shapes import require_finite_weights

__all__ = ["import_pipeline"]


def import_pipeline(path: str | os.PathLike[str], *, download: bool = False) -> Denoiser:
    """The UNet of a diffusers pipeline of images as a denoiser, with its process and what it predicts: ε, v or x0.

    It takes the states unscaled, and its timesteps are whole numbers. A chain of N steps takes the trailing timesteps
    whatever the scheduler's own spacing, and starts at σ_{T-1} ε, see `diffrl.diffusion.pipelines.denoiser.process_of`.
    A scheduler that clips the clean estimate does so in its own steps: diffrl's samplers clip nothing.

    >>> denoiser = diffrl.diffusion.pipelines.import_pipeline("ddpm-cat-256")  # doctest: +SKIP
    >>> diffrl.sample(denoiser, (4, 3, 256, 256), sampler=diffrl.DDIM(), num_steps=50, seed=0)  # doctest: +SKIP

    Args:
        path: folder of a pipeline with a `UNet2DModel`, or a name that is in the cache of the hub.
        download: let diffusers fetch what is missing; without it nothing touches the network.

    Returns:
        The denoiser, in eval mode and float32. Its network is `diffusers_unet` with the options of that UNet, so that
        it can be trained on (``diffrl train init=FOLDER``), saved and exported again; it tells `event_shape`,
        (C, H, W).

    Raises:
        MissingExtra: diffusers or transformers is not installed.
        FileNotFoundError: there is no such pipeline, or it cannot be loaded.
        FileError: its weights hold NaN or infinity.
        InputError: a network of another kind, one with labels or with a second output or that does not tell the size of
            its images, or a scheduler whose process is not DDPM's.
    """
    pipe = load_pipeline(path, download=download)
    unet = plain(getattr(pipe, "unet", None))
    if not isinstance(unet, require("diffusers", "diffusers").UNet2DModel):
        raise InputError(
            f"{os.fspath(path)} is a {type(pipe).__name__}, without a UNet2DModel: of pipelines with prompts make a "
            "diffrl.diffusion.pipelines.PipelineDenoiser"
        )
    config: Any = unet.config
    if config.out_channels != config.in_channels or unet.class_embedding is not None:
        raise InputError(
            f"the UNet of {os.fspath(path)} has a second output or labels: wrap it yourself, by diffrl.wrap_network"
        )
    scheduler = copy.deepcopy(pipe.scheduler)
    scheduler.register_to_config(clip_sample=False, thresholding=False)  # of its steps, not of the process
    process, prediction = process_of(scheduler), prediction_of(scheduler)
    try:
        network = DiffusersUNet.of(unet)
    except InputError as error:
        raise InputError(
            f"the UNet of {os.fspath(path)} has another form ({error}): wrap it yourself, by diffrl.wrap_network"
        ) from error
    require_finite_weights(unet, f"the UNet of {os.fspath(path)}")
    return Denoiser(network, process, prediction_type=prediction, time_input="t", scale_input=False).eval()
