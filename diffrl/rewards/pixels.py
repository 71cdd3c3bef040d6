"""Rewards that look at the pixels of an image: brightness, ink, symmetry."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from diffrl.errors import InputError
from diffrl.rewards.registry import REWARDS

__all__ = ["Brightness", "Ink", "Symmetry", "bytes_of_images", "require_images", "rgb_images"]


@REWARDS.register("brightness")
@dataclass(frozen=True)
class Brightness:
    """Mean brightness of images: mean over pixels of (clamp(x, -1, 1) + 1)/2, in [0, 1]."""

    def __call__(self, x0: Tensor, cond: Any = None) -> Tensor:
        """Rewards of images [N, *E] in [-1, 1]: floats [N]."""
        return (x0.clamp(-1, 1).flatten(1).mean(1) + 1) / 2


@REWARDS.register("ink")
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
            raise InputError(f"threshold is {self.threshold}: pixels lie in [-1, 1], so give one in [-1, 1)")

    def __call__(self, x0: Tensor, cond: Any = None) -> Tensor:
        """Rewards of images [N, *E] in [-1, 1]: float32 [N]."""
        return (x0 > self.threshold).flatten(1).float().mean(1)


@REWARDS.register("symmetry")
@dataclass(frozen=True)
class Symmetry:
    """Minus the mean squared difference of an image, cut to [-1, 1], and its mirror image, left to right: ≤ 0."""

    def __call__(self, x0: Tensor, cond: Any = None) -> Tensor:
        """Rewards of images [N, C, H, W] in [-1, 1]: floats [N]."""
        require_images(x0)
        x = x0.clamp(-1, 1)
        return -(x - x.flip(-1)).square().flatten(1).mean(1)


def require_images(x0: Tensor) -> None:
    """Refuse samples that are no batch of images [N, C, H, W]."""
    if x0.ndim != 4:
        raise InputError(f"samples have shape {tuple(x0.shape)}: this reward is for images [N, C, H, W]")


def bytes_of_images(x0: Tensor) -> np.ndarray:
    """Images [N, C, H, W] in [-1, 1] as uint8 [N, H, W, C]; what lies outside is cut."""
    require_images(x0)
    pixels = ((x0.detach().float().clamp(-1, 1) + 1) * 127.5).round().byte()
    return pixels.permute(0, 2, 3, 1).contiguous().cpu().numpy()


def rgb_images(x0: Tensor) -> np.ndarray:
    """Grey or colour images [N, 1 or 3, H, W] in [-1, 1] as uint8 [N, H, W, 3], as most models of others take them.

    Raises:
        ValueError: samples that are no grey or colour images.
    """
    pixels = bytes_of_images(x0)
    if pixels.shape[3] not in (1, 3):
        raise InputError(f"images have {pixels.shape[3]} channels: this reward takes 1 or 3")
    return np.repeat(pixels, 3, axis=3) if pixels.shape[3] == 1 else pixels
