"""Data sets that are read: scikit-learn's digits, and the user's own files."""

import warnings

import numpy as np
import torch
from torch import Tensor

from diffrl.data.dataset import Data
from diffrl.data.encoded import images_of
from diffrl.data.image_files import (
    MAX_GIB,
    DataError,
    check_labels,
    events_from,
    pooled,
    read_idx,
    read_npz,
)
from diffrl.data.image_folders import open_image_folder
from diffrl.data.mapped import MappedRows, map_npz
from diffrl.data.parts import Part, check_test_part, elsewhere, from_parts, split_by
from diffrl.data.registry import DATASETS
from diffrl.data.splits import last, spaced
from diffrl.extras import require

__all__ = ["digits", "folder", "idx", "npz"]


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
    return from_parts("digits", *split_by("digits", part, torch.from_numpy(rank % 5 == 0), rule))


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
        split = elsewhere(path, test_path, part, test)
        return _in_range(from_parts("idx", part, test, split, max_gib if flip else None), path)
    if test_labels is not None:
        raise DataError("idx: test_labels is given without test_path")
    parts = split_by("idx", part, *last(len(part[0]), test_fraction))
    return _in_range(from_parts("idx", *parts, max_gib if flip else None), path)


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
        split = elsewhere(path, test_path, part, test)
        return _in_range(from_parts("npz", part, test, split, max_gib if flip else None), path)
    mask, rule = last(len(part[0]), test_fraction)
    check_test_part(part[0], mask, max_gib, path)
    return _in_range(from_parts("npz", *split_by("npz", part, mask, rule), max_gib if flip else None), path)


@DATASETS.register("folder")
def folder(
    path: str,
    size: int | None = None,
    test_path: str | None = None,
    conditional: bool = False,
    test_fraction: float = 0.1,
    max_gib: float = MAX_GIB,
    mapped: bool = False,
    workers: int = 0,
    flip: bool = False,
) -> Data:
    """Images of a folder or zip, one sub-folder for each class, or all at the top (unconditional).

    Images are ordered by name, classes too; an archive of EDM's dataset_tool has its classes from its `dataset.json`.
    Without `test_path`, index i is test where ⌊(i+1) f⌋ > ⌊i f⌋ with f = test_fraction (0.1: i % 10 == 9), so that
    every class of more than 1/f images is in both parts.

    With `mapped` the training images stay in their files, and one is decoded each time that it is drawn, to what it
    would be otherwise: for sets that do not fit in memory. Every file is read once at the start, for its hash.

    Args:
        path: folder or zip.
        size: crop each image at its centre and resize it to size × size; None: all must be of one size.
        test_path: folder or zip of test images with the same classes; then test_fraction is unused.
        conditional: take classes from the sub-folders or from `dataset.json`; False reads images anywhere and makes
            no labels.
        test_fraction: part of `path` that is test, in (0, 1).
        max_gib: GiB of memory that the images may take.
        mapped: leave the training images in their files, which must stay as they are meanwhile.
        workers: with `mapped`, processes that decode and augment batches ahead of the training; their number changes
            no batch.
        flip: train on the mirror image of every training image too, left for right, after the images themselves; test
            images stay as they are.

    Raises:
        DataError: any fault of a file, named in one sentence.
        FileError: a folder or file cannot be read.
        MissingExtra: pillow is not installed.
    """
    part, flip_gib = _folder_part(path, size, conditional, max_gib, mapped), max_gib if flip else None
    if test_path is None:
        mask, rule = spaced(len(part[0]), test_fraction)
        check_test_part(part[0], mask, max_gib, path)
        return from_parts("folder", *split_by("folder", part, mask, rule), flip_gib, workers)
    test = _folder_part(test_path, size, conditional, max_gib)
    names, test_names = ([] if y is None else np.unique(y).tolist() for _, y in (part, test))
    if test_names != names:
        raise DataError(f"{test_path}: its class folders {test_names} are not those of {path}, {names}")
    return from_parts("folder", part, test, elsewhere(path, test_path, part, test), flip_gib, workers)


def _in_range(data: Data, path: str) -> Data:
    """The data; where images seem to lie in [0, 1], a warning says so."""
    if data.test.ndim == 4 and float(data.test.min()) >= 0:
        warnings.warn(
            f"{path}: no held-out image has a value below 0, but images are meant to lie in [-1, 1]: store 2 x - 1, or "
            "8-bit images",
            stacklevel=3,
        )
    return data


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


def _folder_part(
    path: str, size: int | None, conditional: bool, max_gib: float, mapped: bool = False
) -> Part:
    images, classes = open_image_folder(path, size, conditional, max_gib)
    if conditional and classes is None:
        raise DataError(f"{path}: holds no class folders and no labels; set `conditional` to false")
    return images_of(images, size, max_gib, mapped), classes
