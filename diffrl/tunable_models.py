"""What can be tuned, by name: the denoiser of a run of this library, or a diffusers pipeline with adapters."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from diffrl.data import Data
from diffrl.denoisers import GuidedDenoiser
from diffrl.rewards import Reward
from diffrl.runs import load

__all__ = ["MODELS", "Tunable", "run_model"]


@dataclass(frozen=True)
class Tunable:
    """A denoiser and what a policy of it needs to know.

    Args:
        denoiser: D, with a process; its parameters that require a gradient are tuned.
        event_shape: *E of a latent.
        conditions: what a condition is drawn from, [M, ...]; None: no condition.
        wrap_reward: makes a reward of samples into one of latents.
        data: what the denoiser was trained on, where that is known.
        name: for people.
    """

    denoiser: nn.Module
    event_shape: tuple[int, ...]
    conditions: Tensor | None
    wrap_reward: Callable[[Reward], Reward]
    data: Data | None
    name: str


def run_model(
    path: str | None = None,
    *,
    objective: str | None = None,
    labels: list[int] | None = None,
    guidance_scale: float = 1.0,
) -> Tunable:
    """The averaged denoiser of a run folder.

    Args:
        path: the run folder; `examples/finetune_reward.py` trains one where it is None.
        objective: whose denoiser; the run's main one if None.
        labels: labels to condition on, for a denoiser that was trained with labels; None: all of them.
        guidance_scale: see `diffrl.denoisers.GuidedDenoiser`; 1 is off.

    Raises:
        RunFolderError, CheckpointError: there is no such denoiser.
        ValueError: labels or guidance for a denoiser without labels, or a label that it does not know.
    """
    if path is None:
        raise ValueError("model.path is null: give the folder of a training run")
    run = load(path, objective)
    num_classes = int(getattr(run.denoiser.network, "num_classes", 0))
    denoiser: nn.Module = run.denoiser
    conditions = None
    if num_classes == 0 and (labels or guidance_scale != 1):
        raise ValueError(
            f"{path} was trained without labels, so model.labels and model.guidance_scale have no meaning: "
            "train it with data.conditional=true"
        )
    if num_classes:
        chosen = list(range(num_classes)) if labels is None else labels
        if not chosen or not all(0 <= label < num_classes for label in chosen):
            raise ValueError(f"model.labels is {labels}: the denoiser knows 0..{num_classes - 1}")
        conditions = torch.tensor(chosen)
    if guidance_scale != 1:
        denoiser = GuidedDenoiser(run.denoiser, num_classes, guidance_scale)
    denoiser.requires_grad_(True)
    return Tunable(denoiser, run.data.event_shape, conditions, lambda reward: reward, run.data, run.data.name)


MODELS: dict[str, Callable[..., Any]] = {"run": run_model}
