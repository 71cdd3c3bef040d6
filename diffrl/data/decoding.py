"""One encoded image, such as the bytes of a png file: what it will be, and its pixels."""

import io
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffrl.data.image_files import DataError, check_size, readable
from diffrl.extras import require

__all__ = ["decode", "has_colour"]

GRAY_MODES = {"1", "L", "LA"}
COLOUR_MODES = {"P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr"}


def has_colour(raw: bytes, where: str, max_gib: float) -> bool:
    """Whether an image becomes one of three channels; only its header is read.

    Args:
        raw: the bytes of the file.
        where: what to call it in an error.
        max_gib: GiB of memory that it may take.

    Raises:
        DataError: it is no image, too large, or of more than 8 bits.
        MissingExtra: pillow is not installed.
    """
    with readable(where, "unreadable or truncated image"):
        return _opened(raw, where, max_gib).mode in COLOUR_MODES


def decode(raw: bytes, where: str, size: int | None, max_gib: float) -> NDArray[np.uint8]:
    """One image as uint8 [C, H, W], C ∈ {1, 3}, turned as its EXIF orientation says.

    Args:
        raw: the bytes of the file.
        where: what to call it in an error.
        size: crop it at its centre and resize it to size × size (Lanczos); None: as it is.
        max_gib: GiB of memory that it may take.

    Raises:
        DataError: it is damaged, too large, or of more than 8 bits.
        MissingExtra: pillow is not installed.
    """
    Image, ImageOps = require("PIL.Image", "data"), require("PIL.ImageOps", "data")
    with readable(where, "unreadable or truncated image"):
        image = _opened(raw, where, max_gib)
        image.load()
        image = ImageOps.exif_transpose(image)
        if image.mode in ("P", "PA") and "transparency" in image.info:
            image = image.convert("RGBA")
        image = image.convert("L" if image.mode in GRAY_MODES else "RGB")
        if size is not None:
            side = min(image.size)
            left, top = (image.width - side) // 2, (image.height - side) // 2
            square = image.crop((left, top, left + side, top + side))
            image = square.resize((size, size), Image.Resampling.LANCZOS)
        pixels = np.asarray(image)
    return pixels[None] if pixels.ndim == 2 else np.moveaxis(pixels, -1, 0)


def _opened(raw: bytes, where: str, max_gib: float) -> Any:
    """The image, of which the header is read."""
    Image, unknown = require("PIL.Image", "data"), require("PIL", "data").UnidentifiedImageError
    try:
        image = Image.open(io.BytesIO(raw))
    except unknown as error:  # its text names an object in memory, and no file
        found = f"first bytes {raw[:4].hex(' ')}" if raw else "empty"
        raise DataError(
            f"{where}: unreadable or truncated image ({found}); copy it again, or remove it"
        ) from error
    check_size(4 * image.width * image.height, max_gib, where)
    if image.mode not in GRAY_MODES | COLOUR_MODES:
        raise DataError(f"{where}: image mode {image.mode} is not 8-bit; convert it to 8-bit gray or RGB")
    return image
