"""Handing a trained denoiser over to diffusers: a folder that its stock pipelines load and sample from."""

import copy
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from diffrl.diffusion.denoisers import Denoiser
from diffrl.diffusion.networks.diffusers_unet import DiffusersUNet
from diffrl.diffusion.pipelines.parts import KINDS, PREDICTIONS, plain
from diffrl.diffusion.schedules.ddpm import DDPM
from diffrl.diffusion.schedules.edm import EDM
from diffrl.errors import FileError, InputError, InputTypeError
from diffrl.extras import require
from diffrl.text_files import new_folder

__all__ = ["export_pipeline", "refusal_of_export"]

MOST_SIGNAL = 0.1  # α_{T-1}: diffusers starts from pure noise
CLOSE = 1e-4  # relative error of ᾱ_t in float32, in which diffusers multiplies the betas


def export_pipeline(denoiser: Denoiser, folder: str | Path) -> Path:
    """Write a denoiser as a folder that diffusers loads: a whole pipeline of DDPM, a UNet and a scheduler of EDM.

    On the process `DDPM` it is for `DDPMPipeline` and `DDIMPipeline`. Their samples are those of `diffrl.Ancestral` and
    `diffrl.DDIM` from the same start and noise, to the accuracy of float32, if the number of steps divides T. They
    start at ε where diffrl starts at σ_{T-1} ε: of the usual 1,000 linear betas σ_{T-1} = 0.99998. The scheduler's
    timesteps are "trailing" and it clips nothing, as with diffrl's chains.

    On the process `EDM` it holds ``unet``, a `UNet2DModel`, and ``scheduler``, an `EDMEulerScheduler`: no pipeline of
    diffusers without prompts scales its network's input as this scheduler asks, so docs/interop.md has the loop, ten
    lines of stock parts. Its samples are those of `diffrl.Euler` from the same start, to the same accuracy.

    Weights are written in float32, as safetensors.

    >>> import tempfile, diffrl
    >>> network = diffrl.networks.UNet((1, 8, 8), channels=4)
    >>> denoiser = diffrl.Denoiser(network, diffrl.DDPM(), prediction_type="eps")
    >>> diffrl.diffusion.pipelines.export_pipeline(denoiser, tempfile.mkdtemp())
    Traceback (most recent call last):
    ...
    diffrl.errors.InputError: UNet is no network of diffusers and cannot be exported: train network=diffusers_unet...

    Args:
        denoiser: a network `diffusers_unet` with the standard prior: without labels on `DDPM`, with the prediction type
            "eps", "v" or "x0", time_input "t" and scale_input False, as ``experiment=diffusers_ddpm`` makes one; or on
            `EDM`, with the prediction type "edm", time_input "c_noise_x1000" and scale_input True, as
            ``experiment=diffusers_edm`` does.
        folder: a new one, or one that is empty.

    Returns:
        The folder.

    Raises:
        InputTypeError: it is no `diffrl.Denoiser`.
        InputError: it is made in another way, or its noisiest level is not nearly pure noise; the folder holds
            something.
        MissingExtra: diffusers is not installed.
        FileError: the folder cannot be written.
    """
    folder = Path(folder)
    denoiser = plain(denoiser)
    if not isinstance(denoiser, Denoiser):
        raise InputTypeError(f"denoiser is a {type(denoiser).__name__}: give a diffrl.Denoiser")
    network = plain(denoiser.network)
    if not isinstance(network, DiffusersUNet):
        raise InputError(
            f"{type(network).__name__} is no network of diffusers and cannot be exported: train "
            "network=diffusers_unet, as experiment=diffusers_ddpm and diffusers_edm do; diffrl.save_pretrained, and "
            "the command's --to diffrl, hand over any network"
        )
    scheduler = _scheduler(denoiser, network)
    unet = copy.deepcopy(network.unet).cpu().float()
    try:
        with new_folder(folder):
            if isinstance(denoiser.process, EDM):
                unet.save_pretrained(folder / "unet", safe_serialization=True)
                scheduler.save_pretrained(folder / "scheduler")
            else:
                pipe = require("diffusers", "diffusers").DDPMPipeline(unet=unet, scheduler=scheduler)
                pipe.save_pretrained(folder, safe_serialization=True)
    except SafetensorError as error:  # a disk that is full, among others
        raise FileError(
            f"{folder} cannot be written ({error}): make room, or choose another place"
        ) from error
    return folder


def refusal_of_export(denoiser: Denoiser) -> str | None:
    """Why `export_pipeline` would refuse a denoiser though its network is one of diffusers'; None if it would not."""
    network = plain(denoiser.network)
    try:
        if isinstance(network, DiffusersUNet):
            _scheduler(denoiser, network)
    except InputError as error:
        return str(error)
    return None


def _scheduler(denoiser: Denoiser, network: DiffusersUNet) -> Any:
    """Diffusers' scheduler that goes with it."""
    _require_form_of_diffusers(denoiser, network)
    return _edm_scheduler(denoiser) if isinstance(denoiser.process, EDM) else _ddpm_scheduler(denoiser)


def _require_form_of_diffusers(denoiser: Denoiser, network: DiffusersUNet) -> None:
    """Refuse what a scheduler of diffusers cannot express, with the setting to train with instead."""
    process, prediction, time_input = denoiser.process, denoiser.prediction_type, denoiser.time_input
    wanted = {
        "process=ddpm or edm": isinstance(process, DDPM | EDM),
        "denoiser.prior=standard": denoiser.prior is None,
    }
    if isinstance(process, DDPM):
        wanted |= {
            "denoiser.prediction_type=eps, v or x0": prediction in PREDICTIONS.values(),
            "denoiser.time_input=t": time_input == "t",
            "denoiser.scale_input=false": not denoiser.scale_input,
            "data.conditional=false, as these pipelines give no labels": network.num_classes == 0,
        }
    if isinstance(process, EDM):
        wanted |= {
            "denoiser.prediction_type=edm": prediction == "edm",
            "denoiser.time_input=c_noise_x1000": time_input == "c_noise_x1000",
            "denoiser.scale_input=true": denoiser.scale_input,
        }
    if lacking := [setting for setting, met in wanted.items() if not met]:
        raise InputError(
            f"this model is not of diffusers' form and cannot be exported: train {'; '.join(lacking)}"
        )


def _edm_scheduler(denoiser: Denoiser) -> Any:
    """Diffusers' Euler steps on the grid of the process, with EDM's c_skip, c_out and c_in; its time is ln(σ)/4."""
    process = denoiser.process
    assert isinstance(process, EDM)
    return require("diffusers", "diffusers").EDMEulerScheduler(
        sigma_min=process.sigma_min,
        sigma_max=process.sigma_max,
        sigma_data=denoiser.sigma_data,
        sigma_schedule="karras",
        rho=process.rho,
        prediction_type="epsilon",  # its name of the sign of c_out: F, and not -F
        final_sigmas_type="zero",
    )


def _ddpm_scheduler(denoiser: Denoiser) -> Any:
    """Diffusers' scheduler of the process, compared with it."""
    process = denoiser.process
    assert isinstance(process, DDPM)
    signal = float(process.alphas_cumprod[-1].sqrt())
    if signal > MOST_SIGNAL:
        raise InputError(
            f"the noisiest level keeps {signal:.2g} of the data, but diffusers starts from pure noise: train with "
            "process.train_steps=1000 or a larger process.beta_end"
        )
    scheduler = require("diffusers", "diffusers").DDPMScheduler(
        num_train_timesteps=process.train_steps,
        beta_schedule={kind: name for name, kind in KINDS.items()}[process.kind],
        beta_start=process.beta_start,
        beta_end=process.beta_end,
        prediction_type={str(ours): name for name, ours in PREDICTIONS.items()}[denoiser.prediction_type],
        variance_type="fixed_small",
        clip_sample=False,
        timestep_spacing="trailing",
    )
    theirs = scheduler.alphas_cumprod.double()
    if not torch.allclose(theirs, process.alphas_cumprod, rtol=CLOSE, atol=1e-9):
        raise InputError(
            f"diffusers makes other noise levels of {process}: train process.kind=linear, or fewer train_steps"
        )
    return scheduler
