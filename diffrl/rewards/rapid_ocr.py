"""A reader of text in images: RapidOCR, whose package brings its weights."""

from collections.abc import Callable
from typing import Any

import numpy as np

from diffrl.extras import require
from diffrl.rewards.by_name import READERS

__all__ = ["rapidocr"]


@READERS.register("rapidocr", label="RapidOCR")
def rapidocr() -> Callable[[np.ndarray], list[str]]:
    """RapidOCR: finds lines of text and reads them, offline and on the CPU, with one thread.

    The weights are the small PP-OCR models that the package brings: English and Chinese. An image of 256 × 256 takes
    about 0.4 s on one core; `reward_calls.workers` asks about several at once. Small letters are not found: in an image
    of 64 × 64, not even those of 13 pixels.

    Source: RapidOCR, https://github.com/RapidAI/RapidOCR; PP-OCR: A Practical Ultra Lightweight OCR System (Du et al.,
    2020), https://arxiv.org/abs/2009.09941.

    Raises:
        MissingExtra: rapidocr or onnxruntime is not installed.
    """
    require("onnxruntime", "ocr")
    threads = {f"EngineConfig.onnxruntime.{kind}_op_num_threads": 1 for kind in ("intra", "inter")}
    engine: Any = require("rapidocr", "ocr").RapidOCR(params={"Global.log_level": "error", **threads})

    def read(images: np.ndarray) -> list[str]:
        """Lines of each image uint8 [n, H, W, 3], joined: n strings."""
        # it takes arrays as blue, green, red
        return [" ".join(engine(image[..., ::-1].copy()).txts or ()) for image in images]

    return read
