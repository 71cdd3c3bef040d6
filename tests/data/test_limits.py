"""Files that would take more memory than they may, or never end, are refused before anything is taken."""

import gzip
import io
import os
import struct
import threading
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffrl.data.files import folder, idx, npz
from diffrl.data.image_files import DataError, read_npz
from diffrl.data.registry import DATASETS

MIB = 2**20
GIB = 2**30


def idx_header(*shape: int) -> bytes:
    return bytes([0, 0, 0x08, len(shape)]) + struct.pack(f">{len(shape)}I", *shape)


def npy_header(shape: tuple[int, ...], dtype: str = "|u1") -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": dtype, "fortran_order": False, "shape": shape})
    return file.getvalue()


def packed_zeros(path: Path, head: bytes, zeros: int) -> str:
    """A gz file of a header and zeros."""
    with gzip.open(path, "wb", compresslevel=9) as file:
        file.write(head)
        for _ in range(zeros // MIB):
            file.write(bytes(MIB))
    return str(path)


def zip_with_zeros(path: Path, member: str, head: bytes, zeros: int) -> str:
    """A zip of one member: a header and zeros, packed."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open(member, "w") as file:
        file.write(head)
        for _ in range(zeros // MIB):
            file.write(bytes(MIB))
    return str(path)


def picture(path: Path, side: int) -> str:
    path.mkdir()
    for name in "abcd":
        Image.linear_gradient("L").resize((side, side)).save(path / f"{name}.png")
    return str(path)


def big_idx(root: Path) -> Callable[[], object]:
    path = root / "x"
    path.write_bytes(idx_header(1000, 3000, 3000))
    return lambda: idx(str(path))


def big_gz(root: Path) -> Callable[[], object]:
    path = packed_zeros(root / "x.gz", idx_header(64, 1024, 1024), 64 * MIB)
    return lambda: idx(path, max_gib=1 / 16)


def big_labels(root: Path) -> Callable[[], object]:
    (root / "x").write_bytes(idx_header(4, 1, 2) + bytes(range(8)))
    (root / "y").write_bytes(idx_header(2**32 - 1))
    return lambda: idx(str(root / "x"), str(root / "y"))


def big_npy(root: Path) -> Callable[[], object]:
    path = root / "x.npy"
    path.write_bytes(npy_header((10**6, 10**6), "<f4"))
    return lambda: npz(str(path))


def big_npz(root: Path) -> Callable[[], object]:
    path = zip_with_zeros(root / "x.npz", "x.npy", npy_header((64, 1024, 1024)), 64 * MIB)
    return lambda: npz(path, max_gib=1 / 16)


def big_member(root: Path) -> Callable[[], object]:
    path = zip_with_zeros(root / "x.zip", "a/0.png", b"", 96 * MIB)
    return lambda: folder(path, max_gib=1 / 16)


def big_file(root: Path) -> Callable[[], object]:
    with (root / "0.png").open("wb") as file:
        file.truncate(9 * GIB)  # sparse: it takes no room on the disk
    return lambda: folder(str(root))


def big_images(root: Path) -> Callable[[], object]:
    path = picture(root / "images", 3000)
    return lambda: folder(path, max_gib=1 / 16)


def big_size(root: Path) -> Callable[[], object]:
    path = picture(root / "images", 8)
    return lambda: folder(path, size=100_000)


BIG = [big_idx, big_gz, big_labels, big_npy, big_npz, big_member, big_file, big_images, big_size]


@pytest.mark.parametrize("make", BIG, ids=lambda make: make.__name__)
def test_what_takes_too_much_memory_is_refused_before_it_is_taken(
    tmp_path: Path, make: Callable[[Path], Callable[[], object]]
) -> None:
    read = make(tmp_path)
    tracemalloc.start()
    try:
        with pytest.raises(
            DataError, match=r"takes .* GiB of memory, more than .*; raise `max_gib`"
        ) as error:
            read()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert "\n" not in str(error.value)
    assert peak < 32 * MIB  # one image may be decoded; all would take 64 and more


def test_the_limit_counts_samples_as_they_are_kept_and_can_be_raised(tmp_path: Path) -> None:
    x = np.random.default_rng(0).integers(0, 256, (64, 64, 64), dtype=np.uint8)  # 1 MiB as float32
    np.save(tmp_path / "x.npy", x)
    with pytest.raises(DataError, match=r"takes 0.000977 GiB of memory, more than 0.0009"):
        npz(str(tmp_path / "x.npy"), max_gib=0.0009)
    assert npz(str(tmp_path / "x.npy"), max_gib=1 / 1024).event_shape == (1, 64, 64)


@pytest.mark.parametrize("max_gib", [0.0, -1.0, float("nan")])
@pytest.mark.parametrize("name", ["idx", "npz", "folder"])
def test_every_reader_has_the_limit(tmp_path: Path, name: str, max_gib: float) -> None:
    np.save(tmp_path / "npz", np.eye(20))
    (tmp_path / "npz.npy").rename(tmp_path / "npz")
    (tmp_path / "idx").write_bytes(idx_header(10, 1, 2) + bytes(range(20)))
    picture(tmp_path / "folder", 4)
    DATASETS[name](path=str(tmp_path / name), test_fraction=0.25)
    with pytest.raises(DataError, match="GiB of memory"):
        DATASETS[name](path=str(tmp_path / name), test_fraction=0.25, max_gib=max_gib)


# --- no files at all


@pytest.mark.parametrize("load", [idx, npz, folder])
def test_pipes_and_devices_are_refused_and_not_waited_for(tmp_path: Path, load: Callable) -> None:
    os.mkfifo(tmp_path / "pipe")
    found: list[BaseException] = []

    def read(path: Path) -> None:
        try:
            load(str(path))
        except BaseException as error:
            found.append(error)

    for path in (tmp_path / "pipe", Path("/dev/zero")):
        thread = threading.Thread(target=read, args=[path], daemon=True)
        thread.start()
        thread.join(20)
        assert not thread.is_alive() and isinstance(found[-1], DataError)
        assert str(found[-1]) == f"{path}: unreadable, as it is a pipe or a device; give a file"


def test_a_pipe_among_the_images_is_refused(tmp_path: Path) -> None:
    picture(tmp_path / "images", 4)
    os.mkfifo(tmp_path / "images" / "e.png")
    with pytest.raises(DataError, match=r"e.png: a pipe or a device and no file; remove it"):
        folder(str(tmp_path / "images"))


def test_members_that_are_no_arrays_are_refused_and_others_left_alone(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=np.eye(6))
    with zipfile.ZipFile(tmp_path / "a.npz", "a") as archive:
        archive.writestr("notes.txt", "no array, and not asked for")
    assert read_npz(tmp_path / "a.npz")[0].shape == (6, 6)
    with zipfile.ZipFile(tmp_path / "b.npz", "w") as archive:
        archive.writestr("x", "no array")
    with pytest.raises(DataError, match=r"b.npz: x: unreadable, truncated or no npz/npy file.*magic string"):
        npz(str(tmp_path / "b.npz"))


@pytest.mark.parametrize("path", ["a\0b", "~nobody-has-this-name/x", "n" * 300, ""])
@pytest.mark.parametrize("load", [idx, npz, folder])
def test_paths_that_are_none_are_refused(
    load: Callable, path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError):
        load(path)
