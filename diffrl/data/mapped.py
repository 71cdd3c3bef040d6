"""Rows of a memory-mapped npy or npz file: data that need not fit in memory, converted when they are drawn."""

import hashlib
import math
import mmap
import struct
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from diffrl.data.image_files import (
    MAX_GIB,
    NPY,
    DataError,
    events_from,
    existing,
    npy_header,
    npz_members,
    pooled,
    read_npy,
    readable,
)
from diffrl.data.numbered import NumberedRows

__all__ = ["MappedRows", "map_npz"]

AT_ONCE = 2**24  # bytes that are hashed at once
LOCAL_HEADER = (
    30  # bytes before the name of a zip's member; the last four say how long name and extra field are
)


@dataclass(frozen=True, eq=False)
class MappedRows(NumberedRows):
    """Samples of a mapped array: nothing is read but the rows that are asked for.

    Rows become what `diffrl.data.image_files.events_from` makes of them: uint8 images x/127.5 - 1 in [-1, 1], floats
    as they are. What is wrong with a row, such as NaN, is found when it is drawn.

    Args:
        array: as stored, [M, ...].
        where: the file, for errors.
        index: numbers of the rows, int64 [N]; ~i = -1-i is the mirror image of row i.
        channels: where the channels of images lie, see `events_from`.
        pool: side in pixels of the blocks that means are taken over; 1: none.

    Raises:
        DataError: samples of another dtype or shape than `events_from` and `pooled` take, or no sample.
    """

    array: NDArray[Any]
    where: str
    index: NDArray[np.int64]
    channels: str = "auto"
    pool: int = 1

    def __post_init__(self) -> None:
        self._events(self.array[:1])

    def _read(self, rows: NDArray[np.int64]) -> Tensor:
        raw = self.array[rows]
        if raw.dtype.kind == "f":
            bad = ~np.isfinite(raw.reshape(len(raw), -1)).all(1)
            if bad.any():
                raise DataError(f"{self.where}: sample {rows[bad][0]} holds NaN or infinity; remove it")
        return self._events(raw)

    def _events(self, raw: NDArray[Any]) -> Tensor:
        return pooled(events_from(raw, self.where, self.channels), self.pool, self.where)

    def digest(self) -> bytes:
        """SHA-256 of which rows these are and of what is stored there; it reads each of them once."""
        a, rows = self.array, self._stored
        found = hashlib.sha256(f"{a.dtype}{a.shape[1:]}{self.channels}{self.pool}".encode())
        found.update(self.index.data)
        n = max(1, AT_ONCE // max(1, a[:1].nbytes))
        _advise(a, "MADV_SEQUENTIAL")
        for first in range(0, len(rows), n):
            found.update(np.ascontiguousarray(a[rows[first : first + n]]).data)
        _advise(a, "MADV_RANDOM")
        return found.digest()


def map_npz(path: str | Path, max_gib: float = MAX_GIB) -> tuple[NDArray[Any], NDArray[Any] | None]:
    """As `diffrl.data.image_files.read_npz`, but the samples stay in the file, and are read where they are used.

    An npz file must be stored without compression, as ``numpy.savez`` does. The checksums of a zip are not compared.

    Args:
        path: the file; it must stay as it is while it is in use.
        max_gib: GiB of memory that the labels may take.

    Returns:
        Array [N, ...], mapped read-only, and labels [N] or None, as stored.

    Raises:
        DataError: as `read_npz`; or a compressed file, or one in Fortran order, whose samples lie scattered.
    """
    path = existing(path)
    with readable(str(path), "unreadable, truncated or no npz/npy file"), path.open("rb") as file:
        if file.read(len(NPY)) == NPY:
            return _mapped(file, 0, path.stat().st_size, path, str(path)), None
        with zipfile.ZipFile(file) as archive:
            key, members = npz_members(archive, str(path))
            info, labels = members[key], None
            if info.compress_type != zipfile.ZIP_STORED:
                raise DataError(
                    f"{path}: {key} is compressed and cannot be mapped; store it by numpy.savez, or set `mapped` to "
                    "false"
                )
            if "labels" in members:
                with archive.open(members["labels"]) as member:
                    labels = read_npy(member, max_gib, f"{path}: labels")
            file.seek(info.header_offset)
            name, extra = struct.unpack("<HH", file.read(LOCAL_HEADER)[-4:])
            first = info.header_offset + LOCAL_HEADER + name + extra
            return _mapped(file, first, first + info.file_size, path, f"{path}: {key}"), labels


def _mapped(file: IO[bytes], first: int, last: int, path: Path, where: str) -> NDArray[Any]:
    """The array of an npy file that lies in these bytes of a file."""
    file.seek(first)
    shape, fortran, dtype = npy_header(file, where)
    if fortran and len(shape) > 1:
        raise DataError(f"{where}: is in Fortran order; store numpy.ascontiguousarray of it")
    offset, expected = file.tell(), math.prod(shape) * dtype.itemsize
    if last - offset != expected:
        raise ValueError(f"{last - offset} bytes where {shape} needs {expected}")
    if expected == 0:
        raise DataError(f"{where}: samples must be [N, ...] with at least one value each, not shape {shape}")
    array = np.memmap(path, dtype, "r", offset, shape)
    _advise(array, "MADV_RANDOM")
    return array


def _advise(array: Any, advice: str) -> None:
    """Say how a mapped file will be read, where the system listens: rows at random need nothing read ahead."""
    while isinstance(array, np.ndarray):
        array = array.base
    if isinstance(array, mmap.mmap) and hasattr(mmap, advice):
        array.madvise(getattr(mmap, advice))
