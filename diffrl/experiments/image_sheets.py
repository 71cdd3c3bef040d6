"""Images side by side, as one image."""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["image_sheet", "square_columns"]


def image_sheet(x: NDArray[Any], columns: int) -> NDArray[Any]:
    """Images [n, C, H, W] in [-1, 1] as one image [rows H, columns W, C] in [0, 1], white between them."""
    n, C, H, W = x.shape
    columns = min(columns, n)
    rows = -(-n // columns)
    gap = max(1, H // 16)
    sheet = np.ones((rows * (H + gap) - gap, columns * (W + gap) - gap, C))
    for i, image in enumerate(np.clip((x + 1) / 2, 0, 1)):
        top, left = i // columns * (H + gap), i % columns * (W + gap)
        sheet[top : top + H, left : left + W] = image.transpose(1, 2, 0)
    return sheet


def square_columns(count: int) -> int:
    """In how many columns a sheet of so many images is nearly square."""
    return math.isqrt(count - 1) + 1
