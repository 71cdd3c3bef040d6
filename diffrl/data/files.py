"""Data sets that are read: scikit-learn's digits, and the user's own files."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffrl.data.dataset import Data
from diffrl.data.image_files import (
    MAX_GIB,
    DataError,
    check_labels,
    check_size,
    events_from,
    images_from,
    pooled,
    read_idx,
    read_npz,
)
from diffrl.data.image_folders import read_image_folder
from diffrl.data.mapped import MappedRows, map_npz
from diffrl.data.registry import DATASETS
from diffrl.data.splits import Split, last, spaced
from diffrl.extras import require

__all__ = ["digits", "folder", "idx", "npz"]

# samples [N, *E], and the class of each, a number or a name, if it has any
Part = tuple[Tensor | MappedRows, NDArray[Any] | None]


@DATASETS.register("digits")
def digits(conditional: bool = False) -> Data:
    """The 1,797 handwritten digits of scikit-learn, images of shape (1, 8, 8) in [-1, 1], 10 classes.

    Every fifth image of each class, in scikit-learn's order, is test (355), the others train (1,442). Taking every
    fifth image of all would be uneven, as the order has a pattern: 52 threes, but only 21 ones.

    Source: Optical Recognition of Handwritten Digits (Alpaydin & Kaynak, 1998), https://doi.org/10.24432/C50P49.

    Args:
        conditional: whether the set has labels.

    Raises:
        MissingExtra: scikit-learn is not installed.
    """
    bunch = require("sklearn.datasets", "data").load_digits()
    x = torch.from_numpy(bunch.images[:, None] / 8 - 1).float()
    one_hot = np.eye(10)[bunch.target]
    rank = (one_hot.cumsum(0) * one_hot).sum(1)  # 1 for the first image of its class
    part = x, bunch.target if conditional else None
    rule = "every fifth image of each class"
    return _from_parts("digits", *_split("digits", part, torch.from_numpy(rank % 5 == 0), rule))


@DATASETS.register("idx")
def idx(
    path: str,
    labels: str | None = None,
    test_path: str | None = None,
    test_labels: str | None = None,
    test_fraction: float = 0.1,
    max_gib: float = MAX_GIB,
    pool: int = 1,
    flip: bool = False,
) -> Data:
    """Images of idx files, the format of MNIST, gzipped or not.

    Without `test_path`, the last round(test_fraction·N) samples are test.

    Args:
        path: idx file of samples: uint8 images, or floats as `npz` takes them.
        labels: idx file of their classes; without it the set is unconditional.
        test_path: idx file of test samples; then test_fraction is unused.
        test_labels: idx file of their classes.
        test_fraction: part of `path` that is test, in (0, 1).
        max_gib: GiB of memory that a file's samples may take.
        pool: take means over blocks of pool × pool pixels, which must divide the images; 2 makes 14×14 of 28×28.
        flip: train on the mirror image of every training image too, left for right, after the images themselves; test
            images stay as they are.

    Raises:
        DataError: any fault of a file, named in one sentence.
    """
    part = _idx_part(path, labels, max_gib, pool)
    if test_path is not None:
        test = _idx_part(test_path, test_labels, max_gib, pool)
        return _from_parts("idx", part, test, _elsewhere(test_path, part, test), max_gib if flip else None)
    if test_labels is not None:
        raise DataError("idx: test_labels is given without test_path")
    return _from_parts(
        "idx", *_split("idx", part, *last(len(part[0]), test_fraction)), max_gib if flip else None
    )


@DATASETS.register("npz")
def npz(
    path: str,
    test_path: str | None = None,
    conditional: bool = False,
    test_fraction: float = 0.1,
    channels: str = "auto",
    max_gib: float = MAX_GIB,
    pool: int = 1,
    mapped: bool = False,
    flip: bool = False,
) -> Data:
    """Samples of an npz file (keys `x` or `images`, optional `labels`) or of an npy file.

    uint8 arrays are images, [N, H, W], [N, C, H, W] or [N, H, W, C], and are scaled to [-1, 1]. Float arrays keep
    their values: images [N, C, H, W] or [N, H, W, C] must lie in [-1, 1]; vectors [N, D] and sequences [N, L, D] may
    lie outside, and `sigma_data` follows them. Labels may be any whole numbers ≥ 0; classes are numbered in their
    order. Without `test_path`, the last round(test_fraction·N) samples are test: shuffle a file that is sorted by
    class.

    With `mapped` the training samples stay in the file, and a row is read and converted each time that it is drawn, to
    the values that it would have otherwise: for data that do not fit in memory. Test samples are read. What needs all
    training samples at once, such as the exact denoiser, is then not to be had (see `diffrl.data.Data`).

    Args:
        path: the file.
        test_path: file of test samples; then test_fraction is unused.
        conditional: use the labels.
        test_fraction: part of `path` that is test, in (0, 1).
        channels: where the channels of images lie: first, last, or auto, which tells it from the shape.
        max_gib: GiB of memory that a file's samples may take.
        pool: take means over blocks of pool × pool pixels, which must divide the images.
        mapped: leave the training samples in the file, an npy file, or an npz file that `numpy.savez` wrote, in C
            order; it must stay as it is meanwhile.
        flip: train on the mirror image of every training image too, left for right, after the images themselves; test
            images stay as they are.

    Raises:
        DataError: any fault of a file, named in one sentence.
    """
    part = _npz_part(path, conditional, channels, max_gib, pool, mapped)
    if test_path is not None:
        test = _npz_part(test_path, conditional, channels, max_gib, pool)
        return _from_parts("npz", part, test, _elsewhere(test_path, part, test), max_gib if flip else None)
    mask, rule = last(len(part[0]), test_fraction)
    if mapped:
        size = 4 * int(mask.sum()) * part[0][torch.tensor([0])].numel()
        check_size(size, max_gib, f"{path}: its test part of `test_fraction` {test_fraction:g}")
    return _from_parts("npz", *_split("npz", part, mask, rule), max_gib if flip else None)


@DATASETS.register("folder")
def folder(
    path: str,
    size: int | None = None,
    test_path: str | None = None,
    conditional: bool = False,
    test_fraction: float = 0.1,
    max_gib: float = MAX_GIB,
    flip: bool = False,
) -> Data:
    """Images of a folder or zip, one sub-folder for each class, or all at the top (unconditional).

    Images are ordered by name, classes too; an archive of EDM's dataset_tool has its classes from its `dataset.json`.
    Without `test_path`, index i is test where ⌊(i+1) f⌋ > ⌊i f⌋ with f = test_fraction (0.1: i % 10 == 9), so that
    every class of more than 1/f images is in both parts.

    Args:
        path: folder or zip.
        size: crop each image at its centre and resize it to size × size; None: all must be of one size.
        test_path: folder or zip of test images with the same classes; then test_fraction is unused.
        conditional: take classes from the sub-folders or from `dataset.json`; False reads images anywhere and makes
            no labels.
        test_fraction: part of `path` that is test, in (0, 1).
        max_gib: GiB of memory that the images may take.
        flip: train on the mirror image of every training image too, left for right, after the images themselves; test
            images stay as they are.

    Raises:
        DataError: any fault of a file, named in one sentence.
        FileError: a folder or file cannot be read.
        MissingExtra: pillow is not installed.
    """
    part = _folder_part(path, size, conditional, max_gib)
    if test_path is None:
        parts = _split("folder", part, *spaced(len(part[0]), test_fraction))
        return _from_parts("folder", *parts, max_gib if flip else None)
    test = _folder_part(test_path, size, conditional, max_gib)
    names, test_names = ([] if y is None else np.unique(y).tolist() for _, y in (part, test))
    if test_names != names:
        raise DataError(f"{test_path}: its class folders {test_names} are not those of {path}, {names}")
    return _from_parts("folder", part, test, _elsewhere(test_path, part, test), max_gib if flip else None)


def _idx_part(path: str, labels: str | None, max_gib: float, pool: int) -> Part:
    x = pooled(events_from(read_idx(path, max_gib), path), pool, path)
    return x, None if labels is None else check_labels(read_idx(labels, max_gib), len(x), labels)


def _npz_part(
    path: str, conditional: bool, channels: str, max_gib: float, pool: int, mapped: bool = False
) -> Part:
    x: Tensor | MappedRows
    if mapped:
        array, labels = map_npz(path, max_gib)
        x = MappedRows(array, path, np.arange(len(array)), channels, pool)
    else:
        array, labels = read_npz(path, max_gib)
        x = pooled(events_from(array, path, channels), pool, path)
    if not conditional:
        return x, None
    if labels is None:
        raise DataError(f"{path}: holds no array `labels`; set `conditional` to false, or store them")
    return x, check_labels(labels, len(x), path)


def _folder_part(path: str, size: int | None, conditional: bool, max_gib: float) -> Part:
    pixels, classes = read_image_folder(path, size, conditional, max_gib)
    if conditional and classes is None:
        raise DataError(f"{path}: holds no class folders and no labels; set `conditional` to false")
    return images_from(pixels), classes


def _elsewhere(test_path: str, train: Part, test: Part) -> Split:
    """All samples of another file."""
    everything = torch.ones(len(test[0]), dtype=torch.bool)
    return Split.of(f"all samples of {Path(test_path).name}", everything, train=len(train[0]))


def _from_parts(name: str, train: Part, test: Part, split: Split, flip_gib: float | None = None) -> Data:
    """A set whose classes are those of its training labels, in order; with mirror images if they may take so much."""
    flip = flip_gib is not None
    (x, y), (x_test, y_test) = train if flip_gib is None else _with_mirrors(name, train, flip_gib), test
    assert isinstance(x_test, Tensor)
    if (y is None) != (y_test is None):
        raise DataError(f"{name}: give labels for both the training and the test samples, or for neither")
    memory, stored = (x, None) if isinstance(x, Tensor) else (None, x)
    if y is None or y_test is None:
        return Data(name, x_test, train=memory, rows=stored, mirrored=flip, split=split)
    classes = np.unique(y)
    if untrained := sorted(set(y_test.tolist()) - set(classes.tolist())):
        raise DataError(
            f"{name}: class {untrained[0]!r} has test samples, but none to train on; shuffle a file that is sorted, "
            "or change `test_fraction`"
        )
    numbers, test_numbers = (torch.from_numpy(np.searchsorted(classes, part)) for part in (y, y_test))
    return Data(
        name,
        x_test,
        test_numbers,
        memory,
        numbers,
        len(classes),
        classes=tuple(map(str, classes)),
        rows=stored,
        mirrored=flip,
        split=split,
    )


def _with_mirrors(name: str, part: Part, max_gib: float) -> Part:
    """Images, and behind them their mirror images, of the same classes."""
    x, y = part
    image = x[torch.tensor([0])]
    if image.ndim != 4:
        raise DataError(
            f"{name}: `flip` is for images [C, H, W], not for samples of {tuple(image.shape[1:])}"
        )
    if isinstance(x, Tensor):
        check_size(8 * x.numel(), max_gib, f"{name}: with its mirror images")
        x = torch.cat([x, x.flip(-1)])
    else:
        x = x.with_mirrors()
    return x, None if y is None else np.concatenate([y, y])


def _split(name: str, part: Part, is_test: Tensor, rule: str) -> tuple[Part, Part, Split]:
    """Training and test part by a mask and its rule."""
    x, y = part
    if bool(is_test.all()) or not bool(is_test.any()):
        raise DataError(
            f"{name}: {len(x)} samples are too few for a train and a test part; change `test_fraction`"
        )
    train, test = (mask.nonzero()[:, 0] for mask in (~is_test, is_test))
    y_train, y_test = (None if y is None else y[i.numpy()] for i in (train, test))
    kept = x[train] if isinstance(x, Tensor) else x.take(train)
    return (kept, y_train), (x[test], y_test), Split.of(rule, is_test)
