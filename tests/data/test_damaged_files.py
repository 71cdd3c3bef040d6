"""Every kind of data file, damaged at random: a reader gives finite data, or one line that names the file."""

import gzip
import json
import struct
import warnings
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from numpy.random import Generator
from PIL import Image

from diffrl.data.dataset import Data
from diffrl.data.files import folder, idx, npz
from diffrl.data.image_files import DataError
from diffrl.errors import FileError

RNG = np.random.default_rng(3)
X = RNG.integers(0, 256, (24, 5, 4), dtype=np.uint8)
LABELS = np.arange(24) % 3


@dataclass(frozen=True)
class Kind:
    """A kind of file.

    Args:
        write: makes a valid one below a folder; the path to read, and the file to damage.
        read: reads it.
    """

    write: Callable[[Path], tuple[Path, Path]]
    read: Callable[[str], Data]


def write_idx(root: Path, compress: bool) -> tuple[Path, Path]:
    raw = bytes([0, 0, 8, 3]) + struct.pack(">3I", *X.shape) + X.tobytes()
    path = root / "x"
    path.write_bytes(gzip.compress(raw) if compress else raw)
    return path, path


def write_npy(root: Path) -> tuple[Path, Path]:
    path = root / "x.npy"
    np.save(path, X[:, None].repeat(2, 3) / 127.5 - 1)
    return path, path


def write_npz(root: Path, compress: bool) -> tuple[Path, Path]:
    path = root / "x.npz"
    (np.savez_compressed if compress else np.savez)(path, images=X, labels=LABELS)
    return path, path


def write_images(root: Path, suffix: str) -> tuple[Path, Path]:
    exif = Image.Exif()
    exif[0x0112] = 6
    for name in ("ant", "cat"):
        (root / name).mkdir()
        for i in range(4):
            pixels = np.stack([X[i]] * 3, -1) if i % 2 else X[i]
            options = {"exif": exif} if suffix in ("jpg", "png", "tiff", "webp") else {}
            Image.fromarray(pixels).save(root / name / f"{i}.{suffix}", **options)
    return root, root / "cat" / f"1.{suffix}"


def write_zip(root: Path, packing: int) -> tuple[Path, Path]:
    (root / "tree").mkdir()
    write_images(root / "tree", "png")
    path = root / "x.zip"
    with zipfile.ZipFile(path, "w", packing) as archive:
        for file in sorted((root / "tree").rglob("*.png")):
            archive.write(file, file.relative_to(root / "tree").as_posix())
    return path, path


def write_table(root: Path) -> tuple[Path, Path]:
    write_images(root, "png")
    names = sorted(p.relative_to(root).as_posix() for p in root.rglob("*.png"))
    table = root / "dataset.json"
    table.write_text(
        json.dumps({"labels": [[name, i // 2 % 2] for i, name in enumerate(names)]}), encoding="utf-8"
    )
    return root, table


read_folder = partial(folder, conditional=True, test_fraction=0.5)
KINDS = {
    "idx": Kind(partial(write_idx, compress=False), idx),
    "idx.gz": Kind(partial(write_idx, compress=True), idx),
    "npy": Kind(write_npy, npz),
    "npz": Kind(partial(write_npz, compress=False), partial(npz, conditional=True)),
    "npz packed": Kind(partial(write_npz, compress=True), partial(npz, conditional=True)),
    "zip": Kind(partial(write_zip, packing=zipfile.ZIP_STORED), read_folder),
    "zip packed": Kind(partial(write_zip, packing=zipfile.ZIP_DEFLATED), read_folder),
    "dataset.json": Kind(write_table, read_folder),
    **{
        suffix: Kind(partial(write_images, suffix=suffix), read_folder)
        for suffix in ("png", "jpg", "gif", "bmp", "tiff", "webp", "ppm")
    },
}
FOREIGN = [
    b"\x89PNG\r\n\x1a\n",
    b"\x1f\x8b\x08\x00",
    b"PK\x03\x04",
    b"PK\x05\x06" + bytes(18),
    b"\x93NUMPY\x01\x00\x76\x00{'descr': '<f8', 'fortran_order': False, 'shape': (9999999999, 99), }",
    b"\x93NUMPY\x01\x00\x50\x00{'descr': '|O', 'fortran_order': False, 'shape': (-4,), }",
    b"\x93NUMPY\x03\x00",
    b"%PDF-1.7\n",
    bytes([0, 0, 8, 255]),
    bytes([0, 0, 14, 3]) + b"\xff" * 12,
    "λ und köln\n".encode("utf-16"),
    b"[" * 100_000,
    bytes(1000),
]


def damages(raw: bytes, g: Generator) -> Iterator[bytes]:
    """The file cut, with bytes flipped, blocks lost, doubled or zeroed; empty; and foreign ones."""
    yield b""
    yield raw + b"more"
    for share in (0.01, 0.3, 0.6, 0.9, 0.99):
        yield raw[: int(share * len(raw))]
    for _ in range(30):
        changed = bytearray(raw)
        for _ in range(int(g.integers(1, 4))):
            place = int(len(raw) * g.random() ** 2)  # headers stand at the beginning
            changed[place] ^= 1 << int(g.integers(8))
        yield bytes(changed)
    for _ in range(8):
        start, stop = sorted(int(i) for i in g.integers(0, len(raw), 2))
        yield raw[:start] + raw[stop:]
        yield raw[:stop] + raw[start:]
        yield raw[:start] + bytes(stop - start) + raw[stop:]
    yield g.bytes(len(raw))
    for foreign in FOREIGN:
        yield foreign
        yield foreign + raw


@pytest.mark.parametrize("name", list(KINDS))
def test_damaged_files_are_read_or_refused_in_one_line(tmp_path: Path, name: str) -> None:
    kind = KINDS[name]
    path, victim = kind.write(tmp_path)
    whole = kind.read(str(path))
    assert whole.train is not None
    raw = victim.read_bytes()
    read = refused = 0
    for changed in damages(raw, np.random.default_rng(4)):
        victim.write_bytes(changed)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # decoders warn of what they mend
                data = kind.read(str(path))
        except (DataError, FileError) as error:
            refused += 1
            assert "\n" not in str(error) and len(str(error)) < 1000, str(error)
            assert str(tmp_path) in str(error) or str(error).startswith(("npz: ", "idx: ", "folder: "))
        else:
            read += 1
            assert data.train is not None and data.train.isfinite().all() and data.test.isfinite().all()
            assert len(data.train_labels if data.train_labels is not None else data.train) == len(data.train)
    assert read + refused >= 80 and refused >= 20  # flipped pixels are no damage that can be seen
