"""Noise schedules by name."""

from diffrl.registry import Registry

__all__ = ["PROCESSES"]

PROCESSES = Registry("process", "diffrl.diffusion.schedules")
