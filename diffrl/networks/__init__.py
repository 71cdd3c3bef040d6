"""Networks of our own, small and by name: F_θ(x [N, *E], c_noise [N], cond [N] or None) → [N, *E]."""

from torch import nn

from diffrl.networks.mlp import MLP
from diffrl.networks.unet import UNet

__all__ = ["MLP", "NETWORKS", "UNet"]

NETWORKS: dict[str, type[nn.Module]] = {"mlp": MLP, "unet": UNet}
