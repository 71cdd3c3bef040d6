"""Encoded images, such as png files: read all at once, or left where they are and decoded each time they are drawn."""

import hashlib
from dataclasses import dataclass
from typing import Protocol, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffrl.data.decoding import decode, has_colour
from diffrl.data.image_files import DataError, check_size, images_from
from diffrl.data.numbered import NumberedRows

__all__ = ["Encoded", "EncodedRows", "decode_all", "images_of"]


class Encoded(Protocol):
    """Encoded images by their numbers 0..M-1; it can be pickled, so that other processes read them too."""

    @property
    def where(self) -> str:
        """What they lie in."""
        ...

    def __len__(self) -> int: ...
    def label(self, j: int) -> str:
        """What to call image j."""
        ...

    def read(self, j: int) -> bytes:
        """The bytes of image j.

        Raises:
            DataError: they cannot be read.
        """
        ...


def decode_all(images: Encoded, size: int | None, max_gib: float) -> NDArray[np.uint8]:
    """All of them, in their order.

    Args:
        images: at least one.
        size: crop each at its centre and resize it to size × size; None: all must be of one size.
        max_gib: GiB of memory that all may take as float32; checked before it is taken.

    Returns:
        uint8 [M, C, H, W], C = 3 if there are colour images among them.

    Raises:
        DataError: they take too much memory, one is damaged, or they differ in size.
        MissingExtra: pillow is not installed.
    """
    check_size(4 * len(images) * (size or 1) ** 2, max_gib, images.where)
    pixels: list[NDArray[np.uint8]] = []
    for j in range(len(images)):
        pixels.append(_decoded(images, j, images.read(j), size, max_gib))
        _check_shape(images, j, pixels[-1], pixels[0].shape)
        check_size(4 * len(images) * pixels[-1].size, max_gib, images.where)
    channels = max(p.shape[0] for p in pixels)
    return np.stack([np.broadcast_to(p, (channels, *p.shape[1:])) for p in pixels])


def images_of(images: Encoded, size: int | None, max_gib: float, mapped: bool) -> "Tensor | EncodedRows":
    """Images as samples, float32 [M, C, H, W] in [-1, 1]: in memory, or with `mapped` left where they are."""
    return EncodedRows.of(images, size, max_gib) if mapped else images_from(decode_all(images, size, max_gib))


def _decoded(images: Encoded, j: int, raw: bytes, size: int | None, max_gib: float) -> NDArray[np.uint8]:
    return decode(raw, f"{images.where}: {images.label(j)}", size, max_gib)


def _check_shape(images: Encoded, j: int, pixels: NDArray[np.uint8], shape: tuple[int, ...]) -> None:
    """Refuse image j if its height and width are not those of the first."""
    (h, w), (H, W) = pixels.shape[1:], shape[1:]
    if (h, w) != (H, W):
        raise DataError(
            f"{images.where}: {images.label(j)} is {w}x{h}, but {images.label(0)} is {W}x{H}; give `size` to resize "
            "all"
        )


@dataclass(frozen=True, eq=False)
class EncodedRows(NumberedRows):
    """Images that are decoded each time that they are drawn, to what `decode_all` makes of them: x/127.5 - 1.

    What is wrong with an image behind its header is found when it is drawn.

    Args:
        images: where they are.
        index: numbers of the rows, int64 [N]; ~i is the mirror image of image i.
        shape: C, H, W.
        size: as in `decode_all`.
        max_gib: GiB of memory that one image may take.
        hashes: SHA-256 of the bytes of each image, uint8 [M, 32].
    """

    images: Encoded
    index: NDArray[np.int64]
    shape: tuple[int, ...]
    size: int | None
    max_gib: float
    hashes: NDArray[np.uint8]

    @classmethod
    def of(cls, images: Encoded, size: int | None, max_gib: float) -> Self:
        """All of them; each is read once for its hash and its header, and the first one is decoded.

        Raises:
            DataError, MissingExtra: as `decode_all`.
        """
        first, colour = _decoded(images, 0, images.read(0), size, max_gib), False
        hashes = np.empty((len(images), 32), np.uint8)
        for j in range(len(images)):
            raw = images.read(j)
            colour |= has_colour(raw, f"{images.where}: {images.label(j)}", max_gib)
            hashes[j] = np.frombuffer(hashlib.sha256(raw).digest(), np.uint8)
        shape = (3 if colour else 1, *first.shape[1:])
        return cls(images, np.arange(len(images)), shape, size, max_gib, hashes)

    def _read(self, rows: NDArray[np.int64]) -> Tensor:
        x = torch.empty(len(rows), *self.shape)
        for place, j in enumerate(rows.tolist()):
            raw = self.images.read(j)
            pixels = _decoded(self.images, j, raw, self.size, self.max_gib)
            if hashlib.sha256(raw).digest() != self.hashes[j].tobytes():
                raise DataError(
                    f"{self.images.where}: {self.images.label(j)} was changed since the start: bring back what it was, "
                    "or begin a new run"
                )
            _check_shape(self.images, j, pixels, self.shape)
            x[place] = images_from(pixels)  # one channel fills three
        return x

    def digest(self) -> bytes:
        """SHA-256 of which rows these are, of the bytes of their images, and of what becomes of them."""
        found = hashlib.sha256(f"{self.shape}{self.size}".encode())
        found.update(self.index.data)
        found.update(self.hashes[self._stored].data)
        return found.digest()
