"""What an objective is given as its teacher: a frozen denoiser, or the exact one of the data."""

from typing import Any

import torch
from torch import nn

from diffrl.data.dataset import Data
from diffrl.diffusion.denoisers import DenoiserFn
from diffrl.diffusion.schedules.base import Schedule
from diffrl.diffusion.schedules.edm import EDM
from diffrl.errors import InputError, InputTypeError
from diffrl.objectives.posteriors import exact_x0_law

__all__ = ["same_states", "teacher_of"]


def teacher_of(
    teacher: Any,  # noqa: ANN401
    process: Schedule,
    data: Data | None,
    device: torch.device | str = "cpu",
) -> DenoiserFn:
    """D_T(x_t, t, cond) of what was given as `teacher`.

    Args:
        teacher: a denoiser, which is used as it is: train it no further; or "exact", the exact denoiser of the data:
            of a mixture, or of finitely many rows, which it memorises. A configuration names a run folder or a model
            file instead, which `diffrl.training.teachers` loads and freezes.
        process: that the states have.
        data: whose exact denoiser "exact" is.
        device: where the states are.

    Raises:
        ValueError: none is given; the name of a file; "exact" without data, or for data whose law is not known; a
            teacher whose states are others.
        TypeError: something that cannot be called.
    """
    if teacher is None:
        raise InputError(
            "teacher is None: give a run folder or a model file of a trained denoiser, such as teacher=runs/..., or "
            "teacher=exact where the law of the data is known"
        )
    if isinstance(teacher, str):
        if teacher != "exact":
            raise InputError(
                f"teacher is {teacher!r}, a name: give the denoiser itself, diffrl.load({teacher!r}).denoiser"
            )
        if data is None:
            raise InputError("teacher is 'exact', the denoiser of the data: give them too, as data=...")
        return exact_x0_law(process, data, device).mean
    if not isinstance(teacher, nn.Module) and not callable(teacher):
        raise InputTypeError(f"teacher is a {type(teacher).__name__}: give a denoiser, or 'exact'")
    theirs = getattr(teacher, "process", process)
    if not same_states(process, theirs):
        raise InputError(
            f"teacher is of {theirs}, and what is trained of {process}: give one of that process"
        )
    found: DenoiserFn = teacher
    return found


def same_states(mine: Schedule, theirs: Schedule) -> bool:
    """Whether states and times of two processes mean the same; grids of EDM may have other ends."""
    return repr(mine) == repr(theirs) or (isinstance(mine, EDM) and isinstance(theirs, EDM))
