"""What a fine-tuning run made, to be tuned further: a distilled student, for instance."""

import dataclasses
from pathlib import Path
from typing import Literal

from torch import nn

from diffrl.errors import InputError
from diffrl.finetuning.models.base import Tunable
from diffrl.finetuning.models.registry import MODELS, build_model
from diffrl.finetuning.reference import frozen_denoiser, load_policy_weights, trainable_copy
from diffrl.training.checkpoints import CheckpointError, latest_checkpoint, load_weights, weight_sets
from diffrl.training.identity import require_kind
from diffrl.training.runs import RunFolder

__all__ = ["latest_tuned", "tuned_model"]

FAKE = "reference_fake"  # the set of weights that a distillation keeps its fake score in


def latest_tuned(folder: RunFolder) -> Path:
    """The last checkpoint of a fine-tuning run.

    Raises:
        CheckpointError: there is none yet.
    """
    newest = latest_checkpoint(folder.checkpoints("policy"))
    if newest is None:
        raise CheckpointError(f"{folder.checkpoints('policy')} holds no checkpoint: has the run begun?")
    return newest


@MODELS.register("tuned")
def tuned_model(
    path: str | None = None,
    *,
    teacher: Literal["base", "itself"] = "base",
    device: str = "cpu",
    seed: int = 0,
) -> Tunable:
    """The denoiser that a fine-tuning run made: a student that TDM distilled, or a policy that was tuned for a reward.

    Give its sampler and steps as it had them: ``sampler=ddim policy.num_steps=4 policy.std_floor=0`` of a student with
    four steps. A fake score that the run trained is taken along.

    Args:
        path: folder of the run.
        teacher: whom methods of distillation learn from: "base", the denoiser that the run began with, or its own
            teacher if it had one; "itself": this denoiser, as it is now.
        device: where it goes; the run's.
        seed: of what the model of that run draws; the run's.

    Raises:
        RunFolderError: the folder holds no fine-tuning run.
        CheckpointError: there is no checkpoint yet, or it is damaged.
        ValueError: no path, or an unknown teacher.
    """
    if path is None:
        raise InputError("model.path is null: give the folder of a fine-tuning run")
    if teacher not in ("base", "itself"):
        raise InputError(f"model.teacher is {teacher!r}: give 'base' or 'itself'")
    folder = RunFolder.reopen(Path(path))
    config = folder.config()
    require_kind(folder.path, config, "finetune")
    model = build_model(config["model"], device=device, seed=seed)
    base = frozen_denoiser(model.denoiser) if model.teacher is None else model.teacher
    newest = latest_tuned(folder)
    twins: dict[str, nn.Module] = {}
    if teacher == "base" and FAKE in weight_sets(newest):
        twins["fake"] = trainable_copy(base)
        load_policy_weights(twins["fake"], load_weights(newest, FAKE), newest, whole=True)
    load_policy_weights(model.denoiser, load_weights(newest, "policy"), newest)
    learnt_from = base if teacher == "base" else None
    return dataclasses.replace(model, name=folder.path.name, teacher=learnt_from, twins=twins)
