"""A tiny UNet of diffusers with random weights, and stock pipelines of one."""

from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMPipeline, DDPMPipeline, DDPMScheduler, UNet2DModel

from diffrl.diffusion.networks import DiffusersUNet


def tiny_unet(
    shape: tuple[int, ...], num_classes: int = 0, *, seed: int = 0, **options: Any
) -> DiffusersUNet:
    """One whose zero-initialised layers are drawn too, so that its output says something; in eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = DiffusersUNet(
            shape, num_classes, **{"block_out_channels": (8, 16), "norm_num_groups": 4, **options}
        )
        for parameter in network.parameters():
            parameter.data += 0.05 * torch.randn_like(parameter)
    return network.eval()


def stock_pipeline(folder: Path, *, scheduler: Any = DDPMScheduler, unet: Any = None, **options: Any) -> Any:
    """A stock pipeline, made by diffusers alone, and saved."""
    torch.manual_seed(0)
    settings = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    size = {"sample_size": 8, "block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4}
    given = {"flip_sin_to_cos": False, "freq_shift": 1, **size, **settings, **(unet or {})}
    kind = DDPMPipeline if scheduler is DDPMScheduler else DDIMPipeline
    network = UNet2DModel(**given).eval()
    network.conv_out.weight.data *= 0.1  # estimates of x0 that no scheduler clips
    pipe = kind(unet=network, scheduler=scheduler(**options))
    pipe.set_progress_bar_config(disable=True)
    pipe.save_pretrained(folder)
    return pipe
