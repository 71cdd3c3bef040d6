"""Plans of updates, by name."""

from diffrl.registry import Registry

__all__ = ["UPDATES"]

UPDATES = Registry("updates", "diffrl.finetuning.updates")
