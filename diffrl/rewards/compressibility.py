"""How small an image becomes when it is compressed, as a reward."""

import io
import zlib
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from diffrl.errors import InputError
from diffrl.extras import require
from diffrl.rewards.pixels import bytes_of_images
from diffrl.rewards.registry import REWARDS

__all__ = ["JpegCompressibility", "ZlibCompressibility"]


@REWARDS.register("zlib_compressibility")
@dataclass(frozen=True)
class ZlibCompressibility:
    """Minus the size in bytes of an image's 8-bit pixels, compressed by zlib; weight -1 asks for the opposite.

    Args:
        level: of zlib, 1 to 9.

    Raises:
        ValueError: a level outside the range; when called, samples that are no images.
    """

    level: int = 9

    def __post_init__(self) -> None:
        if not 1 <= self.level <= 9:
            raise InputError(f"level is {self.level}: zlib has levels 1 to 9")

    def __call__(self, x0: Tensor, cond: Any = None) -> list[float]:
        """Rewards of images [N, C, H, W] in [-1, 1]: N floats."""
        return [-float(len(zlib.compress(image.tobytes(), self.level))) for image in bytes_of_images(x0)]


@REWARDS.register("jpeg_compressibility")
@dataclass(frozen=True)
class JpegCompressibility:
    """Minus the size in bytes of an image as JPEG; weight -1 asks for the opposite.

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
            raise InputError(f"quality is {self.quality}: JPEG has 1 to 95")

    def __call__(self, x0: Tensor, cond: Any = None) -> list[float]:
        """Rewards of images [N, 1 or 3, H, W] in [-1, 1]: N floats."""
        images = bytes_of_images(x0)
        if images.shape[3] not in (1, 3):
            raise InputError(f"images have {images.shape[3]} channels: JPEG takes 1 or 3")
        Image = require("PIL.Image", "data")
        sizes = []
        for image in images:
            file = io.BytesIO()
            pixels = image[:, :, 0] if image.shape[2] == 1 else image
            Image.fromarray(pixels).save(file, format="JPEG", quality=self.quality)
            sizes.append(-float(file.tell()))
        return sizes
