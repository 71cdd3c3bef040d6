"""To start from a trained model: its weights go into the denoiser of a new run, which keeps a copy of them."""

import re
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError

from diffrl.diffusion.denoisers import Denoiser
from diffrl.diffusion.schedules.edm import EDM
from diffrl.errors import FileError, InputError
from diffrl.text_files import file_errors, write_atomically
from diffrl.training.runs import RunFolder, load

__all__ = ["keep_start", "start_from", "take_kept_start"]

FORM = ("prediction_type", "sigma_data", "time_input", "scale_input")
"""What the weights of a denoiser mean something with."""


def start_from(denoiser: Denoiser, source: str, weights: str = "ema") -> None:
    """Give a denoiser the weights of a trained one, and leave that as it is.

    Args:
        denoiser: of the new run.
        source: a run folder, or a model file of `diffrl.save`.
        weights: of a run, "ema", the averaged ones that are evaluated, "model", those of its last step, or those of
            another half-life, such as "ema_500000".

    Raises:
        InputError: they are of another network, process or form. As exceptions, processes of EDM may have other ends,
            and the forms "edm" and "consistency" start from each other, as published.
        RunFolderError, CheckpointError, FileError: see `diffrl.load`.
    """
    if not re.fullmatch(r"model|ema(_\d+)?", weights):
        raise InputError(f"init_weights is {weights!r}: give 'ema' or 'model', or 'ema_500000' of ema.also")
    trained = load(source, weights=weights).denoiser
    _refuse_another_form(denoiser, trained, source)
    _take(denoiser, trained.state_dict(), source)


def keep_start(folder: RunFolder, denoiser: Denoiser) -> None:
    """Write what a run starts from into its folder, once, so that it goes on without the source."""
    file = _kept(folder.path)
    if file.exists():
        return
    tensors = {name: x.detach().cpu().clone().contiguous() for name, x in denoiser.state_dict().items()}
    write_atomically(file, safetensors.torch.save(tensors))


def take_kept_start(denoiser: Denoiser, path: Path) -> bool:
    """Give a denoiser what the run in a folder started from; False where the run was stopped before it was kept.

    Raises:
        FileError: it is damaged.
        InputError: it is of another network.
    """
    file = _kept(path)
    if not file.exists():
        return False
    with file_errors(file):
        raw = file.read_bytes()
    try:
        tensors = safetensors.torch.load(raw)
    except SafetensorError as error:
        raise FileError(f"{file} is damaged ({error}): restore it from a copy") from error
    _take(denoiser, tensors, str(file))
    return True


def _kept(path: Path) -> Path:
    return path / "init.safetensors"


def _take(denoiser: Denoiser, weights: dict[str, torch.Tensor], source: str) -> None:
    try:
        denoiser.load_state_dict(weights)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise InputError(
            f"init is {source}, whose weights are of another network: give its network options ({reason[:120]} ...)"
        ) from error


def _refuse_another_form(denoiser: Denoiser, trained: Denoiser, source: str) -> None:
    """Weights that fit may still predict something else."""
    mine, theirs = denoiser.process, trained.process
    if repr(mine) != repr(theirs) and not (isinstance(mine, EDM) and isinstance(theirs, EDM)):
        raise InputError(
            f"init is {source}, trained on {theirs}, and this run is on {mine}: give its process"
        )
    for name in FORM:
        now, then = getattr(denoiser, name), getattr(trained, name)
        if now != then and {now, then} != {"edm", "consistency"}:
            raise InputError(
                f"init is {source}, trained with denoiser.{name}={then}: give that too, not {now}"
            )
    heads, others = _heads(denoiser), _heads(trained)
    if len(heads) == len(others) and heads != others:  # else the weights do not fit
        raise InputError(
            f"init is {source}, whose attention has heads {others}, and this run's {heads}: give its network options"
        )


def _heads(denoiser: Denoiser) -> list[int]:
    """Heads of each attention, here and in diffusers: no weight has a shape that tells them."""
    heads = (getattr(module, "heads", None) for module in denoiser.network.modules())
    return [n for n in heads if isinstance(n, int)]
