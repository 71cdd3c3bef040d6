"""Low-rank adapters on a pipeline's network, by peft: they are trained, and the network itself stays as it is."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from diffrl.diffusion.pipelines.parts import plain
from diffrl.errors import InputError, InputTypeError
from diffrl.extras import require
from diffrl.ranges import require_int, require_number
from diffrl.text_files import file_errors

__all__ = ["ADAPTER", "adapters_disabled", "add_lora", "export_lora", "has_lora", "save_lora"]

ADAPTER = "diffrl"  # the name that peft keeps the adapter under


def has_lora(network: nn.Module) -> bool:
    """Whether the network has the adapters of `add_lora`."""
    return ADAPTER in getattr(plain(network), "peft_config", {})


def add_lora(
    denoiser: nn.Module,
    rank: int = 4,
    alpha: float | None = None,
    target_modules: Sequence[str] = ("to_q", "to_k", "to_v", "to_out.0"),
    *,
    generator: torch.Generator | None = None,
) -> None:
    """Freeze the network of a denoiser, and give its attention layers adapters in float32 that are trained instead.

        W x  becomes  W x + (alpha/rank) U V x,    U = 0 at first (the paper writes B for U, and A for V)

    Source: LoRA: Low-Rank Adaptation of Large Language Models (Hu et al., 2022), section 4.1,
    https://arxiv.org/abs/2106.09685.

    Args:
        denoiser: a `diffrl.diffusion.pipelines.denoiser.PipelineDenoiser`; changed in place.
        rank: of U and V, ≥ 1.
        alpha: scale > 0; None: the rank, so that the scale is 1.
        target_modules: linear layers whose names end in one of these get adapters.
        generator: source of V; None: torch's global one. All processes of one run need the same V.

    Raises:
        MissingExtra: peft is not installed.
        TypeError: the network takes no adapters.
        ValueError: it has adapters already, no layer has such a name, or the rank or alpha is out of its range.
    """
    peft = require("peft", "lora")
    network = plain(denoiser.network)
    if not hasattr(network, "add_adapter"):
        raise InputTypeError(
            f"{type(network).__name__} takes no adapters: give a PipelineDenoiser of a diffusers pipeline"
        )
    require_int("rank", rank)
    if alpha is not None:
        require_number("alpha", alpha, 0, ends="()")
    if getattr(network, "peft_config", None):
        raise InputError(
            f"the network has adapters already, {', '.join(network.peft_config)}: merge them into the base first, "
            "by pipe.fuse_lora() and pipe.unload_lora_weights()"
        )
    if not any(name.endswith(tuple(target_modules)) for name, _ in network.named_modules()):
        raise InputError(
            f"no layer of {type(network).__name__} has a name that ends in {list(target_modules)}"
        )
    config = peft.LoraConfig(
        r=rank, lora_alpha=rank if alpha is None else alpha, target_modules=list(target_modules)
    )
    devices = {p.device for p in network.parameters() if p.is_cuda}
    with torch.random.fork_rng(devices=list(devices)):  # peft's own draws are replaced below
        network.add_adapter(config, adapter_name=ADAPTER)  # this freezes all other parameters
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
            if ".lora_A." in name:
                V = torch.empty(parameter.shape, device="cpu" if generator is None else generator.device)
                parameter.data.copy_(nn.init.kaiming_uniform_(V, a=5**0.5, generator=generator))


@contextmanager
def adapters_disabled(network: nn.Module) -> Iterator[None]:
    """Context in which the adapters are switched off; afterwards the same parameters are trained as before."""
    layer_type = require("peft.tuners.tuners_utils", "lora").BaseTunerLayer
    layers = [module for module in network.modules() if isinstance(module, layer_type)]
    trained = [p for p in network.parameters() if p.requires_grad]  # peft changes requires_grad on the way
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
        network.requires_grad_(False)
        for p in trained:
            p.requires_grad_(True)


def save_lora(denoiser: nn.Module, folder: str | Path) -> None:
    """Write the adapters as diffusers reads them: ``pipe.load_lora_weights(folder)`` gives a tuned pipeline.

    Args:
        denoiser: a `diffrl.diffusion.pipelines.denoiser.PipelineDenoiser` with adapters.
        folder: gets ``pytorch_lora_weights.safetensors``.

    Raises:
        ValueError: there are no adapters.
        OSError: the folder cannot be written.
    """
    network = plain(denoiser.network)
    if not has_lora(network):
        raise InputError("there are no adapters to save: call add_lora before training")
    loaders, peft = require("diffusers.loaders", "diffusers"), require("peft", "lora")
    component = "unet" if "UNet" in type(network).__name__ else "transformer"
    loader = {"unet": loaders.StableDiffusionLoraLoaderMixin, "transformer": loaders.SD3LoraLoaderMixin}
    weights = peft.get_peft_model_state_dict(network, adapter_name=ADAPTER)
    settings = network.peft_config[ADAPTER].to_dict()
    with file_errors(folder, "written"):
        loader[component].save_lora_weights(
            str(folder),
            **{f"{component}_lora_layers": weights, f"{component}_lora_adapter_metadata": settings},
        )


def export_lora(denoiser: nn.Module, folder: Path) -> None:
    """`save_lora` into the folder ``lora`` of a run's, if the denoiser has adapters; else nothing."""
    if has_lora(getattr(denoiser, "network", denoiser)):
        save_lora(denoiser, folder / "lora")
