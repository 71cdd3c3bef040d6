"""Ways to place rewards along a chain, by name."""

from diffrl.registry import Registry

__all__ = ["PLACEMENTS"]

PLACEMENTS = Registry("placement", "diffrl.finetuning.placement")
