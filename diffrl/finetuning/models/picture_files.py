"""Pictures of a tuned pipeline as files that people open, with the prompts that they were made for."""

import io
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from diffrl.extras import require
from diffrl.rewards.pixels import rgb_images
from diffrl.text_files import file_errors, write_atomically

__all__ = ["write_pictures"]


def write_pictures(
    prompts: Sequence[str], images: Tensor, cond: Tensor | None, folder: Path, name: str
) -> None:
    """Write each image as ``NAME_00.png``, and the prompt of each as a line of ``prompts.txt``.

    Args:
        prompts: all that there are.
        images: [n, 1 or 3, H, W] in [-1, 1]; what lies outside is cut.
        cond: the numbers of their prompts, integers [n] or more; None: the first prompt's.
        folder: made where it is missing.
        name: the beginning of the files' names.

    Raises:
        FileError: a file cannot be written.
        InputError: images of other channels.
    """
    make = require("PIL.Image", "diffusers").fromarray
    with file_errors(folder, "written"):
        folder.mkdir(parents=True, exist_ok=True)
    for number, pixels in enumerate(rgb_images(images)):
        raw = io.BytesIO()
        make(pixels).save(raw, "PNG")
        write_atomically(folder / f"{name}_{number:02d}.png", raw.getvalue())
    chosen = [0] * len(images) if cond is None else cond[: len(images)].tolist()
    lines = [" ".join(prompts[which].split()) for which in chosen]
    write_atomically(folder / "prompts.txt", "\n".join(lines) + "\n")
