"""Low-rank adapters on a pipeline's network, by peft: they are trained, and the network itself stays as it is."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffrl.diffusion.pipelines.parts import plain
from diffrl.errors import FileError, InputError, InputTypeError
from diffrl.extras import require
from diffrl.ranges import require_int, require_number
from diffrl.text_files import file_errors

__all__ = [
    "ADAPTER",
    "adapters",
    "adapters_disabled",
    "add_lora",
    "export_lora",
    "has_lora",
    "load_lora",
    "load_tensors",
    "save_lora",
]

ADAPTER = "diffrl"  # the name that peft keeps the adapter under


class NoAdapters(FileError, FileNotFoundError):
    """There is no file of adapters in a folder."""


def has_lora(network: nn.Module) -> bool:
    """Whether the network has the adapters of `add_lora`."""
    return ADAPTER in getattr(plain(network), "peft_config", {})


def adapters(module: nn.Module) -> dict[str, nn.Parameter]:
    """The adapters of `add_lora` in a network or a part of one, by name."""
    return {name: p for name, p in module.named_parameters() if ".lora_" in name and f".{ADAPTER}." in name}


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
    peft = require("peft", "lora")
    component, loader = _loader(network)
    weights = peft.get_peft_model_state_dict(network, adapter_name=ADAPTER)
    settings = network.peft_config[ADAPTER].to_dict()
    with file_errors(folder, "written"):
        loader.save_lora_weights(
            str(folder),
            **{f"{component}_lora_layers": weights, f"{component}_lora_adapter_metadata": settings},
        )


def load_lora(denoiser: nn.Module, folder: str | Path) -> None:
    """Take the adapters of a folder that `save_lora` or diffusers wrote into those of a denoiser.

    Args:
        denoiser: a `diffrl.diffusion.pipelines.denoiser.PipelineDenoiser` with adapters; changed in place.
        folder: holds ``pytorch_lora_weights.safetensors``.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: no adapters to take them, or others: another rank, scale or other layers.
    """
    network = plain(denoiser.network)
    if not has_lora(network):
        raise InputError("there are no adapters that could take these: call add_lora first")
    if not (Path(folder) / "pytorch_lora_weights.safetensors").is_file():
        raise NoAdapters(f"{folder} holds no pytorch_lora_weights.safetensors: give the folder of a LoRA")
    component, loader = _loader(network)
    state, *_, settings = loader.lora_state_dict(str(folder), return_lora_metadata=True)
    state = {k.removeprefix(f"{component}."): v for k, v in state.items() if k.startswith(f"{component}.")}
    state = {k.replace(".weight", f".{ADAPTER}.weight"): v for k, v in state.items()}
    ours = network.peft_config[ADAPTER]
    alpha = (settings or {}).get(f"{component}.lora_alpha", ours.r)  # files that say nothing have the scale 1
    if alpha != ours.lora_alpha:
        raise InputError(
            f"the adapters of {folder} were made with alpha {alpha:g}, these have {ours.lora_alpha:g}: give add_lora "
            "the same"
        )
    load_tensors(adapters(network), state)


@torch.no_grad()
def load_tensors(trained: Mapping[str, nn.Parameter], state: Mapping[str, Tensor]) -> None:
    """Take tensors into parameters, by name.

    Raises:
        ValueError: other names, or other shapes.
    """
    if trained.keys() != state.keys():
        raise InputError(
            f"{len(state)} trained tensors for {len(trained)} that are trained here, "
            f"{len(trained.keys() & state.keys())} of them the same: "
            "call add_lora with the same target_modules before loading"
        )
    for name, p in trained.items():
        if p.shape != state[name].shape:
            raise InputError(
                f"{name} has shape {tuple(state[name].shape)}, here {tuple(p.shape)}: is the rank another?"
            )
    for name, p in trained.items():
        p.copy_(state[name])


def _loader(network: nn.Module) -> tuple[str, Any]:
    """The name of a pipeline's network, and what reads and writes its adapters."""
    loaders, name = require("diffusers.loaders", "diffusers"), type(network).__name__
    if "UNet" in name:
        return "unet", loaders.StableDiffusionLoraLoaderMixin
    return "transformer", loaders.ZImageLoraLoaderMixin if "ZImage" in name else loaders.SD3LoraLoaderMixin


def export_lora(denoiser: nn.Module, folder: Path) -> None:
    """`save_lora` into the folder ``lora`` of a run's, if the denoiser has adapters; else nothing."""
    if has_lora(getattr(denoiser, "network", denoiser)):
        save_lora(denoiser, folder / "lora")
