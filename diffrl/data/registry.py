"""Data sets by name."""

from diffrl.registry import Registry

__all__ = ["DATASETS"]

DATASETS = Registry("data", "diffrl.data")
