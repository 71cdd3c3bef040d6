"""Readers of data files: idx, npz and npy arrays, folders and zips of images. Every fault is a `DataError`."""

import gzip
import io
import math
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffrl.errors import InputError
from diffrl.extras import require

__all__ = [
    "DataError",
    "check_finite",
    "events_from",
    "images_from",
    "labels_from",
    "read_idx",
    "read_image_folder",
    "read_npz",
]

IMAGE_SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
GRAY_MODES = {"1", "L", "LA"}
COLOUR_MODES = {"P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr"}
IDX_DTYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
# exceptions that readers raise for damaged, truncated or encrypted files
UNREADABLE = (OSError, EOFError, KeyError, RuntimeError, ValueError, zipfile.BadZipFile, zlib.error)


class DataError(InputError):
    """Data that cannot be used; the message names the file and the fault."""


def _existing(path: str | Path) -> Path:
    path = Path(path).expanduser()
    if not path.exists():
        raise DataError(
            f"{path}: no such file or folder; diffrl downloads nothing, so point `path` at your copy"
        )
    return path


def _read_bytes(path: str | Path) -> bytes:
    path = _existing(path)
    try:
        raw = path.read_bytes()
        return gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw
    except UNREADABLE as error:
        raise DataError(f"{path}: unreadable or truncated file ({error}); copy it again") from error


def read_idx(path: str | Path) -> NDArray[Any]:
    """Array of an idx file (the format of MNIST), gzipped or not.

    The file is two zero bytes, a dtype code, the number of dims, the dims (big-endian int32), the values.

    Source: The MNIST database of handwritten digits (LeCun, Cortes & Burges, 1998), "File formats".

    Args:
        path: the file; gzip is recognised by its content, not by its name.

    Returns:
        The array, in native byte order.

    Raises:
        DataError: the file is missing, truncated or no idx file.
    """
    raw = _read_bytes(path)
    if len(raw) < 4 or raw[:2] != b"\0\0" or raw[2] not in IDX_DTYPES or raw[3] == 0:
        raise DataError(f"{path}: not an idx file, its first bytes are {raw[:4].hex(' ') or 'missing'}")
    dtype, start = np.dtype(IDX_DTYPES[raw[2]]), 4 + 4 * raw[3]
    if len(raw) < start:
        raise DataError(f"{path}: truncated file, its header is cut; copy it again")
    shape = tuple(int(d) for d in np.frombuffer(raw, ">u4", raw[3], 4))
    expected = start + math.prod(shape) * dtype.itemsize
    if len(raw) != expected:
        raise DataError(
            f"{path}: truncated or damaged file, {len(raw)} bytes where shape {shape} needs {expected}"
        )
    return np.frombuffer(raw, dtype, offset=start).reshape(shape).astype(dtype.newbyteorder("="))


def read_npz(path: str | Path) -> tuple[NDArray[Any], NDArray[Any] | None]:
    """Samples and labels of an npz file (keys `x` or `images`, optional `labels`), or samples of an npy file.

    Returns:
        Array [N, ...] and labels [N] or None, as stored.

    Raises:
        DataError: the file is missing, damaged, holds pickled objects, or lacks the keys.
    """
    path = _existing(path)
    try:
        with path.open("rb") as file:
            stored = np.load(file, allow_pickle=False)
            arrays = {"x": stored} if isinstance(stored, np.ndarray) else {k: stored[k] for k in stored.files}
    except UNREADABLE as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"{path}: unreadable, truncated or no npz/npy file ({reason})") from error
    keys = [k for k in ("x", "images") if k in arrays]
    if len(keys) != 1:
        raise DataError(f"{path}: needs one array named 'x' or 'images', but holds {sorted(arrays)}")
    return arrays[keys[0]], arrays.get("labels")


def check_finite(x: Tensor, where: str) -> None:
    """Refuse NaN and infinity.

    Raises:
        DataError: naming the index of the first sample that holds one.
    """
    bad = ~x.isfinite().flatten(1).all(1)
    if bool(bad.any()):
        raise DataError(f"{where}: sample {int(bad.nonzero()[0])} holds NaN or infinity; remove it")


def images_from(pixels: NDArray[np.uint8]) -> Tensor:
    """8-bit images [N, C, H, W] as float32 in [-1, 1]: x/127.5 - 1."""
    return torch.from_numpy(np.ascontiguousarray(pixels)).float() / 127.5 - 1


def events_from(array: NDArray[Any], where: str) -> Tensor:
    """Samples as a network takes them: float32, channels first, images in [-1, 1].

    uint8 [N, H, W], [N, C, H, W] or [N, H, W, C] with C ∈ {1, 3, 4} is images: x/127.5 - 1, one channel if
    none is given. Floats keep their values: [N, C, H, W] is images and must lie in [-1, 1]; [N, D] and
    [N, L, D] (vectors, sequences) may hold any finite value, but a denoiser expects a scale near 1.

    Args:
        array: the samples as stored.
        where: what to call them in an error.

    Raises:
        DataError: another dtype or shape, no sample, NaN or infinity, float images outside [-1, 1].
    """
    if array.ndim < 2 or array.size == 0:
        raise DataError(
            f"{where}: samples must be [N, ...] with at least one value each, not shape {array.shape}"
        )
    if array.dtype == np.uint8:
        if array.ndim == 3:
            return images_from(array[:, None])
        first, last = (array.ndim == 4 and array.shape[dim] in (1, 3, 4) for dim in (1, -1))
        if first == last:
            wanted = "[N, H, W], [N, C, H, W] or [N, H, W, C] with 1, 3 or 4 channels"
            raise DataError(f"{where}: uint8 images of shape {array.shape} are not clearly {wanted}")
        return images_from(np.moveaxis(array, -1, 1) if last else array)
    if array.dtype.kind != "f":
        raise DataError(
            f"{where}: dtype {array.dtype} is ambiguous; store floats, or images as uint8 in 0..255"
        )
    with np.errstate(over="ignore"):
        x = torch.from_numpy(array.astype(np.float32))
    check_finite(x, where)
    if x.ndim >= 4 and float(x.abs().max()) > 1:
        low, high = x.aminmax()
        raise DataError(
            f"{where}: float images must lie in [-1, 1], but these span [{low:g}, {high:g}]; rescale them"
        )
    return x


def labels_from(labels: NDArray[Any], samples: int, where: str) -> Tensor:
    """Class labels as int64 [N].

    Raises:
        DataError: not N whole numbers ≥ 0.
    """
    if labels.dtype.kind not in "iu" or labels.shape != (samples,):
        found = f"{labels.dtype} of shape {labels.shape}"
        raise DataError(f"{where}: labels must be {samples} whole numbers, one for each sample, not {found}")
    if labels.min() < 0:
        raise DataError(f"{where}: label {labels.min()} is negative; number the classes from 0")
    return torch.from_numpy(labels.astype(np.int64))


def _listing(path: Path) -> tuple[list[str], list[str], Callable[[str], bytes]]:
    """Names of the files and of the folders in a folder or zip, sorted, and how to read a file."""
    if path.is_dir():
        found = sorted(p.relative_to(path).as_posix() + "/" * p.is_dir() for p in path.rglob("*"))

        def read(name: str) -> bytes:
            return (path / name).read_bytes()

    else:
        try:
            archive = zipfile.ZipFile(path)
        except UNREADABLE as error:
            raise DataError(f"{path}: neither a folder nor a readable zip ({error})") from error
        found, read = sorted(archive.namelist()), archive.read
    visible = [
        n for n in found if not any(p.startswith(".") or p == "__MACOSX" for p in PurePosixPath(n).parts)
    ]
    images = [n for n in visible if PurePosixPath(n).suffix.lower() in IMAGE_SUFFIXES and not n.endswith("/")]
    return images, [n.rstrip("/") for n in visible if n.endswith("/")], read


def _decode(raw: bytes, where: str, size: int | None) -> NDArray[np.uint8]:
    """One image as uint8 [C, H, W]."""
    Image = require("PIL.Image", "data")
    try:
        image = Image.open(io.BytesIO(raw))
        image.load()
    except (*UNREADABLE, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"{where}: unreadable or truncated image ({error})") from error
    if image.mode not in GRAY_MODES | COLOUR_MODES:
        raise DataError(f"{where}: image mode {image.mode} is not 8-bit; convert it to 8-bit gray or RGB")
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


def _classes(images: list[str], folders: list[str], where: str) -> list[str] | None:
    """Class of each image by its folder; None if all lie at the top."""
    parts = [PurePosixPath(n).parts for n in images]
    wrapped = all(len(p) > 2 for p in parts) and len({p[0] for p in parts}) == 1
    top = parts[0][0] + "/" if wrapped else ""
    depths = {len(p) - wrapped for p in parts}
    if len(depths) > 1 or max(depths) > 2:
        name = max(images, key=lambda n: n.count("/"))
        raise DataError(
            f"{where}: images must all lie at the top or all in class/image; {name!r} does not fit"
        )
    if depths == {1}:
        return None
    names = [p[-2] for p in parts]
    classes = [f.removeprefix(top) for f in folders if f.startswith(top) and f + "/" != top]
    empty = sorted({f for f in classes if "/" not in f} - set(names))
    if empty:
        raise DataError(f"{where}: class folder {empty[0]!r} holds no image; fill or remove it")
    return names


def read_image_folder(
    path: str | Path, size: int | None = None, conditional: bool = True
) -> tuple[NDArray[np.uint8], list[str] | None]:
    """Images of a folder or zip, in the order of their names, and the class of each.

    Images lie at the top (no classes) or in one folder for each class. If one single folder holds all of this, as in
    many zips, its contents are taken. Hidden files, and files without the suffix of an image, are ignored. Gray
    images keep one channel unless there are colour images too; palettes and CMYK become RGB; transparency is dropped.

    Args:
        path: folder or zip file.
        size: crop each image at its centre to a square and resize it to size × size (Lanczos).
        conditional: read classes; if False, images may lie anywhere.

    Returns:
        uint8 [N, C, H, W], C ∈ {1, 3}, and the N names of classes, or None.

    Raises:
        DataError: missing or damaged file, no image, empty class folder, images of different sizes.
        MissingExtra: pillow is not installed.
    """
    path = _existing(path)
    images, folders, read = _listing(path)
    if not images:
        raise DataError(f"{path}: holds no image ({', '.join(sorted(IMAGE_SUFFIXES))})")
    classes = _classes(images, folders, str(path)) if conditional else None
    pixels = []
    for name in images:
        try:
            raw = read(name)
        except UNREADABLE as error:
            raise DataError(f"{path}: {name} is unreadable ({error})") from error
        pixels.append(_decode(raw, f"{path}: {name}", size))
        if pixels[-1].shape[1:] != pixels[0].shape[1:]:
            (h, w), (H, W) = pixels[-1].shape[1:], pixels[0].shape[1:]
            raise DataError(
                f"{path}: {name} is {w}x{h}, but {images[0]} is {W}x{H}; give `size` to resize all"
            )
    channels = max(p.shape[0] for p in pixels)
    return np.stack([np.broadcast_to(p, (channels, *p.shape[1:])) for p in pixels]), classes
