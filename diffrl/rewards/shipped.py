"""Rewards that come with the library: for digits and other images in [-1, 1], for points, and one that fails."""

import io
import math
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from diffrl.data.dataset_all import digits
from diffrl.data.mixtures import Mixture
from diffrl.diffusion.networks.digits_cnn import DigitsCNN, load_digits_cnn
from diffrl.extras import require
from diffrl.rewards.workers import Reward

__all__ = [
    "REWARDS",
    "Brightness",
    "ClassNeighbours",
    "ClassProbability",
    "Faulty",
    "Ink",
    "JpegCompressibility",
    "ModeDistance",
    "Symmetry",
    "ZlibCompressibility",
]


@cache
def _digits_cnn(device: torch.device) -> DigitsCNN:
    return load_digits_cnn().to(device)


@dataclass(frozen=True, eq=False)
class ClassProbability:
    """Probability that a classifier gives to a class: p(y | x) = softmax(logits(x))_y, in (0, 1), or its log.

    Args:
        target: y; None takes each sample's own condition, its label [N].
        log: give log p(y | x) ≤ 0, which still tells samples apart where p is near 0.
        classifier: x [N, *E] → logits [N, C], in the mode it is in; None: `digits_cnn`, for images [N, 1, 8, 8].

    Raises:
        ValueError: a target outside the classifier's classes; when called, no label to take.
    """

    target: int | None = None
    log: bool = False
    classifier: nn.Module | None = None

    def __post_init__(self) -> None:
        if self.target is not None and self.target < 0:
            raise ValueError(f"target is {self.target}: classes are numbered from 0")

    def __call__(self, x0: Tensor, cond: Any = None) -> Tensor:
        """Of samples [N, *E]: floats [N]."""
        if self.target is not None:
            y = torch.full((len(x0),), self.target, device=x0.device)
        elif (
            isinstance(cond, Tensor)
            and cond.shape in ((len(x0),), (len(x0), 1))
            and not cond.is_floating_point()
        ):
            y = cond.reshape(-1).to(x0.device)
        else:
            raise ValueError(
                "no class to take the probability of: give target, or labels [N] as the condition"
            )
        classifier = _digits_cnn(x0.device) if self.classifier is None else self.classifier
        log_p = classifier(x0 if self.classifier is not None else x0.float()).log_softmax(-1)
        if len(x0) and not 0 <= int(y.min()) <= int(y.max()) < log_p.shape[1]:
            raise ValueError(
                f"the classifier has classes 0..{log_p.shape[1] - 1}, not all of {y.unique().tolist()}"
            )
        log_p_y = log_p.gather(1, y.long()[:, None])[:, 0]
        return log_p_y if self.log else log_p_y.exp()


@cache
def _labelled_digits() -> tuple[Tensor, Tensor]:
    data = digits(conditional=True)
    assert data.train is not None and data.train_labels is not None
    return data.train, data.train_labels


@dataclass(frozen=True)
class ClassNeighbours:
    """Share of the k real digits nearest to an image that are of a class, in [0, 1]: a second opinion on digits.

    It has no weights that a policy could learn to please, so it tells a classifier that is fooled from a digit.

    Args:
        target: the class, 0 to 9.
        k: neighbours, in Euclidean distance, among scikit-learn's training digits.

    Raises:
        ValueError: an argument outside its range; when called, samples that are no 8 × 8 images.
        MissingExtra: when called, scikit-learn is not installed.
    """

    target: int
    k: int = 10

    def __post_init__(self) -> None:
        if not 0 <= self.target <= 9 or self.k < 1:
            raise ValueError(f"target is {self.target} and k {self.k}: give a class in 0..9 and k >= 1")

    def __call__(self, x0: Tensor, cond: Any = None) -> Tensor:
        """Of images [N, 1, 8, 8] in [-1, 1]: floats [N]."""
        if x0.shape[1:] != (1, 8, 8):
            raise ValueError(f"samples have shape {tuple(x0.shape)}: this reward is for digits [N, 1, 8, 8]")
        real, labels = _labelled_digits()
        near = torch.cdist(x0.cpu().float().flatten(1), real.flatten(1)).topk(self.k, largest=False).indices
        return (labels[near] == self.target).float().mean(1).to(x0.device)


@dataclass(frozen=True, eq=False)
class ModeDistance:
    """Minus the squared distance to a point or to a mode: R = -‖x - μ‖², in (-∞, 0].

    Args:
        point: μ, its numbers in the order of the flattened sample.
        index: instead, which mode of `mixture`.
        mixture: the data's law, e.g. ``diffrl.data.rings().mixture``.

    Raises:
        ValueError: neither or both are given, or there is no such mode; when called, a sample of another size.
    """

    point: Sequence[float] | None = None
    index: int | None = None
    mixture: Mixture | None = None
    _mu: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if (self.point is None) == (self.index is None) or (self.index is None) != (self.mixture is None):
            raise ValueError("mode_distance needs a point, or index and mixture: one of the two")
        mu: Any = self.point
        if self.mixture is not None and self.index is not None:
            modes = self.mixture.means
            if not 0 <= self.index < len(modes):
                raise ValueError(f"index is {self.index}, but the mixture has {len(modes)} modes")
            mu = modes[self.index]
        object.__setattr__(self, "_mu", torch.tensor([float(c) for c in mu], dtype=torch.float64))

    def __call__(self, x0: Tensor, cond: Any = None) -> Tensor:
        """Of samples [N, *E]: floats [N]."""
        mu = self._mu.to(x0)
        if mu.shape != (math.prod(x0.shape[1:]),):
            raise ValueError(
                f"the point has {mu.numel()} numbers, but a sample has {math.prod(x0.shape[1:])}"
            )
        return -(x0.flatten(1) - mu).square().sum(1)


@dataclass(frozen=True)
class Brightness:
    """Mean brightness of images: mean over pixels of (clamp(x, -1, 1) + 1)/2, in [0, 1]."""

    def __call__(self, x0: Tensor, cond: Any = None) -> Tensor:
        """Of images [N, *E] in [-1, 1]: floats [N]."""
        return (x0.clamp(-1, 1).flatten(1).mean(1) + 1) / 2


@dataclass(frozen=True)
class Ink:
    """Share of pixels that are brighter than a threshold, in [0, 1]: a reward without gradients.

    Args:
        threshold: in [-1, 1); on digits, 0 is half the strength of a stroke.

    Raises:
        ValueError: a threshold outside the range.
    """

    threshold: float = 0.0

    def __post_init__(self) -> None:
        if not -1 <= self.threshold < 1:
            raise ValueError(f"threshold is {self.threshold}: pixels lie in [-1, 1], so give one in [-1, 1)")

    def __call__(self, x0: Tensor, cond: Any = None) -> Tensor:
        """Of images [N, *E] in [-1, 1]: float32 [N]."""
        return (x0 > self.threshold).flatten(1).float().mean(1)


@dataclass(frozen=True)
class Symmetry:
    """Minus the mean squared difference of an image, cut to [-1, 1], and its mirror image, left to right: ≤ 0."""

    def __call__(self, x0: Tensor, cond: Any = None) -> Tensor:
        """Of images [N, C, H, W] in [-1, 1]: floats [N]."""
        _require_images(x0)
        x = x0.clamp(-1, 1)
        return -(x - x.flip(-1)).square().flatten(1).mean(1)


def _require_images(x0: Tensor) -> None:
    if x0.ndim != 4:
        raise ValueError(f"samples have shape {tuple(x0.shape)}: this reward is for images [N, C, H, W]")


def _bytes_of_images(x0: Tensor) -> np.ndarray:
    """Images in [-1, 1] as uint8 [N, H, W, C]; what lies outside is cut."""
    _require_images(x0)
    pixels = ((x0.detach().float().clamp(-1, 1) + 1) * 127.5).round().byte()
    return pixels.permute(0, 2, 3, 1).contiguous().cpu().numpy()


@dataclass(frozen=True)
class ZlibCompressibility:
    """Minus the size in bytes of an image's 8-bit pixels, compressed by zlib; weight it by -1 for the opposite.

    Args:
        level: of zlib, 1 to 9.

    Raises:
        ValueError: a level outside the range; when called, samples that are no images.
    """

    level: int = 9

    def __post_init__(self) -> None:
        if not 1 <= self.level <= 9:
            raise ValueError(f"level is {self.level}: zlib has levels 1 to 9")

    def __call__(self, x0: Tensor, cond: Any = None) -> list[float]:
        """Of images [N, C, H, W] in [-1, 1]: N floats."""
        return [-float(len(zlib.compress(image.tobytes(), self.level))) for image in _bytes_of_images(x0)]


@dataclass(frozen=True)
class JpegCompressibility:
    """Minus the size in bytes of an image as JPEG; weight it by -1 for the opposite.

    Source: Training Diffusion Models with Reinforcement Learning (Black et al., 2024), section 5,
    https://arxiv.org/abs/2305.13301, in kB there.

    Args:
        quality: of JPEG, 1 to 95.

    Raises:
        ValueError: a quality outside the range; when called, samples that are no grey or colour images.
        MissingExtra: pillow is not installed.
    """

    quality: int = 95

    def __post_init__(self) -> None:
        require("PIL.Image", "data")
        if not 1 <= self.quality <= 95:
            raise ValueError(f"quality is {self.quality}: JPEG has 1 to 95")

    def __call__(self, x0: Tensor, cond: Any = None) -> list[float]:
        """Of images [N, 1 or 3, H, W] in [-1, 1]: N floats."""
        images = _bytes_of_images(x0)
        if images.shape[3] not in (1, 3):
            raise ValueError(f"images have {images.shape[3]} channels: JPEG takes 1 or 3")
        Image = require("PIL.Image", "data")
        sizes = []
        for image in images:
            file = io.BytesIO()
            pixels = image[:, :, 0] if image.shape[2] == 1 else image
            Image.fromarray(pixels).save(file, format="JPEG", quality=self.quality)
            sizes.append(-float(file.tell()))
        return sizes


@dataclass
class Faulty:
    """A reward that fails, to try what a run does then: the mean of each sample, but for one fault a call.

    Args:
        kind: what is wrong: the first number is NaN ("nan"), infinite ("inf") or None ("none"), the numbers have
            shape [N, 1] ("shape"), an "exception" is raised, or the call takes `seconds` ("hang").
        calls: the first so many calls fail, the others don't; None: all fail.
        seconds: that "hang" takes.

    Raises:
        ValueError: an unknown kind.
    """

    kind: Literal["nan", "inf", "none", "shape", "exception", "hang"] = "nan"
    calls: int | None = None
    seconds: float = 60.0

    def __post_init__(self) -> None:
        kinds = ("nan", "inf", "none", "shape", "exception", "hang")
        if self.kind not in kinds:
            raise ValueError(f"kind is {self.kind!r}: give one of {', '.join(kinds)}")
        self._count = 0

    def __call__(self, x0: Tensor, cond: Any = None) -> Any:
        """Of samples [N, *E]: N numbers, or what the kind says."""
        self._count += 1
        numbers = x0.flatten(1).double().mean(1).tolist()
        if self.calls is not None and self._count > self.calls:
            return numbers
        if self.kind == "exception":
            raise RuntimeError("this reward is faulty")
        if self.kind == "hang":
            time.sleep(self.seconds)
        if self.kind == "shape":
            return [[number] for number in numbers]
        wrong = {"nan": math.nan, "inf": math.inf, "none": None}
        return [wrong[self.kind], *numbers[1:]] if self.kind in wrong else numbers


REWARDS: dict[str, Callable[..., Reward]] = {
    "class_probability": ClassProbability,
    "class_neighbours": ClassNeighbours,
    "mode_distance": ModeDistance,
    "brightness": Brightness,
    "ink": Ink,
    "symmetry": Symmetry,
    "zlib_compressibility": ZlibCompressibility,
    "jpeg_compressibility": JpegCompressibility,
    "faulty": Faulty,
}
