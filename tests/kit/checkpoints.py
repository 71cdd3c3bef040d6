"""Checkpoints to write, and what their folder is made of."""

from pathlib import Path

import torch

from diffrl.training.checkpoints import save_checkpoint

FILES = ["model.safetensors", "ema.safetensors", "training.pt", "manifest.json"]


def save(folder: Path, step: int, keep: int = 10) -> Path:
    w = torch.full((100,), float(step))
    weights = {"model": {"w": w}, "ema": {"w": -w}}
    return save_checkpoint(folder, step, weights=weights, training={"lr": 0.1 * step, "w": w}, keep=keep)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())
