"""The teacher that an objective names: a trained denoiser, loaded once and frozen; a run keeps a copy of it."""

from pathlib import Path

from diffrl.diffusion.denoisers import Denoiser
from diffrl.registry import Config
from diffrl.training.model_files import SUFFIX, save
from diffrl.training.runs import RunFolder, load

__all__ = ["keep_teacher", "load_teacher", "named_teacher"]


def named_teacher(objective: Config) -> str | None:
    """The run folder or model file that ``objective.teacher`` names; None where there is none, or it is "exact"."""
    teacher = objective.get("teacher")
    return None if teacher in (None, "exact") else str(teacher)


def load_teacher(source: str, student: Denoiser, *, kept: Path | None = None, name: str = "") -> Denoiser:
    """The averaged denoiser of a trained run, or that of a model file: frozen, in evaluation mode.

    Args:
        source: a run folder, or a model file of `diffrl.save`.
        student: what is trained: the teacher goes to its device and dtype.
        kept: folder of a run that goes on: its copy is taken, where it has one.
        name: of the objective in that run.

    Raises:
        RunFolderError, CheckpointError, FileError: see `diffrl.load`.
    """
    copied = None if kept is None else _place(kept, name)
    path: str | Path = source if copied is None or not copied.exists() else copied
    like = next(student.parameters())
    return load(path).denoiser.to(like.device, like.dtype).requires_grad_(False).eval()


def keep_teacher(folder: RunFolder, name: str, teacher: Denoiser | None) -> None:
    """Write what an objective learns from into the run's folder, once, so that it goes on without the source."""
    file = _place(folder.path, name)
    if teacher is not None and not file.exists():
        save(teacher, file)


def _place(path: Path, name: str) -> Path:
    return path / "teachers" / f"{name}{SUFFIX}"
