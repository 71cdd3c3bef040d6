"""Labels of files, the names and shares of classes, and where an array keeps its channels."""

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from diffrl.data.dataset import Data
from diffrl.data.files import digits, npz
from diffrl.data.image_files import DataError
from diffrl.training.build import build_data

RNG = np.random.default_rng(2)
VECTORS = np.linspace(-1, 1, 40).reshape(20, 2)


def stored(path: Path, x: NDArray, labels: NDArray | None = None) -> str:
    np.savez(path, x=x) if labels is None else np.savez(path, x=x, labels=labels)
    return str(path)


# --- labels


@pytest.mark.parametrize("labels", [[1, 2, 3], [0, 2_000_000_000], [5], [7, 3, 250]])
@pytest.mark.parametrize("dtype", ["int64", "uint32", "uint64"])
def test_labels_of_any_numbers_become_classes_with_their_names(
    tmp_path: Path, labels: list[int], dtype: str
) -> None:
    y = np.resize(labels, 20).astype(dtype)
    data = npz(stored(tmp_path / "a.npz", VECTORS, y), conditional=True, test_fraction=0.2)
    assert data.num_classes == len(labels) and data.classes == tuple(map(str, sorted(labels)))
    assert data.train_labels is not None and data.test_labels is not None
    numbers = torch.cat([data.train_labels, data.test_labels])
    assert numbers.dtype == torch.int64
    assert [int(data.classes[c]) for c in numbers] == y.tolist()


def test_classes_that_are_only_in_the_test_part_are_refused(tmp_path: Path) -> None:
    path = stored(tmp_path / "a.npz", VECTORS, np.repeat([0, 1, 2, 3], 5))
    with pytest.raises(DataError, match="class 3 has test samples, but none to train on; shuffle"):
        npz(path, conditional=True, test_fraction=0.25)


def test_labels_that_are_asked_for_and_not_there_are_missed(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a.npz: holds no array `labels`; set `conditional` to false"):
        npz(stored(tmp_path / "a.npz", VECTORS), conditional=True)


def test_errors_name_options_as_they_are_typed(tmp_path: Path) -> None:
    config = {"name": "npz", "path": stored(tmp_path / "a.npz", VECTORS), "conditional": True}
    with pytest.raises(DataError, match=r"set data\.conditional to false"):
        build_data({"data": config})
    for side in (4, 5):
        Image.new("L", (side, 4)).save(tmp_path / f"{side}.png")
    with pytest.raises(DataError, match=r"5\.png is 5x4, but 4\.png is 4x4; give data\.size to resize all"):
        build_data({"data": {"name": "folder", "path": str(tmp_path), "size": None}})
    with pytest.raises(DataError, match=r"raise data\.max_gib to allow it"):
        build_data({"data": {"name": "folder", "path": str(tmp_path), "size": 4, "max_gib": 1e-9}})


def test_class_shares_are_those_of_the_training_rows() -> None:
    y = torch.tensor([0] * 94 + [1] * 6)
    x = torch.randn(100, 2)
    data = Data("mine", x[:2], y[:2], x, y, 3, classes=("ant", "bee", "cat"))
    assert data.class_shares == pytest.approx((0.94, 0.06, 0.0))
    assert digits().class_shares == () == digits().classes
    labelled = digits(conditional=True)
    assert labelled.classes == tuple("0123456789") and sum(labelled.class_shares) == pytest.approx(1)


def test_names_must_be_as_many_as_classes() -> None:
    x, y = torch.randn(6, 2), torch.arange(6) % 3
    with pytest.raises(DataError, match="2 names for 3 classes"):
        Data("mine", x, y, x, y, 3, classes=("a", "b"))


# --- channels


@pytest.mark.parametrize("dtype", [np.float32, np.uint8])
@pytest.mark.parametrize("shape", [(3, 6, 5), (1, 6, 6), (4, 8, 8), (16, 8, 8), (2, 7, 7)])
@pytest.mark.parametrize("layout", ["first", "last"])
def test_channels_are_found_at_either_end(
    tmp_path: Path, dtype: type, shape: tuple[int, int, int], layout: str
) -> None:
    x = RNG.integers(0, 256, (10, *shape), dtype=np.uint8)
    given = x if dtype is np.uint8 else (x / 127.5 - 1).astype(dtype)
    data = npz(
        stored(tmp_path / "a.npz", given if layout == "first" else np.moveaxis(given, 1, -1)),
        test_fraction=0.5,
    )
    torch.testing.assert_close(data.test, torch.from_numpy(x[5:] / 127.5 - 1).float())


@pytest.mark.parametrize("shape", [(3, 6, 3), (1, 28, 1), (6, 6, 6), (5, 6, 7)])
@pytest.mark.parametrize("dtype", [np.float32, np.uint8])
def test_channels_that_may_be_at_both_ends_are_asked_for(
    tmp_path: Path, shape: tuple[int, int, int], dtype: type
) -> None:
    x: NDArray = (2 * RNG.integers(0, 2, (10, *shape)) - 1).astype(dtype)
    path = stored(tmp_path / "a.npz", x)
    with pytest.raises(DataError, match="not clearly.*set `channels` to first or last"):
        npz(path)
    assert npz(path, channels="first").event_shape == shape
    assert npz(path, channels="last").event_shape == (shape[2], *shape[:2])
    with pytest.raises(DataError, match="`channels` is 'NHWC'; give auto, first or last"):
        npz(path, channels="NHWC")
