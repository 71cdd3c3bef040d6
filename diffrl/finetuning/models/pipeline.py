"""A diffusers pipeline, with adapters."""

import dataclasses
from functools import partial
from pathlib import Path

import torch

from diffrl.diffusion.pipelines.denoiser import PipelineDenoiser, load_pipeline
from diffrl.diffusion.pipelines.lora import add_lora, export_lora, load_lora
from diffrl.errors import InputError
from diffrl.finetuning.models.base import Tunable
from diffrl.finetuning.models.picture_files import write_pictures
from diffrl.finetuning.models.registry import MODELS
from diffrl.finetuning.prompts import Prompts, prompts_of
from diffrl.ranges import require_int
from diffrl.rewards.black_box import BlackBox
from diffrl.rewards.calls import Reward
from diffrl.rewards.decoded import DecodedReward, LatentDecoder
from diffrl.rewards.weighted_sum import WeightedSum

__all__ = ["pipeline_model"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")


@MODELS.register("pipeline")
def pipeline_model(
    path: str | None = None,
    *,
    prompts: list[str] = [],  # noqa: B006 (read, not changed: a configuration's default)
    prompts_file: str | None = None,
    prompts_from: str | None = None,
    negative_prompt: str = "",
    guidance_scale: float = 1.0,
    train_unconditional: bool = True,
    lora_rank: int | None = 4,
    lora_alpha: float | None = None,
    lora_layers: tuple[str, ...] = ATTENTION,
    adapters: str | None = None,
    even_levels: bool = False,
    weights: str = "bfloat16",
    variant: str | None = None,
    leave_out: tuple[str, ...] = (),
    gradient_checkpointing: bool = False,
    latent_size: int | None = None,
    max_sequence_length: int = 256,
    decode_batch_size: int = 8,
    download: bool = False,
    device: str = "cpu",
    seed: int = 0,
) -> Tunable:
    """The network of a diffusers pipeline, with adapters; its reward gets decoded images and prompts.

    A reward with a parameter `metadata` gets that of the prompts too: see `diffrl.finetuning.prompts`.

    Args:
        path: folder of the pipeline, or a name in the cache of the hub.
        prompts: what conditions are drawn from.
        prompts_file: instead, a text file with one prompt a line, or .jsonl with one object a line.
        prompts_from: instead, a function of yours that gives them, by its name in
            `diffrl.finetuning.prompts.PROMPTS`.
        negative_prompt: what guidance leads away from, the model's own or that of a teacher (surrogate.guidance_scale).
        guidance_scale: w ≥ 1; 1 is off.
        train_unconditional: whether the unconditional part of guidance passes gradients too.
        lora_rank: of the adapters; None trains all weights, which must then be float32.
        lora_alpha: their scale; None: the rank.
        lora_layers: ends of the names of the layers that get them.
        adapters: folder of a LoRA that they start from, such as a distilled student's: what a run wrote as ``lora/``,
            or diffusers, with this rank, scale and layers. Methods of distillation then learn from the network
            without it.
        even_levels: see `PipelineDenoiser.from_pipeline`; for generators of few steps.
        weights: dtype of the frozen weights: "float32", "bfloat16" or "float16".
        variant: of the files, e.g. "fp16".
        leave_out: components to do without, e.g. [text_encoder_3, tokenizer_3] of SD 3.x.
        gradient_checkpointing: less memory, more time.
        latent_size: height and width of latents; None: what the network was made for.
        max_sequence_length: tokens of the T5 encoder of SD 3.x, and of that of Z-Image.
        decode_batch_size: latents decoded at once.
        download: let diffusers fetch what is missing; without it nothing touches the network.
        device: where it goes; the run's.
        seed: of the adapters' first values; the run's.

    Raises:
        MissingExtra, FileNotFoundError, ValueError: see `load_pipeline`, `PipelineDenoiser`, `add_lora`, `load_lora`.
    """
    if path is None:
        raise InputError("model.path is null: give a pipeline's folder, or a name in the hub's cache")
    _check_options(weights, lora_rank, adapters, latent_size, decode_batch_size)
    given, seeded = prompts_of(prompts, prompts_file, prompts_from), torch.Generator().manual_seed(seed)
    pipe = load_pipeline(
        path, DTYPES[weights], device=device, variant=variant, leave_out=leave_out, download=download
    )
    denoiser = PipelineDenoiser.from_pipeline(
        pipe,
        given.texts,
        guidance_scale=guidance_scale,
        negative_prompt=negative_prompt,
        max_sequence_length=max_sequence_length,
        train_unconditional=train_unconditional,
        even_levels=even_levels,
    )
    if lora_rank is not None:
        add_lora(denoiser, lora_rank, lora_alpha, lora_layers, generator=seeded)
    if adapters is not None:
        load_lora(denoiser, adapters)
    if gradient_checkpointing:
        denoiser.enable_gradient_checkpointing()
    decode, name = LatentDecoder(pipe.vae.requires_grad_(False)), Path(path).name.replace(" ", "-")
    found = _tunable(denoiser, given, latent_size, decode, decode_batch_size, name=name)
    return found if adapters is None else dataclasses.replace(found, teacher=denoiser.base())


def _tunable(
    denoiser: PipelineDenoiser,
    given: Prompts,
    size: int | None,
    decode: LatentDecoder,
    at_once: int,
    *,
    name: str,
) -> Tunable:
    channels, h, w = denoiser.event_shape
    return Tunable(
        denoiser,
        (channels, h, w) if size is None else (channels, size, size),
        torch.arange(len(given.texts)),
        lambda reward: _decoded(reward, decode, given, at_once),
        name,
        pictures=lambda x: torch.cat([decode(part).cpu() for part in x.split(at_once)]),
        export=lambda folder: export_lora(denoiser, folder),
        show=partial(write_pictures, given.texts),
    )


def _check_options(
    weights: str,
    lora_rank: int | None,
    adapters: str | None,
    latent_size: int | None,
    decode_batch_size: int,
) -> None:
    if adapters is not None and lora_rank is None:
        raise InputError("model.adapters are a LoRA: set model.lora_rank to its rank")
    for name, number in (("lora_rank", lora_rank), ("latent_size", latent_size)):
        if number is not None:
            require_int(f"model.{name}", number)
    require_int("model.decode_batch_size", decode_batch_size)
    if weights not in DTYPES:
        raise InputError(f"model.weights is {weights!r}: give {', '.join(DTYPES)}")
    if lora_rank is None and weights != "float32":
        raise InputError(
            "without adapters all weights are trained, and half precision loses small steps: set "
            "model.weights=float32, or model.lora_rank"
        )


def _decoded(reward: Reward, decode: LatentDecoder, prompts: Prompts, batch_size: int) -> Reward:
    """A reward of images and prompts as one of latents and numbers of prompts."""
    if isinstance(reward, WeightedSum):  # its statistics must not lie under a cache: decode for each part
        parts = {
            name: (_decoded(part, decode, prompts, batch_size), reward.weights[name])
            for name, part in reward.parts.items()
        }
        return WeightedSum(parts, normalise=reward.normalise, tol=reward.tol)
    asked = reward.reward if isinstance(reward, BlackBox) else reward  # what counts queries lies outside
    return DecodedReward(asked, decode, prompts.texts, batch_size, metadata=prompts.metadata)
