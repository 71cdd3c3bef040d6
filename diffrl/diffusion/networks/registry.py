"""Networks by name."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from diffrl.registry import Config, Registry

__all__ = ["NETWORKS", "build_network", "options_among"]

NETWORKS = Registry("network", "diffrl.diffusion.networks", omit=("event_shape", "num_classes"))


def options_among(values: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a network, of what `locals()` gives at the start of its constructor.

    A network of the registry that keeps them as its attribute ``options`` is described in the files of `diffrl.save`.
    """
    return {k: v for k, v in values.items() if k not in ("self", "__class__", *NETWORKS.omit)}


def build_network(config: Config, *, event_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """The network of a configuration, which tells what it was built for and from by attributes.

    They are ``event_shape``, ``num_classes`` and ``made_from``, and one of your own need not set them: without, it
    would get no labels, and `diffrl.save` would not know it.
    """
    network: nn.Module = NETWORKS.build(config, event_shape=event_shape, num_classes=num_classes)
    told = {"event_shape": event_shape, "num_classes": num_classes, "made_from": dict(config)}
    for name, value in told.items():
        if not hasattr(network, name):
            setattr(network, name, value)
    return network
