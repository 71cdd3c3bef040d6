"""Networks by name."""

from diffrl.registry import Registry

__all__ = ["NETWORKS"]

NETWORKS = Registry("network", "diffrl.diffusion.networks", omit=("event_shape", "num_classes"))
