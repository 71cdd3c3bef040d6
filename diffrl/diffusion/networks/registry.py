"""Networks by name."""

from collections.abc import Mapping
from typing import Any

from diffrl.registry import Registry

__all__ = ["NETWORKS", "options_among"]

NETWORKS = Registry("network", "diffrl.diffusion.networks", omit=("event_shape", "num_classes"))


def options_among(values: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a network, of what `locals()` gives at the start of its constructor.

    A network of the registry that keeps them as its attribute ``options`` is described in the files of `diffrl.save`.
    """
    return {k: v for k, v in values.items() if k not in ("self", "__class__", *NETWORKS.omit)}
