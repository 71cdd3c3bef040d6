"""The registry of what can be tuned."""

from diffrl.registry import Registry

__all__ = ["MODELS"]

MODELS = Registry("model", "diffrl.finetuning.models", omit=("device", "seed"))
