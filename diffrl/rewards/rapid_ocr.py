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

    The weights are the small PP-OCR models that the package brings: English and Chinese. An image takes 0.2 to
    0.5 s on one core, from 64 × 64 to 512 × 512; `reward_calls.workers` asks about several at once. In clean print,
    letters of 10 pixels are read and those of 8 misread; in an image of 512 × 512 they must have 12.

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
