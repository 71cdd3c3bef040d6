"""Rewards that look at the pixels of an image: brightness, ink, symmetry."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from diffrl.errors import InputError
from diffrl.rewards.registry import REWARDS

__all__ = ["Brightness", "Ink", "Symmetry", "require_images"]


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
