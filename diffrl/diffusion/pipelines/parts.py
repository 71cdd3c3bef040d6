"""Parts of a diffusers pipeline: loading it, its process, its network, and its prompts in encoded form."""

import copy
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffrl.diffusion.pipelines.z_image import as_chat, encoded_captions, is_z_image
from diffrl.diffusion.predictions import PredictionType
from diffrl.diffusion.samplers.consistency import LCM
from diffrl.diffusion.schedules.base import Schedule
from diffrl.diffusion.schedules.ddpm import DDPM
from diffrl.diffusion.schedules.flow import Flow
from diffrl.errors import FileError, InputError
from diffrl.extras import require
from diffrl.text_files import read_json

__all__ = [
    "NoPipeline",
    "encoded",
    "load_pipeline",
    "network_of",
    "plain",
    "prediction_of",
    "process_of",
    "warn_of_other_timesteps",
    "warn_of_truncation",
]

PREDICTIONS: dict[str, PredictionType] = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}
KINDS = {"linear": "linear", "scaled_linear": "scaled_linear", "squaredcos_cap_v2": "cosine"}
ENCODED_AT_ONCE = 16  # prompts
PROBE = 5  # levels of a chain by which a process is compared with its scheduler


class NoPipeline(FileError, FileNotFoundError):
    """There is no pipeline of that name, or none that can be loaded."""


def plain(network: Any) -> Any:
    """The network itself, without the wrapper of `torch.compile`, whose truth value and type are its own."""
    return getattr(network, "_orig_mod", network)


def load_pipeline(
    path: str | os.PathLike[str],
    dtype: torch.dtype = torch.float32,
    *,
    device: torch.device | str = "cpu",
    variant: str | None = None,
    leave_out: Sequence[str] = (),
    download: bool = False,
) -> Any:
    """Load a diffusers pipeline from safetensors files on this machine.

    Args:
        path: folder of a pipeline, or a name that is in the cache of the hub.
        dtype: of all weights. bfloat16 goes well with adapters, which stay in float32; float32 to train all weights.
        device: where the weights go.
        variant: variant of the files to load, such as "fp16".
        leave_out: components to do without, such as ("text_encoder_3", "tokenizer_3") of SD 3.x; those that the
            pipeline was saved without are left out anyway.
        download: let diffusers fetch what is missing. Without it nothing touches the network.

    Raises:
        MissingExtra: diffusers or transformers is not installed.
        FileNotFoundError: there is no such folder, nothing cached by that name, or it cannot be loaded (`NoPipeline`).
        FileError: the description of a component is damaged.
    """
    require("transformers", "diffusers")
    factory = require("diffusers", "diffusers").DiffusionPipeline
    source = os.fspath(path)
    is_folder = os.path.isdir(source)
    if is_folder and not os.path.isfile(os.path.join(source, "model_index.json")):
        raise NoPipeline(f"{source} holds no model_index.json: give the folder of a whole pipeline")
    for described in Path(source).glob("*/*config.json") if is_folder else ():
        read_json(described)  # diffusers loops for ever over some that are no object
    given = {"local_files_only": not download}
    try:
        saved = factory.load_config(source, **given)
        absent = {name: None for name, part in saved.items() if part == [None, None]}
        absent |= dict.fromkeys(leave_out)
        if saved.get("unet") == ["diffusers", "UNet2DModel"]:
            absent["unet"] = _whole_unet(source, variant=variant, **given)
        pipe = factory.from_pretrained(
            source, dtype=dtype, variant=variant, use_safetensors=True, **given, **absent
        )
        _require_weights(pipe)
    except (
        Exception
    ) as error:  # diffusers, transformers and safetensors have a dozen types for files that do not fit
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        if is_folder:
            raise NoPipeline(
                f"{source} cannot be loaded as a pipeline ({reason}): give a whole one, with its weights in safetensors"
            ) from error
        raise NoPipeline(
            f"{source!r} is no folder, and no whole pipeline of that name "
            f"{'could be fetched' if download else 'is cached'} ({reason}): give a folder"
            f"{'' if download else ', or download=True'}"
        ) from error
    if pipe.dtype != dtype:  # some releases of diffusers ignore the keyword
        pipe.to(dtype)
    return pipe.to(device)


def _whole_unet(source: str, **given: Any) -> Any:
    """The UNet of a pipeline of images; weights that its file lacks would be drawn, others left out."""
    make = require("diffusers", "diffusers").UNet2DModel
    unet, told = make.from_pretrained(
        source, subfolder="unet", use_safetensors=True, output_loading_info=True, **given
    )
    for key, fault in (("missing_keys", "lacks"), ("unexpected_keys", "has no place for")):
        if told[key]:
            raise InputError(f"its unet {fault} the weights {sorted(told[key])[0]}")
    return unet


def _require_weights(pipe: Any) -> None:
    """Refuse networks of which some weights are in no file."""
    for name, part in pipe.components.items():
        for weights, x in part.named_parameters() if isinstance(part, nn.Module) else ():
            if x.is_meta:
                raise InputError(f"its {name} lacks the weights {weights}")


def process_of(scheduler: Any) -> Schedule:
    """The process that a diffusers scheduler stands for as it is now, changes at run time included.

    Only the betas of a DDPM scheduler are used. A chain of few steps takes the trailing timesteps, whatever the
    scheduler's own spacing: leading ones start below pure noise, which shows in few steps. The chain ends at clean
    data, ᾱ = 1, and not at ᾱ_0 as with ``set_alpha_to_one=False``: its last step is deterministic under DDIM. It
    starts at σ_{T-1} ε, where diffusers' pipelines start at ε (Stable Diffusion has σ = 0.998). A flow has the levels
    of its scheduler.

    Raises:
        ValueError: the scheduler's process is neither DDPM nor Flow, or it clips samples.
    """
    config, name = scheduler.config, type(scheduler).__name__
    if "shift" in config and "beta_start" not in config:
        return _flow(scheduler)
    if "beta_schedule" not in config or config["beta_schedule"] not in KINDS:
        raise InputError(
            f"{name} has beta_schedule {config.get('beta_schedule')!r}: known are {', '.join(KINDS)}; and flow matching"
        )
    if config.get("clip_sample") or config.get("thresholding"):
        raise InputError(
            f"{name} clips samples, which latents must not be: pipe.scheduler.register_to_config(clip_sample=False, "
            "thresholding=False)"
        )
    kind, T = KINDS[config["beta_schedule"]], config["num_train_timesteps"]
    process = DDPM(T, kind, config["beta_start"], config["beta_end"])  # type: ignore[arg-type]
    if not hasattr(scheduler, "alphas_cumprod"):
        raise InputError(
            f"{name} is not the scheduler of its configuration, which has betas: restore model_index.json"
        )
    own = torch.as_tensor(scheduler.alphas_cumprod).double().cpu()
    if len(own) != T or not torch.allclose(own, process.alphas_cumprod, rtol=1e-3, atol=1e-6):
        raise InputError(
            f"{name} has other betas than the {T} {config['beta_schedule']} ones of its configuration (zero terminal "
            "SNR?)"
        )
    return process


def _flow(scheduler: Any) -> Flow:
    """The flow of a scheduler, compared with the levels that the scheduler itself gives."""
    config, name = scheduler.config, type(scheduler).__name__
    special = [k for k in config if k.startswith("use_") or k in ("invert_sigmas", "shift_terminal")]
    if asked := [k for k in special if config[k]]:
        raise InputError(f"{name} has {', '.join(asked)}: only a fixed shift is known here")
    shift = getattr(scheduler, "shift", config["shift"])  # set_shift changes it, and not the configuration
    process = Flow(float(shift), t_min=float(scheduler.sigma_min))
    probe = copy.deepcopy(scheduler)
    probe.set_timesteps(PROBE)
    own, times = probe.sigmas.double().cpu(), process.time_grid(PROBE)
    if own.shape != times.shape or not torch.allclose(own, times, rtol=1e-5, atol=1e-6):
        raise InputError(
            f"{name} has the levels {[round(v, 4) for v in own.tolist()]}, a shift of {shift:g} would give "
            f"{[round(v, 4) for v in times.tolist()]}: only a fixed shift is known here"
        )
    return process


def prediction_of(scheduler: Any) -> PredictionType:
    """What the scheduler's model predicts.

    Raises:
        ValueError: an unknown prediction type.
    """
    config = scheduler.config
    if "prediction_type" not in config:
        return "velocity"
    if config["prediction_type"] not in PREDICTIONS:
        raise InputError(
            f"prediction_type is {config['prediction_type']!r}: known are {', '.join(PREDICTIONS)}"
        )
    return PREDICTIONS[config["prediction_type"]]


def network_of(pipe: Any) -> Any:
    """The UNet or transformer of a pipeline, compiled or not.

    Raises:
        ValueError: another network, or one with conditions other than prompts.
    """
    diffusers, name = require("diffusers", "diffusers"), type(pipe).__name__
    found: list[nn.Module] = [
        n for n in (getattr(pipe, k, None) for k in ("unet", "transformer")) if n is not None
    ]
    network = plain(found[0]) if found else None
    if isinstance(network, diffusers.SD3Transformer2DModel) or is_z_image(network):
        return found[0]
    if not isinstance(network, diffusers.UNet2DConditionModel):
        raise InputError(
            f"{name} has no UNet2DConditionModel or SD3Transformer2DModel: give a Stable Diffusion 1.x, 2.x or 3.x, "
            "Turbo, LCM or Z-Image pipeline"
        )
    config = network.config
    more = [k for k in ("addition_embed_type", "class_embed_type", "encoder_hid_dim_type") if config.get(k)]
    if more or config.in_channels != config.out_channels:
        raise InputError(
            f"{name}'s network wants more than a prompt ({', '.join(more) or 'further input channels'}), as SDXL's and "
            "inpainting's do: only conditioning on prompts is supported"
        )
    return found[0]


def warn_of_other_timesteps(scheduler: Any) -> None:
    """Warn where a latent consistency model was distilled on other timesteps than the sampler takes by default."""
    M = scheduler.config.get("original_inference_steps", LCM.solver_steps)
    if M != LCM.solver_steps:
        warnings.warn(f"this model was distilled on {M} timesteps: give LCM(solver_steps={M})", stacklevel=3)


def warn_of_truncation(pipe: Any, prompts: Sequence[str], max_sequence_length: int) -> None:
    """Warn of prompts that are longer than a text encoder reads."""
    for name in ("tokenizer", "tokenizer_2", "tokenizer_3"):
        if (tokenizer := getattr(pipe, name, None)) is None:
            continue
        chat = is_z_image(getattr(pipe, "transformer", None))
        texts = [as_chat(pipe, prompt) for prompt in prompts] if chat else list(prompts)
        limit = max_sequence_length if chat or name == "tokenizer_3" else tokenizer.model_max_length
        tokens = [len(ids) for ids in tokenizer(texts, verbose=False).input_ids]
        if long := [i for i, n in enumerate(tokens) if n > limit]:
            which = f"{', '.join(map(str, long[:8]))}{', ...' if len(long) > 8 else ''}"
            warnings.warn(
                f"prompts {which} are cut off: {name} reads {limit} tokens, and they have up to {max(tokens)}",
                stacklevel=3,
            )


@torch.no_grad()
def encoded(pipe: Any, prompts: Sequence[str], max_sequence_length: int) -> dict[str, Tensor]:
    """Encode prompts by the pipeline's own text encoders.

    Args:
        pipe: the pipeline.
        prompts: P+1 strings, the negative prompt last.
        max_sequence_length: number of tokens that the T5 encoder of SD 3.x and that of Z-Image read.

    Returns:
        Keyword of the network → [P+1, ...].
    """
    if is_z_image(getattr(pipe, "transformer", None)):
        return encoded_captions(pipe, prompts, max_sequence_length)
    three = getattr(pipe, "transformer", None) is not None
    device = next(pipe.text_encoder.parameters()).device
    more = {"prompt_2": None, "prompt_3": None, "max_sequence_length": max_sequence_length} if three else {}
    keywords = (
        {"encoder_hidden_states": 0, "pooled_projections": 2} if three else {"encoder_hidden_states": 0}
    )
    found: dict[str, list[Tensor]] = {keyword: [] for keyword in keywords}
    for start in range(0, len(prompts), ENCODED_AT_ONCE):
        encoded = pipe.encode_prompt(
            prompt=list(prompts[start : start + ENCODED_AT_ONCE]),
            device=device,
            num_images_per_prompt=1,
            do_classifier_free_guidance=False,
            **more,
        )
        for keyword, place in keywords.items():
            found[keyword].append(encoded[place])
    return {keyword: torch.cat(parts) for keyword, parts in found.items()}
