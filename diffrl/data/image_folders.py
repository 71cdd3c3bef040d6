"""Readers of folders and zips of images. Every fault is a `DataError`."""

import json
import os
import stat
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffrl.data.decoding import decode
from diffrl.data.encoded import decode_all
from diffrl.data.image_files import MAX_GIB, DataError, check_labels, check_size, existing, readable
from diffrl.text_files import file_errors

__all__ = ["ImageFiles", "open_image_folder", "read_image", "read_image_folder"]

IMAGE_SUFFIXES = {".bmp", ".gif", ".jfif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
UNREAD_SUFFIXES = {".avif", ".heic", ".heif", ".jp2", ".jxl"}
LABELS = "dataset.json"  # where an archive of EDM's dataset_tool keeps its labels


@dataclass(frozen=True)
class _Tree:
    """What lies in a folder or zip: bytes of each file by name, all folders, names as stored, how to read a file."""

    where: str
    files: dict[str, int]
    folders: list[str]
    stored: dict[str, str]
    read_file: Callable[[str], bytes]
    max_gib: float

    def read(self, name: str) -> bytes:
        """The bytes of a file."""
        check_size(self.files[name], self.max_gib, f"{self.where}: {name}")
        with readable(self.where, f"{name} is unreadable"):
            return self.read_file(name)

    def images(self) -> list[str]:
        """Names of the images, sorted."""
        unread = [n for n in self.files if PurePosixPath(n).suffix.lower() in UNREAD_SUFFIXES]
        if unread:
            raise DataError(
                f"{self.where}: {unread[0]} is of a kind that is not read; convert it to png or remove it"
            )
        images = sorted(n for n in self.files if PurePosixPath(n).suffix.lower() in IMAGE_SUFFIXES)
        if not images:
            raise DataError(f"{self.where}: holds no image ({', '.join(sorted(IMAGE_SUFFIXES))})")
        return images


@contextmanager
def _opened(path: Path, max_gib: float) -> Iterator[_Tree]:
    """A folder or zip; hidden files are left out."""
    if path.is_dir():
        with readable(str(path), "unreadable folder"):
            found = {p.relative_to(path).as_posix(): p for p in _walk(path)}
            sizes = {name: _size_of(p) for name, p in found.items() if not p.is_dir()}
        folders = [name for name in found if name not in sizes]
        stored = {name: name for name in sizes}
        yield _Tree(str(path), sizes, folders, stored, lambda name: found[name].read_bytes(), max_gib)
        return
    with readable(str(path), "neither a folder nor a readable zip"):
        archive = zipfile.ZipFile(path)
    with archive:
        members: dict[str, zipfile.ZipInfo] = {}
        for info in archive.infolist():
            name = info.filename.replace("\\", "/")  # Windows packs "\"
            if members.setdefault(name, info) is not info and not name.endswith("/"):
                raise DataError(f"{path}: holds {name} twice; pack it anew")
        members = {n: info for n, info in members.items() if not any(map(_hidden, PurePosixPath(n).parts))}
        for name, info in members.items():
            if stat.S_ISLNK(info.external_attr >> 16):
                raise DataError(
                    f"{path}: {name} is a link, which cannot be followed in a zip; pack what it leads to"
                )
        sizes = {name: info.file_size for name, info in members.items() if not name.endswith("/")}
        folders = [name.rstrip("/") for name in members if name not in sizes]
        stored = {name: members[name].filename for name in sizes}
        yield _Tree(str(path), sizes, folders, stored, lambda name: archive.read(members[name]), max_gib)


def _hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"


def _walk(folder: Path, above: tuple[str, ...] = ()) -> Iterator[Path]:
    """Everything below a folder; links are followed."""
    real = os.path.realpath(folder)
    if real in above:
        raise DataError(f"{folder}: a link that leads back to a folder above it; remove it")
    with file_errors(folder):
        entries = sorted(p for p in folder.iterdir() if not _hidden(p.name))
    for entry in entries:
        yield entry
        if entry.is_dir():
            yield from _walk(entry, (*above, real))


def _size_of(path: Path) -> int:
    """Bytes of a regular file."""
    with file_errors(path):
        found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        raise DataError(f"{path}: a pipe or a device and no file; remove it")
    return found.st_size


def read_image(path: str | Path, size: int | None = None, max_gib: float = MAX_GIB) -> NDArray[np.uint8]:
    """One image file, as uint8 [C, H, W], C ∈ {1, 3}.

    Args:
        path: the file.
        size: crop it at its centre and resize it to size × size; None: as it is.
        max_gib: GiB of memory that it may take.

    Raises:
        DataError: it is missing, damaged, too large, or of more than 8 bits.
        MissingExtra: pillow is not installed.
    """
    path = existing(path)
    with readable(str(path), "unreadable image"):
        raw = path.read_bytes()
    return decode(raw, str(path), size, max_gib)


def _labels(tree: _Tree, images: list[str]) -> NDArray[Any] | None:
    """Class of each image: a number of the archive's own table, or the name of its folder; None without any."""
    tables = [n for n in tree.files if PurePosixPath(n).name == LABELS and n.count("/") <= 1]
    if tables:
        return _table_labels(tree, min(tables, key=len), images)
    names = _folder_classes(images, tree.folders, tree.where)
    return None if names is None else np.array(names)


def _table_labels(tree: _Tree, table: str, images: list[str]) -> NDArray[Any] | None:
    """Labels of dataset.json, ``{"labels": [["00000/img00000000.png", 6], ...]}`` or null.

    Source: dataset_tool.py of EDM (Karras et al., 2022), https://github.com/NVlabs/edm.
    """
    where = f"{tree.where}: {table}"
    with readable(tree.where, f"{table} is damaged, or no table of labels"):
        pairs = json.loads(tree.read(table).decode("utf-8-sig"))["labels"]
        if pairs is None:
            return None
        base = table.removesuffix(LABELS)
        names = [base + name.replace("\\", "/") for name, _ in pairs]
        found = dict(zip(names, (label for _, label in pairs), strict=True))
    if len(found) != len(names):
        twice = next(name for name, count in Counter(names).items() if count > 1)
        raise DataError(f"{where} names {twice} twice; leave one label for each image")
    if missing := [n for n in images if n not in found]:
        raise DataError(f"{where} has no label for {missing[0]}; add it, or remove the image")
    known = set(images)
    if extra := [n for n in names if n not in known]:
        raise DataError(f"{where} names {extra[0]}, which is no image here; copy it, or remove its label")
    labels = [found[n] for n in images]
    if not all(type(label) is int and abs(label) < 2**63 for label in labels):
        raise DataError(f"{where}: labels must be whole numbers, one for each image")
    return check_labels(np.array(labels), len(images), where)


def _folder_classes(images: list[str], folders: list[str], where: str) -> list[str] | None:
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


@dataclass(frozen=True)
class ImageFiles:
    """Images of a folder or zip, in the order of their names, read when they are asked for; it can be pickled.

    Args:
        path: folder or zip.
        names: of the images, as in errors.
        stored: the same, as the folder or zip has them.
        sizes: bytes of each.
        max_gib: GiB of memory that the bytes of one may take.
    """

    path: Path
    names: tuple[str, ...]
    stored: tuple[str, ...]
    sizes: tuple[int, ...]
    max_gib: float

    @property
    def where(self) -> str:
        """The folder or zip."""
        return str(self.path)

    def __len__(self) -> int:
        return len(self.names)

    def label(self, j: int) -> str:
        """The name of image j."""
        return self.names[j]

    def read(self, j: int) -> bytes:
        """The bytes of image j.

        Raises:
            DataError: they take too much memory, or cannot be read any more.
        """
        check_size(self.sizes[j], self.max_gib, f"{self.where}: {self.names[j]}")
        with readable(self.where, f"{self.names[j]} is unreadable"):
            if self._archive is None:
                return (self.path / self.stored[j]).read_bytes()
            return self._archive.read(self.stored[j])

    @cached_property
    def _archive(self) -> zipfile.ZipFile | None:
        """The zip, which each process opens for itself."""
        return None if self.path.is_dir() else zipfile.ZipFile(self.path)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key != "_archive"}


def open_image_folder(
    path: str | Path, size: int | None = None, conditional: bool = True, max_gib: float = MAX_GIB
) -> tuple[ImageFiles, NDArray[Any] | None]:
    """Images of a folder or zip, in the order of their names, and the class of each; no image is read yet.

    Images lie at the top (no classes) or in one folder for each class. If one single folder holds all of this, as in
    many zips, its contents are taken. An archive with a `dataset.json`, as EDM's dataset_tool makes it, has its classes
    from there alone: its folders are no classes, and the table must name every image and no other. Links are followed.
    Hidden files, and files without the suffix of an image, are ignored.

    Args:
        path: folder or zip file.
        size: what images will be resized to, at least 1, or None.
        conditional: read classes; if False, images may lie anywhere.
        max_gib: GiB of memory that any file may take.

    Returns:
        The images, and their N classes, as names or as numbers, or None.

    Raises:
        DataError: no image, empty class folder, a `dataset.json` that is broken or does not fit, links in a circle or
            in a zip.
        FileError: a folder or file cannot be read.
    """
    if size is not None and (type(size) is not int or size < 1):
        raise DataError(f"`size` is {size!r}; it must be at least 1, a whole number")
    path = existing(path, folder=True)
    with _opened(path, max_gib) as tree:
        images = tree.images()
        classes = _labels(tree, images) if conditional else None
        stored, sizes = tuple(tree.stored[n] for n in images), tuple(tree.files[n] for n in images)
    return ImageFiles(path, tuple(images), stored, sizes, max_gib), classes


def read_image_folder(
    path: str | Path, size: int | None = None, conditional: bool = True, max_gib: float = MAX_GIB
) -> tuple[NDArray[np.uint8], NDArray[Any] | None]:
    """Images of a folder or zip as `open_image_folder` finds them, all of them decoded.

    Images are turned as their EXIF orientation says. Gray ones keep one channel unless there are colour images too;
    palettes and CMYK become RGB; transparency and colour profiles are dropped; an animation gives its first frame.

    Args:
        path: folder or zip file.
        size: crop each image at its centre to a square and resize it to size × size (Lanczos).
        conditional: read classes; if False, images may lie anywhere.
        max_gib: GiB of memory that all images may take as float32, and any file; checked before it is taken.

    Returns:
        uint8 [N, C, H, W], C ∈ {1, 3}, and the N classes, as names or as numbers, or None.

    Raises:
        DataError: missing, damaged or too large file, images of different sizes, and see `open_image_folder`.
        FileError: a folder or file cannot be read.
        MissingExtra: pillow is not installed.
    """
    images, classes = open_image_folder(path, size, conditional, max_gib)
    return decode_all(images, size, max_gib), classes
