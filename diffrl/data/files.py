"""Data sets that are read: scikit-learn's digits, and the user's own files."""

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import one_hot

from diffrl.data.dataset import Data
from diffrl.data.image_files import (
    DataError,
    events_from,
    images_from,
    labels_from,
    read_idx,
    read_image_folder,
    read_npz,
)
from diffrl.data.registry import DATASETS
from diffrl.extras import require

__all__ = ["digits", "folder", "idx", "npz"]

Part = tuple[Tensor, Tensor | None]  # samples [N, *E], and their labels [N] if they have any


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
    labels = torch.from_numpy(bunch.target.astype(np.int64))
    rank = one_hot(labels).cumsum(0).gather(1, labels[:, None])[:, 0]  # 1 for the first image of its class
    return _from_parts("digits", *_split("digits", (x, labels if conditional else None), rank % 5 == 0))


@DATASETS.register("idx")
def idx(
    path: str,
    labels: str | None = None,
    test_path: str | None = None,
    test_labels: str | None = None,
    test_fraction: float = 0.1,
) -> Data:
    """Images of idx files, the format of MNIST, gzipped or not.

    Without `test_path`, the last round(test_fraction·N) samples are test.

    Args:
        path: idx file of samples: uint8 images, or floats as `npz` takes them.
        labels: idx file of their classes; without it the set is unconditional.
        test_path: idx file of test samples; then test_fraction is unused.
        test_labels: idx file of their classes.
        test_fraction: part of `path` that is test, in (0, 1).

    Raises:
        DataError: any fault of a file, named in one sentence.
    """
    part = _idx_part(path, labels)
    if test_path is not None:
        return _from_parts("idx", part, _idx_part(test_path, test_labels))
    if test_labels is not None:
        raise DataError("idx: test_labels is given without test_path")
    return _from_parts("idx", *_split("idx", part, _test_mask(len(part[0]), test_fraction, spaced=False)))


@DATASETS.register("npz")
def npz(
    path: str, test_path: str | None = None, conditional: bool = False, test_fraction: float = 0.1
) -> Data:
    """Samples of an npz file (keys `x` or `images`, optional `labels`) or of an npy file.

    uint8 arrays are images, [N, H, W], [N, C, H, W] or [N, H, W, C], and are scaled to [-1, 1]. Float arrays
    keep their values: [N, C, H, W] must lie in [-1, 1]; vectors [N, D] and sequences [N, L, D] may lie
    outside, and `sigma_data` follows them. Without `test_path`, the last round(test_fraction·N) samples are
    test: shuffle a file that is sorted by class.

    Args:
        path: the file.
        test_path: file of test samples; then test_fraction is unused.
        conditional: use the labels, if there are any.
        test_fraction: part of `path` that is test, in (0, 1).

    Raises:
        DataError: any fault of a file, named in one sentence.
    """
    part = _npz_part(path, conditional)
    if test_path is not None:
        return _from_parts("npz", part, _npz_part(test_path, conditional))
    return _from_parts("npz", *_split("npz", part, _test_mask(len(part[0]), test_fraction, spaced=False)))


@DATASETS.register("folder")
def folder(
    path: str,
    size: int | None = None,
    test_path: str | None = None,
    conditional: bool = False,
    test_fraction: float = 0.1,
) -> Data:
    """Images of a folder or zip, one sub-folder for each class, or all at the top (unconditional).

    Images are ordered by name, classes too. Without `test_path`, index i is test where ⌊(i+1) f⌋ > ⌊i f⌋ with
    f = test_fraction (0.1: i % 10 == 9), so that every class of more than 1/f images is in both parts.

    Args:
        path: folder or zip.
        size: crop each image at its centre and resize it to size × size; None: all must be of one size.
        test_path: folder or zip of test images with the same classes; then test_fraction is unused.
        conditional: take classes from the sub-folders; False reads images anywhere and makes no labels.
        test_fraction: part of `path` that is test, in (0, 1).

    Raises:
        DataError: any fault of a file, named in one sentence.
        MissingExtra: pillow is not installed.
    """
    part, names = _folder_part(path, size, conditional)
    if test_path is None:
        mask = _test_mask(len(part[0]), test_fraction, spaced=True)
        return _from_parts("folder", *_split("folder", part, mask))
    test, test_names = _folder_part(test_path, size, conditional)
    if test_names != names:
        raise DataError(f"{test_path}: its class folders {test_names} are not those of {path}, {names}")
    return _from_parts("folder", part, test)


def _idx_part(path: str, labels: str | None) -> Part:
    x = events_from(read_idx(path), path)
    return x, None if labels is None else labels_from(read_idx(labels), len(x), labels)


def _npz_part(path: str, conditional: bool) -> Part:
    array, labels = read_npz(path)
    x = events_from(array, path)
    return x, labels_from(labels, len(x), path) if conditional and labels is not None else None


def _folder_part(path: str, size: int | None, conditional: bool) -> tuple[Part, list[str]]:
    """Samples with labels, and the names of the classes."""
    pixels, classes = read_image_folder(path, size, conditional)
    names = sorted(set(classes or ()))
    labels = None if classes is None else torch.tensor([names.index(c) for c in classes])
    return (images_from(pixels), labels), names


def _from_parts(name: str, train: Part, test: Part) -> Data:
    (x, y), (x_test, y_test) = train, test
    if (y is None) != (y_test is None):
        raise DataError(f"{name}: give labels for both the training and the test samples, or for neither")
    num_classes = 0 if y is None or y_test is None else int(max(y.max(), y_test.max())) + 1
    return Data(name, x_test, y_test, x, y, num_classes)


def _split(name: str, part: Part, is_test: Tensor) -> tuple[Part, Part]:
    """Training and test part by a mask."""
    x, y = part
    if bool(is_test.all()) or not bool(is_test.any()):
        raise DataError(
            f"{name}: {len(x)} samples are too few for a train and a test part; change test_fraction"
        )
    return (x[~is_test], None if y is None else y[~is_test]), (x[is_test], None if y is None else y[is_test])


def _test_mask(N: int, test_fraction: float, spaced: bool) -> Tensor:
    """The last round(f N) indices, or spaced: every i with ⌊(i+1) f⌋ > ⌊i f⌋."""
    if not 0 < test_fraction < 1:
        raise DataError(f"test_fraction is {test_fraction}; it must lie between 0 and 1")
    i = torch.arange(N, dtype=torch.float64)
    if not spaced:
        return i >= N - round(test_fraction * N)
    # 1e-9: a product such as 0.1·30 counts as whole
    return ((i + 1) * test_fraction + 1e-9).floor() > (i * test_fraction + 1e-9).floor()
