"""A tiny UNet of diffusers with random weights."""

from typing import Any

import torch

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
