"""From what a reader found, samples and the class of each, to a data set: split, classes, mirror images."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffrl.data.dataset import Data
from diffrl.data.image_files import DataError, check_size
from diffrl.data.numbered import NumberedRows
from diffrl.data.splits import Split

__all__ = ["Part", "check_test_part", "elsewhere", "from_parts", "split_by"]

Part = tuple[Tensor | NumberedRows, NDArray[Any] | None]
"""Samples [N, *E], and the class of each, a number or a name, if it has any."""


def elsewhere(path: str, test_path: str, train: Part, test: Part) -> Split:
    """All samples of another file.

    Raises:
        DataError: it is the one that is trained on.
    """
    if Path(path).expanduser().resolve() == Path(test_path).expanduser().resolve():
        raise DataError(f"{test_path}: `test_path` is what is trained on; give another, or leave it out")
    everything = torch.ones(len(test[0]), dtype=torch.bool)
    return Split.of(f"all samples of {Path(test_path).name}", everything, train=len(train[0]))


def from_parts(
    name: str,
    train: Part,
    test: Part,
    split: Split,
    flip_gib: float | None = None,
    workers: int = 0,
    class_names: Sequence[str] | None = None,
) -> Data:
    """A set whose classes are those of its training labels, in order.

    Args:
        name: of the set.
        train: what is trained on.
        test: what is held out, in memory.
        split: which samples these are.
        flip_gib: with mirror images, if they take no more GiB of memory than this; None: without.
        workers: see `Data`.
        class_names: of labels that are numbers, the name of each; None: they are called by their numbers.
    """
    flip = flip_gib is not None
    (x, y), (x_test, y_test) = train if flip_gib is None else _with_mirrors(name, train, flip_gib), test
    assert isinstance(x_test, Tensor)
    if (y is None) != (y_test is None):
        raise DataError(f"{name}: give labels for both the training and the test samples, or for neither")
    memory, stored = (x, None) if isinstance(x, Tensor) else (None, x)
    more: dict[str, Any] = {"rows": stored, "mirrored": flip, "split": split, "workers": workers}
    if y is None or y_test is None:
        return Data(name, x_test, train=memory, **more)
    classes = np.unique(y)
    if untrained := sorted(set(y_test.tolist()) - set(classes.tolist())):
        raise DataError(
            f"{name}: class {untrained[0]!r} has test samples, but none to train on; shuffle a file that is sorted, "
            "or change `test_fraction`"
        )
    numbers, test_numbers = (torch.from_numpy(np.searchsorted(classes, part)) for part in (y, y_test))
    called = tuple(str(c) if class_names is None else class_names[c] for c in classes.tolist())
    return Data(name, x_test, test_numbers, memory, numbers, len(classes), classes=called, **more)


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


def check_test_part(x: Tensor | NumberedRows, is_test: Tensor, max_gib: float, where: str) -> None:
    """Refuse a test part that takes too much memory, of samples that stay where they are.

    Raises:
        DataError: it does.
    """
    if not isinstance(x, Tensor):
        size = 4 * int(is_test.sum()) * x[torch.tensor([0])].numel()
        check_size(size, max_gib, f"{where}: its test part by `test_fraction`")


def split_by(name: str, part: Part, is_test: Tensor, rule: str) -> tuple[Part, Part, Split]:
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
