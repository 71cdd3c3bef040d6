"""Fine-tuning methods by name: each is a function that gives its recipe."""

from diffrl.registry import Registry

__all__ = ["METHODS"]

METHODS = Registry("recipe", "diffrl.finetuning.methods")
