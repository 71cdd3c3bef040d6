"""Readers of arrays: idx, npz and npy files, and what makes samples of them. Every fault is a `DataError`."""

import gzip
import math
import stat
import zipfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import avg_pool2d

from diffrl.errors import DiffrlError, InputError, InputTypeError
from diffrl.ranges import require_int

__all__ = [
    "MAX_GIB",
    "NPY",
    "DataError",
    "check_finite",
    "check_labels",
    "check_size",
    "events_from",
    "existing",
    "images_from",
    "npy_header",
    "npz_members",
    "pooled",
    "read_arrays",
    "read_idx",
    "read_npy",
    "read_npz",
    "readable",
]

MAX_GIB = 8.0
"""GiB of memory that the samples of a file may take, unless the user allows more."""

NPY = b"\x93NUMPY"
"""First bytes of an npy file."""

IDX_DTYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
CHANNELS = (1, 3, 4)


class DataError(InputError):
    """Data that cannot be used; the message names the file and the fault."""


@contextmanager
def readable(where: str, fault: str) -> Iterator[None]:
    """Turn whatever a library raises for damaged bytes into one `DataError`.

    Decoders raise almost anything: EOFError, MemoryError, struct.error, zlib.error, BadZipFile, SyntaxError, ...

    Args:
        where: the file.
        fault: what to call it, such as "unreadable or truncated file".
    """
    try:
        yield
    except DiffrlError:
        raise
    except Exception as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise DataError(f"{where}: {fault} ({reason}); copy it again") from error


def check_size(size: float, max_gib: float, where: str) -> None:
    """Refuse what would take too much memory, before it is taken.

    Args:
        size: bytes that will be needed.
        max_gib: GiB that may be taken.
        where: what needs them.

    Raises:
        DataError: it is too large.
    """
    if not size <= max_gib * 2**30:
        raise DataError(
            f"{where}: takes {size / 2**30:.3g} GiB of memory, more than {max_gib:g}; raise `max_gib` to allow it"
        )


def existing(path: str | Path, folder: bool = False) -> Path:
    """A file that is there.

    Args:
        path: ``~`` is the home folder.
        folder: whether it may be a folder, too.

    Raises:
        DataError: it is not there, or is something else, such as a pipe.
    """
    if not isinstance(path, str | Path):
        raise InputTypeError(
            f"path is a {type(path).__name__}: give that of a file; of a tensor make Data(...)"
        )
    try:
        path = Path(path).expanduser()
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError) as error:
        raise DataError(
            f"{path}: no such file or folder; diffrl downloads nothing, so point `path` at your copy"
        ) from error
    except (OSError, RuntimeError, TypeError, ValueError) as error:
        raise DataError(f"{path}: unreadable ({error}); give another path") from error
    if not (stat.S_ISREG(mode) or (folder and stat.S_ISDIR(mode))):
        found = "a folder" if stat.S_ISDIR(mode) else "a pipe or a device"
        raise DataError(f"{path}: unreadable, as it is {found}; give a file")
    return path


def read_idx(path: str | Path, max_gib: float = MAX_GIB) -> NDArray[Any]:
    """Array of an idx file (the format of MNIST), gzipped or not.

    The file is two zero bytes, a dtype code, the number of dims, the dims (big-endian int32), the values.

    Source: The MNIST database of handwritten digits (LeCun, Cortes & Burges, 1998), "File formats".

    Args:
        path: the file; gzip is recognised by its content, not by its name.
        max_gib: GiB of memory that its samples may take, checked before any is taken.

    Returns:
        The array, in native byte order.

    Raises:
        DataError: the file is missing, truncated, too large or no idx file.
    """
    path = existing(path)
    with readable(str(path), "unreadable or truncated file"), _unpacked(path) as file:
        head = file.read(4)
        if len(head) < 4 or head[:2] != b"\0\0" or head[2] not in IDX_DTYPES or head[3] == 0:
            raise DataError(f"{path}: not an idx file, its first bytes are {head.hex(' ') or 'missing'}")
        dims = file.read(4 * head[3])
        if len(dims) < 4 * head[3]:
            raise DataError(f"{path}: truncated file, its header is cut; copy it again")
        shape = tuple(int(d) for d in np.frombuffer(dims, ">u4"))
        array = _values(file, np.dtype(IDX_DTYPES[head[2]]), shape, max_gib, str(path))
        return array.reshape(shape).astype(array.dtype.newbyteorder("="))


def _unpacked(path: Path) -> IO[bytes]:
    """The file, read through gzip if it is packed."""
    with path.open("rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
    return gzip.open(path) if packed else path.open("rb")  # type: ignore[return-value]


def _values(
    file: IO[bytes], dtype: np.dtype[Any], shape: tuple[int, ...], max_gib: float, where: str
) -> NDArray[Any]:
    """The rest of a file: the values of an array of that shape, flat. Other than that is a ValueError."""
    count = math.prod(shape)
    check_size(count * max(dtype.itemsize, 4), max_gib, where)  # samples become float32
    expected = count * dtype.itemsize
    raw = file.read(expected + 1)
    if len(raw) != expected:
        found = "more" if len(raw) > expected else str(len(raw))
        raise ValueError(f"{found} bytes where {shape} needs {expected}")
    return np.frombuffer(raw, dtype)


def read_npz(path: str | Path, max_gib: float = MAX_GIB) -> tuple[NDArray[Any], NDArray[Any] | None]:
    """Samples and labels of an npz file (keys `x` or `images`, optional `labels`), or samples of an npy file.

    Args:
        path: the file; other arrays in it are not read.
        max_gib: GiB of memory that its samples may take, checked before any is taken.

    Returns:
        Array [N, ...] and labels [N] or None, as stored.

    Raises:
        DataError: the file is missing, damaged, too large, holds pickled objects, or lacks the keys.
    """
    path = existing(path)
    with readable(str(path), "unreadable, truncated or no npz/npy file"), path.open("rb") as file:
        if file.read(len(NPY)) == NPY:
            file.seek(0)
            return read_npy(file, max_gib, str(path)), None
        with zipfile.ZipFile(file) as archive:
            samples, members = npz_members(archive, str(path))
            arrays = {}
            for key in (samples, "labels"):
                if key in members:
                    with archive.open(members[key]) as member:
                        arrays[key] = read_npy(member, max_gib, f"{path}: {key}")
            return arrays[samples], arrays.get("labels")


def npz_members(archive: zipfile.ZipFile, where: str) -> tuple[str, dict[str, zipfile.ZipInfo]]:
    """The name of the samples in an npz file, `x` or `images`, and all its members by name.

    Raises:
        DataError: it holds neither or both.
    """
    members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
    keys = [key for key in ("x", "images") if key in members]
    if len(keys) != 1:
        raise DataError(f"{where}: needs one array named 'x' or 'images', but holds {sorted(members)}")
    return keys[0], members


def read_arrays(
    path: str | Path, names: Collection[str] | None = None, max_gib: float = MAX_GIB
) -> dict[str, NDArray[Any]]:
    """Those arrays of an npz file that have these names, or of an npy file the one array, by the name "".

    Args:
        path: the file; other arrays in it are not read.
        names: what is read; None: an npy file is wanted.
        max_gib: GiB of memory that each array may take, checked before any is taken.

    Raises:
        DataError: the file is missing, damaged, too large, holds pickled objects, or is of the other kind.
    """
    path, wanted = existing(path), "an npy file" if names is None else "an npz file"
    with readable(str(path), f"unreadable, truncated or not {wanted}"), path.open("rb") as file:
        if names is None:
            return {"": read_npy(file, max_gib, str(path))}
        with zipfile.ZipFile(file) as archive:
            members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
            found = {}
            for name in [name for name in names if name in members]:
                with archive.open(members[name]) as member:
                    found[name] = read_npy(member, max_gib, f"{path}: {name}")
            return found


def npy_header(file: IO[bytes], where: str) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Shape, whether it is in Fortran order, and dtype of an npy file, which is left at its first value.

    Raises:
        DataError: an array with named fields.
        ValueError: no npy file, or one of pickled objects.
    """
    version = np.lib.format.read_magic(file)
    if version[0] > 2:
        raise DataError(
            f"{where}: npy version {version[0]} is of arrays with named fields; store plain numbers"
        )
    v1, v2 = np.lib.format.read_array_header_1_0, np.lib.format.read_array_header_2_0
    shape, fortran, dtype = (v1 if version == (1, 0) else v2)(file)
    if dtype.hasobject or min(shape, default=0) < 0:
        raise ValueError(f"{dtype} of shape {shape}; pickled objects are not loaded")
    return shape, fortran, dtype


def read_npy(file: IO[bytes], max_gib: float, where: str) -> NDArray[Any]:
    """The array of an npy file; its header says what it takes.

    Raises:
        DataError: it is damaged, too large, or holds pickled objects.
    """
    with readable(where, "unreadable, truncated or no npz/npy file"):
        shape, fortran, dtype = npy_header(file, where)
        return _values(file, dtype, shape, max_gib, where).reshape(shape, order="F" if fortran else "C")


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
    return torch.from_numpy(pixels.astype(np.float32, order="C")).div_(127.5).sub_(1)


def pooled(x: Tensor, pool: int, where: str) -> Tensor:
    """Images whose pixels are the means of blocks of pool × pool pixels: [N, C, H, W] → [N, C, H/pool, W/pool].

    Args:
        x: the samples; with pool 1 they may have any shape, and stay as they are.
        pool: side of a block in pixels, at least 1.
        where: what to call them in an error.

    Raises:
        DataError: samples that are no images, or a height or width that is no multiple of pool.
        ValueError: pool is no whole number of at least 1.
    """
    if require_int("pool", pool) == 1:
        return x
    if x.ndim != 4 or any(size % pool for size in x.shape[2:]):
        raise DataError(
            f"{where}: samples of shape {tuple(x.shape[1:])} cannot be pooled by {pool}: that takes images [C, H, W] "
            f"with H and W divisible by {pool}"
        )
    return avg_pool2d(x, pool)


def events_from(array: NDArray[Any], where: str, channels: str = "auto") -> Tensor:
    """Samples as a network takes them: float32, channels first, images in [-1, 1].

    uint8 [N, H, W], [N, C, H, W] or [N, H, W, C] is images: x/127.5 - 1, one channel if none is given. Floats keep
    their values: [N, C, H, W] or [N, H, W, C] is images and must lie in [-1, 1]; [N, D] and [N, L, D] (vectors,
    sequences) may hold any finite value, but a denoiser expects a scale near 1.

    Args:
        array: the samples as stored.
        where: what to call them in an error.
        channels: where the channels of arrays with four dims lie: "first", "last", or "auto": there where C is 1, 3
            or 4, and if that is nowhere, beside a square image.

    Raises:
        DataError: another dtype or shape, no sample, NaN or infinity, float images outside [-1, 1], an unknown word
            for `channels`, or channels that may lie at both ends.
    """
    if array.ndim < 2 or array.size == 0:
        labels = "; one number each looks like labels: give the samples" if array.ndim == 1 else ""
        raise DataError(
            f"{where}: samples must be [N, ...] with at least one value each, not shape {array.shape}{labels}"
        )
    if channels not in ("auto", "first", "last"):
        raise DataError(f"`channels` is {channels!r}; give auto, first or last")
    pixels = array.dtype == np.uint8
    if not pixels and array.dtype.kind != "f":
        raise DataError(
            f"{where}: dtype {array.dtype} is ambiguous; store floats, or images as uint8 in 0..255"
        )
    if pixels and array.ndim == 3:
        array = array[:, None]
    elif pixels and array.ndim != 4:
        raise DataError(
            f"{where}: uint8 arrays of shape {array.shape} are not clearly images: store [N, C, H, W]"
        )
    elif array.ndim == 4 and _channels_last(array.shape, where, channels):
        array = np.moveaxis(array, -1, 1)
    if pixels:
        return images_from(array)
    with np.errstate(over="ignore"):
        x = torch.from_numpy(array.astype(np.float32, order="C"))
    check_finite(x, where)
    if x.ndim >= 4 and float(x.abs().max()) > 1:
        low, high = x.aminmax()
        raise DataError(
            f"{where}: float images must lie in [-1, 1], but these span [{low:g}, {high:g}]; rescale them"
        )
    return x


def _channels_last(shape: tuple[int, ...], where: str, channels: str) -> bool:
    """Whether [N, *, *, *] is [N, H, W, C] and not [N, C, H, W]."""
    if channels != "auto":
        return channels == "last"
    first, last = (shape[dim] in CHANNELS for dim in (1, 3))
    if not (first or last):
        first, last = shape[2] == shape[3], shape[1] == shape[2]
    if first == last:
        raise DataError(
            f"{where}: images of shape {shape} are not clearly [N, C, H, W] or [N, H, W, C]; "
            "set `channels` to first or last"
        )
    return last


def check_labels(labels: NDArray[Any], samples: int, where: str) -> NDArray[Any]:
    """Class labels [N] as they are stored.

    Raises:
        DataError: not N whole numbers ≥ 0.
    """
    if labels.dtype.kind not in "iu" or labels.shape != (samples,):
        found = f"{labels.dtype} of shape {labels.shape}"
        raise DataError(f"{where}: labels must be {samples} whole numbers, one for each sample, not {found}")
    if labels.min() < 0:
        raise DataError(f"{where}: label {labels.min()} is negative; number the classes from 0")
    return labels
