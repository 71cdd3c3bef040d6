"""Features by name, in which samples are compared with data: the library's, and any callable of the user's."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffrl.diffusion.networks.digits_cnn import digits_cnn
from diffrl.errors import FileError, InputError
from diffrl.extras import require
from diffrl.metrics.reference_statistics import Features
from diffrl.registry import Registry

__all__ = ["FEATURES", "digits_features", "named_features", "takes_weights"]

FEATURES = Registry("features", "diffrl.metrics.features", omit=("weights",))
"""Constructors of features: with no argument, or the file of their weights, to a callable [N, *E] → [N, F]."""

PART = 2048  # samples that a callable is given at once
INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"


@torch.no_grad()
def digits_features(x: Tensor) -> Tensor:
    """Features of `digits_cnn`, the classifier of scikit-learn's digits that comes with the library.

    Args:
        x: images in [-1, 1], shape [N, 1, 8, 8].

    Returns:
        float32 [N, 64].

    Raises:
        ValueError: another shape.
    """
    network = digits_cnn(x.device)
    return torch.cat([network.features(part) for part in x.float().split(PART)])


@FEATURES.register("digits_cnn")
def digits_cnn_features() -> Features:
    """`digits_features`: the last hidden layer of a small classifier of 8×8 digits, shipped with the library."""
    return Features("digits_cnn", digits_features, lambda: digits_cnn(torch.device("cpu")).state_dict())


@FEATURES.register("identity")
def identity_features() -> Features:
    """The numbers of a sample themselves, for points in few dimensions."""
    return Features("identity", lambda x: x.flatten(1), dict)


@FEATURES.register("inception")
def inception_features(weights: str | Path | None = None) -> nn.Module:
    """The 2048 features of Inception v3 that FID is defined by, for images of any size; from weights in a file.

    Source: GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash Equilibrium (Heusel et al., 2017),
    https://arxiv.org/abs/1706.08500; network and resizing are those of torch-fidelity.

    Args:
        weights: the file weights-inception-2015-12-05-6726825d.pth of torch-fidelity's releases. Nothing is downloaded.

    Raises:
        ValueError: no file is given.
        FileError: it is missing, or no such weights.
        MissingExtra: torch-fidelity is not installed.
    """
    where = f"{INCEPTION_FILE} of https://github.com/toshas/torch-fidelity/releases"
    if weights is None:
        raise InputError(
            f"features inception need a file of weights, and download none: give its path as `weights`, of {where}"
        )
    path = Path(weights).expanduser()
    if not path.is_file():
        raise FileError(f"{path} is missing: features inception need {where}")
    return Inception(path, where)


class Inception(nn.Module):
    """Inception v3 on images in [-1, 1], shape [N, 1 or 3, H, W], as 8-bit numbers.

    Args:
        path: the weights.
        where: what they should be, for errors.
    """

    def __init__(self, path: Path, where: str) -> None:
        super().__init__()
        made = require("torch_fidelity.feature_extractor_inceptionv3", "inception")
        try:
            torch.load(
                path, map_location="cpu", weights_only=True
            )  # torch-fidelity itself unpickles anything
            self.network = made.FeatureExtractorInceptionV3(
                "inception-v3-compat", ["2048"], feature_extractor_weights_path=str(path)
            )
        except Exception as error:
            said = " ".join(str(error).split())[:100]
            raise FileError(f"{path} holds no weights of Inception v3 ({said}): give {where}") from error

    def forward(self, x: Tensor) -> Tensor:
        """Features [N, 2048].

        Raises:
            ValueError: another shape.
        """
        if x.ndim != 4 or x.shape[1] not in (1, 3):
            raise InputError(f"inception takes images [N, 1 or 3, H, W], not {tuple(x.shape)}")
        x = ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).expand(-1, 3, -1, -1)
        return torch.cat([self.network(part)[0] for part in x.split(64)])


def takes_weights(name: str) -> bool:
    """Whether features of that name are made from a file of weights."""
    return "weights" in inspect.signature(FEATURES[name]).parameters


def named_features(
    name: str, *, weights: str | Path | None = None, device: torch.device | str = "cpu"
) -> Features:
    """Features by the name that they are registered under.

        @FEATURES.register("mine")
        def mine() -> Callable[[Tensor], Tensor]: ...  # a module, or any callable: [N, *E] → [N, F]

    A module is put in eval mode and on `device`; other callables get their samples on the CPU.

    Args:
        name: in `FEATURES`.
        weights: file of the weights of features that take one.
        device: where modules compute.

    Raises:
        ValueError: an unknown name, or something registered that cannot be called.
    """
    made: Any = FEATURES[name](**({"weights": weights} if takes_weights(name) else {}))
    if isinstance(made, Features):
        return made
    if not callable(made):
        raise InputError(f"features {name} made {made!r}: register a function that returns a callable")
    place = torch.device("cpu")
    if isinstance(made, nn.Module):
        place, made = torch.device(device), made.to(device).eval()

    def state() -> dict[str, Tensor]:
        if not isinstance(made, nn.Module):
            raise InputError(
                f"features {name} are no module, so that kept statistics cannot be told apart by its "
                "weights: leave `statistics` out"
            )
        return made.state_dict()

    return Features(name, _in_parts(name, made, place), state)


def _in_parts(
    name: str, compute: Callable[[Tensor], Tensor], device: torch.device
) -> Callable[[Tensor], Tensor]:
    """The callable on large sets, without gradient, its shape checked."""

    @torch.no_grad()
    def computed(x: Tensor) -> Tensor:
        f = torch.cat([compute(part.to(device)).cpu() for part in x.split(PART)])
        if f.ndim != 2 or len(f) != len(x):
            raise InputError(f"features {name} of {len(x)} samples have shape {tuple(f.shape)}: give [N, F]")
        return f

    return computed
