"""A small policy to tune, and the reward that it is tuned for."""

from typing import Any

import torch
from torch import Tensor, nn

import diffrl
from diffrl.diffusion.networks.mlp import MLP
from diffrl.finetuning.policy import DenoisingPolicy


def make_policy(
    sampler: Any = None, num_steps: int = 4, num_classes: int = 0, seed: int = 0, **options: Any
) -> DenoisingPolicy:
    torch.manual_seed(seed)
    network = MLP((2,), num_classes, hidden=16, depth=1)
    nn.init.normal_(network.last.weight, std=0.3)
    denoiser = diffrl.Denoiser(network, diffrl.EDM())
    given = {"num_steps": num_steps, "reduction": "mean", "std_floor": 0.05, **options}
    return DenoisingPolicy(denoiser, sampler or diffrl.Ancestral(), **given)


def right(x0: Tensor, cond: Any = None) -> Tensor:
    """The reward: the first coordinate."""
    return x0[:, 0]
