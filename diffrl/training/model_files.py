"""A model as one file, to hand over: weights and a description of the denoiser, without data, optimiser or pickle.

The file is in the safetensors format. Its metadata hold a JSON text under the name ``diffrl``:

    format        1
    process       name in the registry and numbers of the noise schedule
    network       the same of the network; null for one that is no network of the registry
    denoiser      sigma_data, prediction_type, time_input, scale_input; prior, if it is not the standard one
    event_shape   of a sample
    num_classes   labels that the network takes; 0: none
    dtype         of the parameters
"""

import inspect
import json
from dataclasses import fields
from pathlib import Path
from textwrap import shorten
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from diffrl.diffusion.denoisers import Denoiser
from diffrl.diffusion.networks.registry import NETWORKS, build_network
from diffrl.diffusion.schedules.registry import PROCESSES
from diffrl.errors import FileError, InputError, InputTypeError
from diffrl.shapes import require_finite_weights
from diffrl.text_files import file_errors, write_atomically
from diffrl.training.build import Events

__all__ = [
    "SUFFIX",
    "denoiser_of",
    "describe",
    "events_of",
    "read_model",
    "read_tensors",
    "save",
    "tensors_of",
]

SUFFIX = ".safetensors"
_FORMAT = 1
_OPTIONS = ("sigma_data", "prediction_type", "time_input", "scale_input")
_PRIOR = "prior"
_DTYPES = {"float32": torch.float32, "float64": torch.float64}


def save(denoiser: Denoiser, path: str | Path, *, event_shape: tuple[int, ...] | None = None) -> Path:
    """Write a denoiser as one safetensors file, for `diffrl.load`.

    >>> import tempfile, diffrl
    >>> denoiser = diffrl.Denoiser(diffrl.networks.MLP((2,), hidden=8), diffrl.EDM(sigma_max=50.0))
    >>> path = diffrl.save(denoiser, f"{tempfile.mkdtemp()}/model.safetensors")
    >>> model = diffrl.load(path)
    >>> model.denoiser.process, model.sample(4, num_steps=5).shape
    (EDM(sigma_min=0.002, sigma_max=50.0, rho=7.0), torch.Size([4, 2]))

    Args:
        denoiser: D; a process and a network of the registries are described, so that loading builds them again (a
            network by its attribute ``options``; one that a configuration made by its name and options). Another
            network of your own is given again to `diffrl.load`.
        path: the file; its name ends with .safetensors.
        event_shape: *E of a sample, where the network does not tell it by an attribute of that name.

    Returns:
        The path.

    Raises:
        InputTypeError: it is no `diffrl.Denoiser`; one that is exact has nothing to hand over.
        InputError: a process that is not registered, no event shape, or another ending of the name.
        FileError: the file cannot be written; one that was there is as it was.
    """
    path = Path(path)
    if path.suffix != SUFFIX:
        raise InputError(f"{path} is to hold a model: give it a name that ends with {SUFFIX}")
    description = describe(denoiser, event_shape)
    raw = safetensors.torch.save(tensors_of(denoiser), {"diffrl": json.dumps(description)})
    with file_errors(path, "written"):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, raw)
    return path


def describe(denoiser: Denoiser, event_shape: tuple[int, ...] | None = None) -> dict[str, Any]:
    """What a file says of a denoiser, see the head of this page.

    Raises:
        InputTypeError, InputError: see `save`.
    """
    denoiser = getattr(denoiser, "_orig_mod", denoiser)  # of torch.compile
    if not isinstance(denoiser, Denoiser):
        raise InputTypeError(
            f"denoiser is a {type(denoiser).__name__}: give a diffrl.Denoiser(network, process)"
        )
    network, process = getattr(denoiser.network, "_orig_mod", denoiser.network), denoiser.process
    shape = event_shape or getattr(network, "event_shape", None)
    if shape is None:
        raise InputError("the network has no attribute event_shape: give event_shape, the shape of a sample")
    return {
        "format": _FORMAT,
        "process": {
            "name": PROCESSES.name_of(process),
            **{field.name: getattr(process, field.name) for field in fields(process) if field.init},  # type: ignore[arg-type]
        },
        "network": _network_options(network),
        "denoiser": {**{name: getattr(denoiser, name) for name in _OPTIONS}, **_prior(denoiser)},
        "event_shape": list(shape),
        "num_classes": int(getattr(network, "num_classes", 0)),
        "dtype": "float64" if _dtype(denoiser) == torch.float64 else "float32",
    }


def tensors_of(denoiser: nn.Module) -> dict[str, Tensor]:
    """The weights of a denoiser, compiled or not, as a file holds them."""
    options: dict[str, Any] = {
        "copy": True,
        "memory_format": torch.contiguous_format,
    }  # tied ones may not share
    return {
        name.replace("_orig_mod.", ""): x.detach().to("cpu", **options)
        for name, x in denoiser.state_dict().items()
    }


def _prior(denoiser: Denoiser) -> dict[str, str]:
    """Its kind, where it is not the standard one, of which older versions know nothing."""
    return {} if denoiser.prior is None else {_PRIOR: denoiser.prior.kind}


def events_of(description: dict[str, Any]) -> Events:
    """What the network of a description is built for."""
    shares = tuple(description.get("class_shares", ()))
    return Events(tuple(description["event_shape"]), description["num_classes"], shares)


def read_model(path: Path, network: nn.Module | None = None) -> tuple[Denoiser, dict[str, Any]]:
    """The denoiser of a model file and its description.

    Args:
        path: the file.
        network: what the weights go into; None: the network that the file describes.

    Raises:
        FileError: it cannot be read, is damaged, or is no model of diffrl.
        InputError: the network is needed and not given, or does not fit.
    """
    tensors, text = read_tensors(path)
    if text is None:
        raise FileError(
            f"{path} holds weights, but no model of diffrl.save: load them into a network yourself"
        )
    try:
        description = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FileError(f"{path} is damaged ({error}): get the file again") from error
    return denoiser_of(description, tensors, network, path), description


def read_tensors(path: Path) -> tuple[dict[str, Tensor], str | None]:
    """The tensors of a safetensors file, and what its metadata say under the name ``diffrl``.

    Raises:
        FileError: it cannot be read, or is damaged.
    """
    with file_errors(path):
        raw = path.read_bytes()
    try:
        tensors = safetensors.torch.load(raw)
        size = int.from_bytes(raw[:8], "little")
        return tensors, json.loads(raw[8 : 8 + size]).get("__metadata__", {}).get("diffrl")
    except (safetensors.SafetensorError, ValueError, RecursionError) as error:
        raise FileError(f"{path} is damaged ({error}): get the file again") from error


def denoiser_of(
    description: Any, tensors: dict[str, Tensor], network: nn.Module | None, path: Path
) -> Denoiser:
    """The denoiser of a description and its weights, in the dtype that is described; errors name the path.

    See `read_model`.
    """
    if not isinstance(description, dict) or "format" not in description:
        raise FileError(f"{path} is no model of diffrl: there is no format in its description")
    if description.get("format") != _FORMAT:
        raise FileError(
            f"{path} has format {description.get('format')}, and this diffrl reads {_FORMAT}: upgrade diffrl"
        )
    if network is None:
        _require_network(description.get("network"), path)
    try:
        denoiser = _build(description, network)
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise FileError(
            f"the description in {path} cannot be followed ({' '.join(str(error).split())}): get the file again"
        ) from error
    dtype = _DTYPES[
        description["dtype"]
    ]  # what was stored in half precision is computed in this all the same
    tensors = {name: x.to(dtype) if x.is_floating_point() else x for name, x in tensors.items()}
    try:
        denoiser.load_state_dict(tensors, assign=network is None)
    except RuntimeError as error:
        said = shorten(str(error), 300)
        raise InputError(f"the weights in {path} are of another network: {said}") from error
    require_finite_weights(denoiser, str(path))
    return denoiser


def _build(description: dict[str, Any], network: nn.Module | None) -> Denoiser:
    """The denoiser that is described; a network that is not given has no weights yet."""
    if network is None:
        shape, num_classes, _ = events_of(description)
        shipped = NETWORKS.entry(description["network"]["name"]).module.startswith("diffrl.")
        # meta: no memory is taken before declared sizes meet the weights; a user's may hold more than weights
        with torch.device("meta") if shipped else torch.random.fork_rng(devices=[]):
            network = build_network(description["network"], event_shape=shape, num_classes=num_classes)
    options = {name: description["denoiser"][name] for name in _OPTIONS} | description["denoiser"]
    denoiser = Denoiser(network, PROCESSES.build(description["process"]), **options)
    return denoiser.to(torch.float64) if _DTYPES[description["dtype"]] == torch.float64 else denoiser


def _require_network(described: Any, path: Path) -> None:
    """Refuse what only its author can build, or whose module was not imported."""
    if described is None:
        raise InputError(
            f"{path} holds a network of its author's own: build it, and give it as diffrl.load(path, network=...)"
        )
    name = described.get("name") if isinstance(described, dict) else None
    if isinstance(name, str) and name not in NETWORKS:
        raise InputError(
            f"{path} holds a network of its author's own, {name!r}: import the module that registers it, on the "
            "command line by --import MODULE, or give it as diffrl.load(path, network=...)"
        )


def _network_options(network: nn.Module) -> dict[str, Any] | None:
    """Name and options of a network of the registry; None of another, or of one that does not tell its options."""
    options = getattr(network, "options", None)
    for entry in NETWORKS.entries():
        if entry.make is type(network) and options is not None:
            names = [n for n in inspect.signature(entry.make).parameters if n not in NETWORKS.omit]
            return {"name": entry.name, **{name: options[name] for name in names}}
    made_from: dict[str, Any] | None = getattr(network, "made_from", None)
    return made_from


def _dtype(denoiser: Denoiser) -> torch.dtype:
    return next((p.dtype for p in denoiser.parameters()), torch.float32)
