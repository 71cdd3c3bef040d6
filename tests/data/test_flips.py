"""Mirror images of training images: exactly those, of the same classes, and nothing else is changed."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from diffrl.data.dataset import Data, pieces
from diffrl.data.files import folder, idx, npz
from diffrl.data.image_files import DataError
from diffrl.training.trials import held_out

RNG = np.random.default_rng(4)
PIXELS = RNG.integers(0, 256, (40, 3, 4, 6), dtype=np.uint8)
LABELS = np.arange(40) % 4


def as_npz(root: Path) -> str:
    np.savez(root / "a.npz", x=PIXELS, labels=LABELS)
    return str(root / "a.npz")


def as_folder(root: Path) -> str:
    for i, (pixels, label) in enumerate(zip(PIXELS, LABELS, strict=True)):
        (root / "images" / f"{label}").mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.transpose(1, 2, 0)).save(root / "images" / f"{label}" / f"{i:02d}.png")
    return str(root / "images")


def as_idx(root: Path) -> str:
    head = bytes([0, 0, 8, 3]) + b"".join(n.to_bytes(4, "big") for n in (40, 4, 6))
    (root / "a.idx").write_bytes(head + PIXELS[:, 0].tobytes())
    return str(root / "a.idx")


def reader(kind: str, root: Path, **options: Any) -> Data:
    if kind == "idx":
        return idx(as_idx(root), test_fraction=0.25, **options)
    if kind == "folder":
        return folder(as_folder(root), conditional=True, test_fraction=0.25, **options)
    return npz(as_npz(root), conditional=True, test_fraction=0.25, mapped=kind == "mapped", **options)


def samples(data: Data) -> Tensor:
    if data.rows is not None:
        return torch.cat([*pieces(data.rows)])
    assert data.train is not None
    return data.train


@pytest.mark.parametrize("kind", ["idx", "npz", "mapped", "folder"])
def test_mirror_images_stand_behind_the_images(tmp_path: Path, kind: str) -> None:
    plain, flipped = reader(kind, tmp_path), reader(kind, tmp_path, flip=True)
    x, both = samples(plain), samples(flipped)
    assert (plain.num_train, flipped.num_train, flipped.mirrored) == (30, 60, True)
    assert torch.equal(both[:30], x)
    by_hand = torch.stack([x[..., 5 - column] for column in range(6)], -1)
    assert torch.equal(both[30:], by_hand) and not torch.equal(both[30:], x)
    assert torch.equal(plain.test, flipped.test) and plain.fingerprint != flipped.fingerprint
    if kind != "idx":
        assert plain.train_labels is not None and flipped.train_labels is not None
        assert torch.equal(flipped.train_labels, plain.train_labels.repeat(2))
        assert flipped.class_shares == plain.class_shares
    torch.testing.assert_close(flipped.sigma_data, plain.sigma_data, rtol=1e-12, atol=0)


@pytest.mark.parametrize("kind", ["npz", "mapped"])
def test_an_image_and_its_mirror_image_are_held_out_together(tmp_path: Path, kind: str) -> None:
    trained, held = (samples(part) for part in held_out(reader(kind, tmp_path, flip=True), seed=2))
    assert (len(trained), len(held)) == (54, 6)
    for part in (trained, held):
        assert torch.equal(part[len(part) // 2 :], part[: len(part) // 2].flip(-1))
    assert not any(torch.equal(a, b) for a in trained for b in held)


def test_what_is_no_image_has_no_mirror_image(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", RNG.normal(size=(40, 3)))
    for mapped in (False, True):
        with pytest.raises(DataError, match=r"`flip` is for images \[C, H, W\], not for samples of \(3,\)"):
            npz(str(tmp_path / "a.npy"), flip=True, mapped=mapped)


def test_mirror_images_count_for_the_memory(tmp_path: Path) -> None:
    size = 30 * 72 * 4 / 2**30  # of the training images
    with pytest.raises(DataError, match="with its mirror images: takes .* raise `max_gib`"):
        reader("npz", tmp_path, flip=True, max_gib=1.9 * size)
    assert reader("npz", tmp_path, flip=True, max_gib=2.1 * size).num_train == 60
