"""Ways to turn rewards into advantages, by name."""

from diffrl.registry import Registry

__all__ = ["CREDITS"]

CREDITS = Registry("credit", "diffrl.finetuning.credit")
