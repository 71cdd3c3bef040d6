"""LPIPS, the distance of images by the features of VGG-16, with weights from a folder on this machine."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal

import safetensors.torch
import torch
from torch import Tensor
from torch.nn import functional as F

from diffrl.errors import FileError, InputError
from diffrl.text_files import file_errors

__all__ = ["LPIPS", "read_tensors"]

STAGES = (
    (0, 2),
    (5, 7),
    (10, 12, 14),
    (17, 19, 21),
    (24, 26, 28),
)  # convolutions of VGG-16, by torchvision's numbers
SHIFT, SCALE = (
    (-0.030, -0.088, -0.188),
    (0.458, 0.448, 0.450),
)  # ImageNet's mean and std for images in [-1, 1]
EPS = 1e-10
SIDE, LARGE = 224, 256


class LPIPS:
    """The distance of images by normalised features of VGG-16.

        d(x, y) = Σ_l mean over pixels of Σ_c w_lc (φ̂_lc(x) - φ̂_lc(y))²,    φ̂_l = φ_l/(‖φ_l‖₂ + 1e-10)

    φ_l are the features of VGG-16 behind the last ReLU of each of its five stages, normalised over their channels.
    Images lower than 256 pixels are first resized to 224 × 224 (bilinear), gray ones repeated to three channels.

    Source: The Unreasonable Effectiveness of Deep Features as a Perceptual Metric (Zhang et al., 2018), eq. 1,
    https://arxiv.org/abs/1801.03924, version 0.1 of its weights. Consistency Models (Song et al., 2023), Appendix C,
    https://arxiv.org/abs/2303.01469, resize so, and their code takes means where VGG-16 takes maxima.

    Args:
        weights: tensors ``features.N.weight``, ``features.N.bias`` of the 13 convolutions, and ``linL.model.1.weight``,
            L = 0 ... 4, each [1, C_L, 1, 1], none below 0.
        pooling: "mean" as in the code of Consistency Models, or "max" as in LPIPS itself.
        resize: whether images lower than 256 pixels are resized.

    Raises:
        ValueError: a tensor is missing or does not fit, or an unknown word for pooling.
    """

    def __init__(
        self, weights: Mapping[str, Tensor], *, pooling: Literal["mean", "max"] = "mean", resize: bool = True
    ) -> None:
        if pooling not in ("mean", "max"):
            raise InputError(f"pooling is {pooling!r}: give mean or max")
        self._pool = F.avg_pool2d if pooling == "mean" else F.max_pool2d
        self._resize = resize
        names = [f"features.{n}.{part}" for stage in STAGES for n in stage for part in ("weight", "bias")]
        names += [f"lin{l}.model.1.weight" for l in range(len(STAGES))]
        if missing := [name for name in names if name not in weights]:
            raise InputError(
                f"LPIPS lacks {missing[0]}: give the weights of torchvision's vgg16 and of LPIPS's vgg"
            )
        self._weights = {name: weights[name].detach().float() for name in names}
        for l, stage in enumerate(STAGES):
            channels, w = self._weights[f"features.{stage[-1]}.weight"].shape[0], self._weights[names[-5 + l]]
            if w.shape != (1, channels, 1, 1) or bool((w < 0).any()):
                raise InputError(
                    f"LPIPS has {names[-5 + l]} of shape {tuple(w.shape)}: it takes {channels} numbers ≥ 0"
                )

    @classmethod
    def load(cls, folder: str | Path) -> "LPIPS":
        """From the .safetensors and .pth files of a folder, torchvision's vgg16-397923af.pth and LPIPS's vgg.pth.

        Raises:
            FileError: there is no such folder or file, one is damaged, or they lack a part.
        """
        folder = Path(folder).expanduser()
        files = sorted(file for file in folder.glob("*") if file.suffix in (".pth", ".safetensors"))
        if not files:
            raise FileError(
                f"{folder} holds no .pth or .safetensors: put VGG-16's weights (torchvision's vgg16) and LPIPS's own "
                "(vgg.pth of the packages lpips or torchmetrics) there; diffrl downloads nothing"
            )
        found: dict[str, Tensor] = {}
        for file in files:
            found |= read_tensors(file)
        try:
            return cls(found)
        except InputError as error:
            raise FileError(f"{folder}: {error}") from error

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        """Distances of images [B, K, C, H, W] in [-1, 1], C ∈ {1, 3}: [B, K].

        Raises:
            ValueError: samples of another shape.
        """
        if x.shape != y.shape or x.ndim != 5 or x.shape[2] not in (1, 3):
            raise InputError(
                f"metric lpips takes images of 1 or 3 channels, not samples of {tuple(x.shape[2:])}"
            )
        like = next(iter(self._weights.values()))
        if (like.device, like.dtype) != (x.device, x.dtype):
            self._weights = {name: w.to(x) for name, w in self._weights.items()}
        d = x.new_zeros(x.shape[:2])
        parts = (self._features(part.flatten(0, 1)) for part in (x, y))
        for l, (phi_x, phi_y) in enumerate(zip(*parts, strict=True)):
            w = self._weights[f"lin{l}.model.1.weight"]
            square = (_normalised(phi_x) - _normalised(phi_y)).square()
            d = d + (w * square).sum(1).mean((1, 2)).reshape(d.shape)
        return d

    def _features(self, x: Tensor) -> Iterator[Tensor]:
        """φ_0 ... φ_4 of images [n, C, H, W]."""
        if self._resize and x.shape[2] < LARGE:
            x = F.interpolate(x, size=(SIDE, SIDE), mode="bilinear", align_corners=False)
        shift, scale = (x.new_tensor(values)[:, None, None] for values in (SHIFT, SCALE))
        x = (x - shift) / scale  # one channel becomes three
        for l, stage in enumerate(STAGES):
            x = self._pool(x, 2) if l else x
            for n in stage:
                kernel, bias = (self._weights[f"features.{n}.{part}"] for part in ("weight", "bias"))
                x = F.conv2d(x, kernel, bias, padding=1).relu()
            yield x


def _normalised(phi: Tensor) -> Tensor:
    """φ/(‖φ‖₂ + 1e-10), over the channels; its gradient is finite where φ is 0."""
    square = phi.square().sum(1, keepdim=True)
    norm = torch.where(square > 0, square, 1).sqrt() * (square > 0)
    return phi / (norm + EPS)


def read_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors or .pth file by name, on the CPU; no code in it is run.

    Raises:
        FileError: it is missing, damaged, or holds something else.
    """
    with file_errors(file):
        raw = file.suffix == ".safetensors"
        try:
            found = safetensors.torch.load_file(file) if raw else torch.load(file, "cpu", weights_only=True)
        except OSError:
            raise
        except Exception as error:  # whatever a decoder says of damaged bytes
            raise FileError(
                f"{file} is damaged or holds no tensors ({type(error).__name__}): copy it again"
            ) from error
    if not isinstance(found, Mapping):
        raise FileError(f"{file} holds no table of tensors: copy it again")
    return {name: x for name, x in found.items() if isinstance(x, Tensor)}
