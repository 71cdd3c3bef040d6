"""The denoiser of a training run of this library."""

import torch
from torch import nn

from diffrl.diffusion.guidance import GuidedDenoiser
from diffrl.diffusion.step_counts import StepConditioned
from diffrl.errors import InputError
from diffrl.finetuning.models.base import Tunable
from diffrl.finetuning.models.registry import MODELS
from diffrl.ranges import require_number
from diffrl.training.runs import load

__all__ = ["run_model"]


@MODELS.register("run")
def run_model(
    path: str | None = None,
    *,
    objective: str | None = None,
    labels: list[int] | None = None,
    guidance_scale: float = 1.0,
    step_counts: list[int] | None = None,
) -> Tunable:
    """The averaged denoiser of a run folder.

    Args:
        path: the run folder; `examples/finetune_reward.py` trains one where it is None.
        objective: whose denoiser; the run's main one if None.
        labels: labels to condition on, for a denoiser that was trained with labels; None: all of them.
        guidance_scale: see `diffrl.diffusion.guidance.GuidedDenoiser`; 1 is off.
        step_counts: numbers of steps that it is told apart by, see `diffrl.diffusion.step_counts.StepConditioned`, for
            ``rollouts=step_counts``; None: it is not told.

    Raises:
        RunFolderError, CheckpointError: there is no such denoiser.
        ValueError: labels or guidance for a denoiser without labels, or a label that it does not know.
    """
    if path is None:
        raise InputError("model.path is null: give the folder of a training run")
    require_number("guidance_scale", guidance_scale)
    run = load(path, objective)
    num_classes = int(getattr(run.denoiser.network, "num_classes", 0))
    denoiser: nn.Module = run.denoiser
    conditions = None
    if num_classes == 0 and (labels or guidance_scale != 1):
        raise InputError(
            f"{path} was trained without labels, so model.labels and model.guidance_scale have no meaning: "
            "train it with data.conditional=true"
        )
    if num_classes:
        chosen = list(range(num_classes)) if labels is None else labels
        if not chosen or not all(0 <= label < num_classes for label in chosen):
            raise InputError(f"model.labels is {labels}: the denoiser knows 0..{num_classes - 1}")
        conditions = torch.tensor(chosen)
    if guidance_scale != 1:
        denoiser = GuidedDenoiser(run.denoiser, num_classes, guidance_scale)
    if step_counts is not None:
        denoiser = StepConditioned(denoiser, step_counts)
    denoiser.requires_grad_(True)
    return Tunable(denoiser, run.events.event_shape, conditions, lambda reward: reward, run.name)
