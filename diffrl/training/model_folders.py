"""A model as a folder, as Hugging Face's libraries have it: weights in safetensors, a description, a card to read.

config.json                   the description of `diffrl.training.model_files`, and how the model is sampled
model.safetensors             the weights; of a training run those that were averaged
model.non_ema.safetensors     of a training run: the weights of its last step, to train on from
README.md                     the model card
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor, nn

from diffrl.diffusion.denoisers import Denoiser
from diffrl.diffusion.pipelines.unconditional import import_pipeline
from diffrl.diffusion.samplers.registry import SAMPLERS
from diffrl.errors import FileError, InputError
from diffrl.text_files import new_folder, read_json, write_atomically
from diffrl.training.model_files import denoiser_of, describe, read_tensors, tensors_of

__all__ = ["FILES", "from_pretrained", "is_model_folder", "read_folder", "write_folder"]

CONFIG, CARD, PIPELINE = "config.json", "README.md", "model_index.json"
FILES = {"ema": "model.safetensors", "model": "model.non_ema.safetensors"}
"""The file of each set of weights, by the name that it has in a run."""


def from_pretrained(
    folder: str | Path, *, weights: str = "ema", network: nn.Module | None = None
) -> Denoiser:
    """The denoiser in a folder that `diffrl.save_pretrained` wrote, or in that of a diffusers pipeline of images.

    >>> import tempfile, diffrl
    >>> folder = diffrl.save_pretrained(diffrl.Denoiser(diffrl.networks.MLP((2,)), diffrl.EDM()), tempfile.mkdtemp())
    >>> denoiser = diffrl.from_pretrained(folder)
    >>> diffrl.sample(denoiser, (4, 2), sampler=diffrl.Heun(), num_steps=5, seed=0).shape
    torch.Size([4, 2])

    `diffrl.load` takes such a folder too, and draws with the sampler and the labels that it tells. Neither needs the
    data, touches the network, or runs anything that a file says.

    Args:
        folder: on this machine.
        weights: "ema", or "model": of a training run, those of its last step.
        network: what the weights go into, where it is one of your own; None: the network that is described.

    Returns:
        The denoiser, in eval mode; its network tells `event_shape`, the shape of a sample, where it is one of diffrl's.

    Raises:
        FileError: there is no such folder, a file is missing or damaged, or it is no model of diffrl.
        InputError: other weights than the folder has, a network that is needed and not given, or does not fit.
        MissingExtra: its network is diffusers', which is not installed.
    """
    return read_folder(Path(folder), weights, network)[0]


def is_model_folder(path: Path) -> bool:
    """Whether it is for `from_pretrained`."""
    return any((path / name).is_file() for name in (CONFIG, PIPELINE))


def read_folder(
    path: Path, weights: str = "ema", network: nn.Module | None = None
) -> tuple[Denoiser, dict[str, Any]]:
    """The denoiser of a folder and its description; see `from_pretrained`."""
    if weights not in FILES:
        raise InputError(f"weights is {weights!r}: give {' or '.join(map(repr, FILES))}")
    if not path.is_dir():
        raise FileError(
            f"{path} is no folder on this machine, and nothing is downloaded: give one that is here"
        )
    if (path / PIPELINE).is_file():
        if weights != "ema" or network is not None:
            raise InputError(f"{path} is a pipeline of diffusers: it has one network and one set of weights")
        denoiser = import_pipeline(path)
        return denoiser, describe(denoiser)
    if not (path / CONFIG).is_file():
        if all((path / part).is_dir() for part in ("unet", "scheduler")):
            raise FileError(
                f"{path} holds parts of diffusers without a {PIPELINE}, as the export of a model of process=edm has "
                "them; diffrl loads what diffrl.save_pretrained and `diffrl export RUN FOLDER --to diffrl` wrote"
            )
        raise FileError(
            f"{path} holds no {CONFIG}: give what diffrl.save_pretrained wrote; diffrl.load takes a run folder"
        )
    file, description = path / FILES[weights], read_json(path / CONFIG)
    if weights == "model" and not file.is_file():
        raise InputError(f"{path} has one set of weights, and no {file.name}: give weights='ema'")
    denoiser = denoiser_of(description, read_tensors(file)[0], network, path).eval()
    _require_sampling(description, path)
    return denoiser, description


def _require_sampling(description: Mapping[str, Any], path: Path) -> None:
    """Refuse a sampler or shares of classes that cannot be, now and not when samples are drawn."""
    try:
        if "sampler" in description:
            SAMPLERS.build(description["sampler"])
        shares = [float(share) for share in description.get("class_shares", ())]
        if shares and (len(shares) != description["num_classes"] or not 0.99 < sum(shares) < 1.01):
            raise InputError(f"class_shares is {shares}")
    except (KeyError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise FileError(f"{path / CONFIG} cannot be followed ({reason}): get the file again") from error


def write_folder(
    folder: Path,
    denoiser: Denoiser,
    description: Mapping[str, Any],
    card: str,
    unaveraged: Mapping[str, Tensor] | None = None,
) -> None:
    """Write a model as a new folder; the description comes last, so that half a folder is no model.

    Args:
        folder: a new one, or one that is empty.
        denoiser: whose weights are written.
        description: of `describe`, and more.
        card: for README.md.
        unaveraged: the weights of the last step, where those of the denoiser are averaged.

    Raises:
        InputError: the folder holds something.
        FileError: it cannot be written.
    """
    weights = {"ema": tensors_of(denoiser)} | ({} if unaveraged is None else {"model": {**unaveraged}})
    with new_folder(folder):
        for name, tensors in weights.items():
            write_atomically(folder / FILES[name], safetensors.torch.save(tensors, {"format": "pt"}))
        write_atomically(folder / CARD, card)
        write_atomically(folder / CONFIG, json.dumps(description, indent=2) + "\n")
