"""Mean and covariance of a set's features, computed once, kept in a file, and checked when they are read again."""

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from diffrl.errors import InputError
from diffrl.text_files import file_errors, write_atomically

__all__ = ["Features", "Statistics", "frechet", "kept_statistics"]


class Features(NamedTuple):
    """A network's features of samples.

    Args:
        name: of the network.
        compute: samples [N, *E] → features [N, F].
        weights: what the network's weights are, by name.
    """

    name: str
    compute: Callable[[Tensor], Tensor]
    weights: Callable[[], Mapping[str, Tensor]]


@dataclass(frozen=True, eq=False)
class Statistics:
    """What the Fréchet distance knows of a set: m, and U with UᵀU = C, the covariance by n - 1.

    Args:
        mean: m, float64 [F].
        root: U, float64 [min(n, F), F].
    """

    mean: Tensor
    root: Tensor

    @classmethod
    def of(cls, f: Tensor) -> "Statistics":
        """Of features [n, F], n ≥ 2.

        Raises:
            ValueError: fewer than two.
        """
        if len(f) < 2:
            raise InputError(f"a covariance needs at least 2 samples, not {len(f)}")
        f = f.double()
        root = torch.linalg.qr((f - f.mean(0)) / math.sqrt(len(f) - 1), mode="r").R
        return cls(f.mean(0), root)


def frechet(x: Statistics, y: Statistics) -> float:
    """Squared Fréchet distance of two Gaussians; see `diffrl.metrics.frechet_distance`."""
    cross = torch.linalg.svdvals(x.root @ y.root.T).sum()
    distance = (x.mean - y.mean).square().sum() + x.root.square().sum() + y.root.square().sum() - 2 * cross
    return max(float(distance), 0.0)


def kept_statistics(features: Features, y: Tensor, folder: str | Path) -> Statistics:
    """The statistics of a reference set: read if they are in the folder, computed and written there if not.

    The file is named by a hash of the samples and of the features, and holds both and a hash of its own numbers. What
    does not agree is refused, never computed anew in silence.

    Args:
        features: of what.
        y: reference samples, [n, *E].
        folder: where; it is made if need be.

    Raises:
        ValueError: the file is damaged, or of other data or features.
        FileError: it cannot be read or written.
    """
    about = {"data": _hash({"": y}), "features": f"{features.name} {_hash(features.weights())}"}
    key = hashlib.sha256(f"{about}".encode()).hexdigest()[:16]
    path = Path(folder).expanduser() / f"{features.name}-{key}.safetensors"
    with file_errors(path):
        found = path.read_bytes() if path.exists() else None
    if found is not None:
        return _read(found, about, path)
    statistics = Statistics.of(features.compute(y).cpu())
    tensors = {name: a.contiguous() for name, a in vars(statistics).items()}
    with file_errors(path, "written"):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, safetensors.torch.save(tensors, {**about, "content": _hash(tensors)}))
    return statistics


def _read(raw: bytes, about: Mapping[str, str], path: Path) -> Statistics:
    """What a file holds, if it is about these data and features."""
    damaged = InputError(
        f"{path} is damaged, or of other data or features: remove it, and it is computed anew"
    )
    try:
        tensors = safetensors.torch.load(raw)
        size = int.from_bytes(
            raw[:8], "little"
        )  # a safetensors file begins with the length of its header, in JSON
        header = json.loads(raw[8 : 8 + size]).get("__metadata__")
    except (SafetensorError, ValueError) as error:
        raise damaged from error
    if {*tensors} != {"mean", "root"} or header != {**about, "content": _hash(tensors)}:
        raise damaged
    return Statistics(**tensors)


def _hash(tensors: Mapping[str, Tensor]) -> str:
    """16 hexadecimal digits of SHA-256 of names, dtypes, shapes and bytes."""
    digest = hashlib.sha256()
    for name, a in sorted(tensors.items()):
        digest.update(f"{name}{a.dtype}{tuple(a.shape)}".encode())
        digest.update(a.detach().cpu().contiguous().numpy().data)
    return digest.hexdigest()[:16]
