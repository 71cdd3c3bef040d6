"""What is held out is said, in words and by a hash of the numbers, and is what is held out."""

import hashlib
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from diffrl.data.dataset import Data, pieces
from diffrl.data.files import digits, folder, idx, npz
from diffrl.data.splits import Split
from diffrl.data.synthetic import rings

PIXELS = np.random.default_rng(5).integers(0, 256, (30, 3, 2), dtype=np.uint8)


def hashed(numbers: list[int]) -> str:
    return hashlib.sha256(b"".join(struct.pack("<q", i) for i in numbers)).hexdigest()[:16]


def as_folder(root: Path) -> str:
    for i, pixels in enumerate(PIXELS):
        (root / "images").mkdir(exist_ok=True)
        Image.fromarray(pixels).save(root / "images" / f"{i:02d}.png")
    return str(root / "images")


def as_npz(root: Path) -> str:
    np.savez(root / "a.npz", x=PIXELS)
    return str(root / "a.npz")


def as_idx(root: Path) -> str:
    head = bytes([0, 0, 8, 3]) + b"".join(n.to_bytes(4, "big") for n in (30, 3, 2))
    (root / "a.idx").write_bytes(head + PIXELS.tobytes())
    return str(root / "a.idx")


LAST = ("the last 6 of 30 samples", [24, 25, 26, 27, 28, 29])
SPACED = ("every sample i of 30 with ⌊(i+1) f⌋ > ⌊i f⌋, f = 0.2", [4, 9, 14, 19, 24, 29])


@pytest.mark.parametrize(
    ("reader", "write", "options", "expected"),
    [
        (idx, as_idx, {}, LAST),
        (npz, as_npz, {}, LAST),
        (npz, as_npz, {"mapped": True, "flip": True}, LAST),
        (folder, as_folder, {}, SPACED),
        (folder, as_folder, {"flip": True}, SPACED),
    ],
)
def test_a_split_says_which_samples_are_test(
    tmp_path: Path, reader: Any, write: Any, options: dict[str, Any], expected: tuple[str, list[int]]
) -> None:
    data: Data = reader(write(tmp_path), test_fraction=0.2, **options)
    rule, numbers = expected
    assert data.split == Split(rule, 24, 6, hashed(numbers))
    x = torch.from_numpy(PIXELS).float()[:, None] / 127.5 - 1
    assert torch.equal(data.test, x[numbers])
    train = data.train if data.rows is None else torch.cat([*pieces(data.rows)])
    assert train is not None and torch.equal(train[:24], x[[i for i in range(30) if i not in numbers]])


def test_other_files_digits_and_laws(tmp_path: Path) -> None:
    path = as_npz(tmp_path)
    np.save(tmp_path / "test.npy", PIXELS[:4])
    found = npz(path, test_path=str(tmp_path / "test.npy")).split
    assert found == Split("all samples of test.npy", 30, 4, hashed([0, 1, 2, 3]))
    found = digits().split
    assert found is not None and (found.rule, found.train, found.test) == (
        "every fifth image of each class",
        1442,
        355,
    )
    assert digits(conditional=True).split == found and rings().split is None


def test_it_is_told_in_a_line() -> None:
    split = Split("the last 1,000 of 10,000 samples", 9000, 1000, "0123456789abcdef")
    assert str(split) == (
        "the last 1,000 of 10,000 samples (9,000 to train on, 1,000 held out, indices 0123456789abcdef)"
    )
