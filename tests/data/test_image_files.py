"""Files of samples: written here, read back, then damaged in every way that a user's file may be."""

import gzip
import struct
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from diffrl.data.files import folder, idx, npz
from diffrl.data.image_files import DataError
from diffrl.extras import MissingExtra

RNG = np.random.default_rng(0)


def write_idx(path: Path, array: NDArray, code: int = 0x08, compress: bool = False) -> str:
    raw = bytes([0, 0, code, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    raw += array.astype(array.dtype.newbyteorder(">")).tobytes()
    path.write_bytes(gzip.compress(raw) if compress else raw)
    return str(path)


def images(n: int = 20, shape: tuple[int, ...] = (5, 4)) -> NDArray[np.uint8]:
    return RNG.integers(0, 256, (n, *shape), dtype=np.uint8)


def scaled(x: NDArray[np.uint8]) -> torch.Tensor:
    return torch.from_numpy(x / 127.5 - 1).float()


def save_image(path: Path, pixels: NDArray[np.uint8]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def zip_of(tree: Path, path: Path, prefix: str = "") -> str:
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(tree.rglob("*"), reverse=True):  # the order in the archive must not matter
            archive.write(file, prefix + file.relative_to(tree).as_posix())
    return str(path)


def check_one_line(error: pytest.ExceptionInfo[DataError]) -> None:
    assert "\n" not in str(error.value)


# --- idx


@pytest.mark.parametrize("compress", [False, True])
def test_idx_round_trip_with_the_last_part_as_test(tmp_path: Path, compress: bool) -> None:
    x, y = images(), (np.arange(20) % 4).astype(np.uint8)
    path = write_idx(tmp_path / "x", x, compress=compress)
    data = idx(path, write_idx(tmp_path / "y", y, compress=compress), test_fraction=0.25)
    assert data.train is not None and data.train_labels is not None and data.test_labels is not None
    assert data.event_shape == (1, 5, 4) and data.num_classes == 4
    torch.testing.assert_close(data.train[:, 0], scaled(x[:15]))
    torch.testing.assert_close(data.test[:, 0], scaled(x[15:]))
    assert data.train_labels.tolist() == y[:15].tolist() and data.test_labels.tolist() == y[15:].tolist()


def test_idx_with_a_test_file_of_its_own(tmp_path: Path) -> None:
    x, x_test = images(12), images(3)
    data = idx(write_idx(tmp_path / "x", x), test_path=write_idx(tmp_path / "t", x_test))
    assert data.train is not None and data.num_classes == 0
    torch.testing.assert_close(data.train[:, 0], scaled(x))
    torch.testing.assert_close(data.test[:, 0], scaled(x_test))


def test_idx_floats_are_read_in_big_endian(tmp_path: Path) -> None:
    x = RNG.standard_normal((10, 3)).astype(np.float64)
    data = idx(write_idx(tmp_path / "x", x, code=0x0E))
    assert data.train is not None
    torch.testing.assert_close(torch.cat([data.train, data.test]), torch.from_numpy(x).float())


@pytest.mark.parametrize("cut", [2, 6, 17, 60])
def test_truncated_idx_is_refused(tmp_path: Path, cut: int) -> None:
    path = Path(write_idx(tmp_path / "x", images()))
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(DataError, match="truncated|not an idx file") as error:
        idx(str(path))
    check_one_line(error)


def test_damaged_gzip_is_refused(tmp_path: Path) -> None:
    path = Path(write_idx(tmp_path / "x", images(), compress=True))
    raw = path.read_bytes()
    for damaged in (raw[:40], raw[:-3], raw[:20] + bytes(20) + raw[40:]):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match="unreadable or truncated"):
            idx(str(path))


def test_idx_labels_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    x = write_idx(tmp_path / "x", images())
    with pytest.raises(DataError, match="20 whole numbers"):
        idx(x, write_idx(tmp_path / "y", np.zeros(19, np.uint8)))
    with pytest.raises(DataError, match="label -1 is negative"):
        idx(x, write_idx(tmp_path / "y", np.full(20, -1, np.int8), code=0x09))
    with pytest.raises(DataError, match="without test_path"):
        idx(x, test_labels=x)
    with pytest.raises(DataError, match="labels for both"):
        idx(
            x,
            write_idx(tmp_path / "y", np.zeros(20, np.uint8)),
            test_path=write_idx(tmp_path / "z", images()),
        )


def test_idx_of_other_integers_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="dtype int16 is ambiguous"):
        idx(write_idx(tmp_path / "x", np.zeros((9, 2), np.int16), code=0x0B))


# --- npz, npy


@pytest.mark.parametrize("key", ["x", "images"])
def test_npz_vectors_keep_their_values(tmp_path: Path, key: str) -> None:
    x = 7 * RNG.standard_normal((30, 6))
    y = np.arange(30) % 3
    arrays: dict[str, Any] = {key: x, "labels": y}
    np.savez(tmp_path / "a.npz", **arrays)
    data = npz(str(tmp_path / "a.npz"), conditional=True, test_fraction=0.1)
    assert data.train is not None and data.test_labels is not None and data.num_classes == 3
    torch.testing.assert_close(data.train, torch.from_numpy(x[:27]).float())
    torch.testing.assert_close(data.test, torch.from_numpy(x[27:]).float())
    assert data.test_labels.tolist() == y[27:].tolist()
    assert data.sigma_data == pytest.approx(x[:27].astype(np.float32).astype(np.float64).std())
    assert npz(str(tmp_path / "a.npz")).num_classes == 0


@pytest.mark.parametrize("layout", ["NHW", "NCHW", "NHWC"])
def test_8_bit_arrays_become_channels_first_images(tmp_path: Path, layout: str) -> None:
    x = images(10, (3, 6, 5))
    stored = {"NHW": x[:, 0], "NCHW": x, "NHWC": np.moveaxis(x, 1, -1)}[layout]
    np.save(tmp_path / "a.npy", stored)
    data = npz(str(tmp_path / "a.npy"), test_fraction=0.5)
    torch.testing.assert_close(data.test, scaled(x[5:, :1] if layout == "NHW" else x[5:]))


def test_npz_with_a_test_file_of_its_own(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", RNG.standard_normal((8, 2)))
    np.save(tmp_path / "b.npy", RNG.standard_normal((3, 2)))
    np.save(tmp_path / "c.npy", RNG.standard_normal((3, 4)))
    data = npz(str(tmp_path / "a.npy"), test_path=str(tmp_path / "b.npy"))
    assert data.train is not None and (len(data.train), len(data.test)) == (8, 3)
    with pytest.raises(DataError, match="does not fit samples"):
        npz(str(tmp_path / "a.npy"), test_path=str(tmp_path / "c.npy"))


def with_value(x: NDArray, index: tuple[int, ...], value: float) -> NDArray:
    x = x.copy()
    x[index] = value
    return x


VECTORS = np.linspace(-1, 1, 40).reshape(20, 2)


@pytest.mark.parametrize(
    ("message", "array"),
    [
        ("sample 11 holds NaN or infinity", with_value(VECTORS, (11, 1), np.nan)),
        ("sample 3 holds NaN or infinity", with_value(VECTORS, (3, 0), -np.inf)),
        ("sample 0 holds NaN or infinity", with_value(VECTORS, (0, 0), 1e300)),  # beyond float32
        ("dtype int64 is ambiguous", np.arange(40).reshape(20, 2)),
        ("dtype bool is ambiguous", VECTORS > 0),
        ("dtype complex128 is ambiguous", VECTORS * 1j),
        ("not clearly", np.zeros((20, 6), np.uint8)),
        ("not clearly", np.zeros((20, 6, 6, 6), np.uint8)),
        ("not clearly", np.zeros((20, 3, 6, 3), np.uint8)),
        (r"must lie in \[-1, 1\].*\[0, 255\]", np.linspace(0, 255, 720).reshape(20, 1, 6, 6)),
        ("not shape", np.zeros(20)),
        ("not shape", np.zeros((0, 2))),
        ("1 samples are too few", VECTORS[:1]),
        ("every value is the same", np.ones((20, 2))),
    ],
)
def test_arrays_that_cannot_be_used_are_refused(tmp_path: Path, message: str, array: NDArray) -> None:
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(DataError, match=message) as error:
        npz(str(tmp_path / "a.npy"))
    check_one_line(error)


@pytest.mark.parametrize("suffix", ["npz", "npy"])
def test_damaged_arrays_are_refused(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    np.savez(path, x=VECTORS) if suffix == "npz" else np.save(path, VECTORS)
    raw = path.read_bytes()
    for damaged in (b"", b"hello", raw[:50], raw[: len(raw) // 2], raw[:-60]):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match="unreadable, truncated") as error:
            npz(str(path))
        check_one_line(error)


def test_pickles_and_wrong_keys_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.array([{"a": 1}], dtype=object))
    with pytest.raises(DataError, match="unreadable, truncated or no npz"):
        npz(str(tmp_path / "a.npy"))
    np.savez(tmp_path / "b.npz", data=VECTORS)
    with pytest.raises(DataError, match=r"named 'x' or 'images', but holds \['data'\]"):
        npz(str(tmp_path / "b.npz"))
    np.savez(tmp_path / "c.npz", x=VECTORS, labels=np.linspace(0, 1, 20))
    with pytest.raises(DataError, match="20 whole numbers.*not float64"):
        npz(str(tmp_path / "c.npz"), conditional=True)


@pytest.mark.parametrize("test_fraction", [0.0, 1.0, -0.1])
def test_fractions_that_leave_no_part_are_refused(tmp_path: Path, test_fraction: float) -> None:
    np.save(tmp_path / "a.npy", VECTORS)
    with pytest.raises(DataError, match="between 0 and 1"):
        npz(str(tmp_path / "a.npy"), test_fraction=test_fraction)


@pytest.mark.parametrize("load", [idx, npz, folder])
def test_missing_files_are_refused(tmp_path: Path, load: Callable) -> None:
    with pytest.raises(DataError, match="nowhere: no such file or folder") as error:
        load(str(tmp_path / "nowhere"))
    check_one_line(error)


@pytest.mark.parametrize("load", [idx, npz])
def test_a_folder_in_place_of_a_file_is_refused(tmp_path: Path, load: Callable) -> None:
    with pytest.raises(DataError, match="unreadable"):
        load(str(tmp_path))


@pytest.mark.parametrize("pool", [1, 2, 3])
def test_pooled_pixels_are_means_of_blocks(tmp_path: Path, pool: int) -> None:
    x, x_test = images(7, (6, 12)), images(3, (6, 12))
    path, test_path = write_idx(tmp_path / "x", x), write_idx(tmp_path / "t", x_test)
    np.savez(tmp_path / "x.npz", x=x[..., None])
    np.savez(tmp_path / "t.npz", x=x_test[..., None])
    read = [
        idx(path, test_path=test_path, pool=pool),
        npz(str(tmp_path / "x.npz"), test_path=str(tmp_path / "t.npz"), pool=pool),
    ]
    for data in read:
        assert data.train is not None and data.event_shape == (1, 6 // pool, 12 // pool)
        for got, pixels in ((data.train, x), (data.test, x_test)):
            rows, columns = 6 // pool, 12 // pool
            for i, j in ((0, 0), (rows - 1, columns - 1), (rows - 1, 0)):
                block = pixels[:, pool * i : pool * (i + 1), pool * j : pool * (j + 1)]
                torch.testing.assert_close(got[:, 0, i, j], scaled(block).mean((1, 2)))
    assert (read[0].fingerprint == idx(path, test_path=test_path).fingerprint) == (pool == 1)


@pytest.mark.parametrize("pool", [0, -2, 1.5, True])
def test_a_pool_that_is_no_size_is_refused(tmp_path: Path, pool: float) -> None:
    with pytest.raises(ValueError, match="pool is .*whole number"):
        idx(write_idx(tmp_path / "x", images()), pool=pool)


def test_what_cannot_be_pooled_is_refused(tmp_path: Path) -> None:
    x = write_idx(tmp_path / "x", images(20, (6, 4)))
    for pool in (3, 4, 12):
        with pytest.raises(DataError, match=f"H and W divisible by {pool}") as error:
            idx(x, pool=pool)
        check_one_line(error)
    np.save(tmp_path / "a.npy", VECTORS)
    with pytest.raises(DataError, match="cannot be pooled by 2"):
        npz(str(tmp_path / "a.npy"), pool=2)


# --- folders and zips of images


def tree(root: Path, per_class: int = 6, size: tuple[int, ...] = (4, 6, 3)) -> dict[str, NDArray[np.uint8]]:
    """Two classes of lossless images; returns them by name."""
    pixels = {}
    for name in ("cat", "ant"):
        for i in range(per_class):
            pixels[f"{name}/{i:02d}.png"] = images(1, size)[0]
            save_image(root / name / f"{i:02d}.png", pixels[f"{name}/{i:02d}.png"])
    return pixels


@pytest.mark.parametrize("form", ["folder", "zip", "zip around a folder"])
def test_folder_is_ordered_by_name_and_split_within_classes(tmp_path: Path, form: str) -> None:
    root = tmp_path / "root"
    pixels = tree(root)
    (root / "notes.txt").write_text("no image", encoding="utf-8")
    (root / "cat" / ".hidden.png").write_bytes(b"no image")
    path = str(root) if form == "folder" else zip_of(root, tmp_path / "a.zip", "top/" * (form != "zip"))
    data = folder(path, conditional=True, test_fraction=0.5)
    assert data.train is not None and data.train_labels is not None and data.test_labels is not None
    assert data.event_shape == (3, 4, 6) and data.num_classes == 2
    expected = torch.stack([scaled(pixels[n]).permute(2, 0, 1) for n in sorted(pixels)])  # ant before cat
    torch.testing.assert_close(data.train, expected[0::2])
    torch.testing.assert_close(data.test, expected[1::2])
    assert data.train_labels.tolist() == data.test_labels.tolist() == [0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize(("test_fraction", "expected"), [(0.1, [9, 19, 29]), (0.2, [4, 9, 14, 19, 24, 29])])
def test_test_indices_are_spaced(tmp_path: Path, test_fraction: float, expected: list[int]) -> None:
    for i in range(30):
        save_image(tmp_path / "a" / f"{i:02d}.png", np.full((2, 2), 8 * i, np.uint8))
    data = folder(str(tmp_path / "a"), test_fraction=test_fraction)
    assert ((data.test[:, 0, 0, 0] + 1) * 127.5 / 8).round().long().tolist() == expected


def test_images_at_the_top_are_unconditional_and_gray_stays_one_channel(tmp_path: Path) -> None:
    x = images(10, (5, 5))
    for i, pixels in enumerate(x):
        save_image(tmp_path / f"{i}.png", pixels)
    data = folder(str(tmp_path), test_fraction=0.5)
    assert data.num_classes == 0
    torch.testing.assert_close(data.test[:, 0], scaled(x[1::2]))


def test_gray_among_colour_and_palettes_become_colour(tmp_path: Path) -> None:
    gray, colour = images(1, (4, 4))[0], images(1, (4, 4, 3))[0]
    save_image(tmp_path / "0.png", gray)
    save_image(tmp_path / "1.png", colour)
    Image.fromarray(gray).convert("P").save(tmp_path / "2.png")
    alpha = np.concatenate([colour, images(1, (4, 4, 1))[0]], -1)
    save_image(tmp_path / "3.png", alpha)
    data = folder(str(tmp_path), test_fraction=0.5)
    assert data.train is not None and data.event_shape == (3, 4, 4)
    as_colour = scaled(np.stack([gray] * 3))
    torch.testing.assert_close(data.train, torch.stack([as_colour, as_colour]))
    torch.testing.assert_close(data.test, torch.stack([scaled(colour).permute(2, 0, 1)] * 2))


def test_size_crops_the_centre_and_resizes(tmp_path: Path) -> None:
    wide = np.zeros((4, 8, 3), np.uint8)
    wide[:, 2:6] = 200  # the central square
    save_image(tmp_path / "0.png", wide)
    save_image(tmp_path / "1.png", np.full((6, 6, 3), 50, np.uint8))
    save_image(tmp_path / "2.png", np.full((2, 3, 3), 100, np.uint8))
    data = folder(str(tmp_path), size=2, test_fraction=0.5)
    assert data.train is not None
    levels = torch.tensor([200, 100])[:, None, None, None] / 127.5 - 1
    torch.testing.assert_close(data.train, levels.expand(2, 3, 2, 2))
    torch.testing.assert_close(data.test, torch.full((1, 3, 2, 2), 50 / 127.5 - 1))


def test_a_test_folder_of_its_own_must_have_the_same_classes(tmp_path: Path) -> None:
    tree(tmp_path / "train")
    tree(tmp_path / "test", per_class=2)
    data = folder(str(tmp_path / "train"), conditional=True, test_path=str(tmp_path / "test"))
    assert data.train is not None and data.test_labels is not None
    assert (len(data.train), data.test_labels.tolist()) == (12, [0, 0, 1, 1])
    (tmp_path / "test" / "ant").rename(tmp_path / "test" / "bee")
    with pytest.raises(DataError, match=r"class folders \['bee', 'cat'\] are not those"):
        folder(str(tmp_path / "train"), conditional=True, test_path=str(tmp_path / "test"))


def damage_size(root: Path) -> None:
    save_image(root / "cat" / "03.png", images(1, (5, 6, 3))[0])


def damage_bytes(root: Path) -> None:
    raw = (root / "cat" / "03.png").read_bytes()
    (root / "cat" / "03.png").write_bytes(raw[: len(raw) // 2])


def damage_text(root: Path) -> None:
    (root / "cat" / "03.png").write_text("not an image", encoding="utf-8")


def damage_empty_class(root: Path) -> None:
    (root / "bee").mkdir()


def damage_depth(root: Path) -> None:
    save_image(root / "stray.png", images(1, (4, 6, 3))[0])


def damage_mode(root: Path) -> None:
    Image.fromarray(np.full((4, 6), 40_000, np.uint16)).save(root / "cat" / "03.png")


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_size, "cat/03.png is 6x5, but ant/00.png is 6x4; give `size`"),
        (damage_bytes, "cat/03.png: unreadable or truncated image"),
        (damage_text, "cat/03.png: unreadable or truncated image"),
        (damage_empty_class, "class folder 'bee' holds no image"),
        (damage_depth, "all lie at the top or all in class/image"),
        (damage_mode, "cat/03.png: image mode I;16 is not 8-bit"),
    ],
)
def test_damaged_folders_are_refused(
    tmp_path: Path, damage: Callable[[Path], None], message: str, packed: bool
) -> None:
    root = tmp_path / "root"
    tree(root)
    damage(root)
    with pytest.raises(DataError, match=message) as error:
        folder(zip_of(root, tmp_path / "a.zip") if packed else str(root), conditional=True)
    check_one_line(error)


def test_damaged_and_empty_archives_are_refused(tmp_path: Path) -> None:
    tree(tmp_path / "root")
    path = Path(zip_of(tmp_path / "root", tmp_path / "a.zip"))
    raw = path.read_bytes()
    path.write_bytes(raw[:-200])
    with pytest.raises(DataError, match="neither a folder nor a readable zip"):
        folder(str(path))
    start = raw.index(b"ant/05.png") + len(b"ant/05.png")
    path.write_bytes(raw[: start + 60] + bytes(20) + raw[start + 80 :])  # the checksum no longer fits
    with pytest.raises(DataError, match=r"ant/05.png is unreadable"):
        folder(str(path))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no image"):
        folder(str(tmp_path / "empty"))


def test_missing_pillow_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree(tmp_path)
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(MissingExtra, match=r"pip install 'diffrl\[data\]'"):
        folder(str(tmp_path))


def test_without_classes_images_may_lie_anywhere(tmp_path: Path) -> None:
    tree(tmp_path)
    damage_depth(tmp_path)
    assert folder(str(tmp_path)).num_classes == 0


@pytest.mark.parametrize("mapped", [False, True])
def test_images_between_0_and_1_are_told(mapped: bool, tmp_path: Path) -> None:
    """As torchvision's ToTensor makes them; a set that goes below 0 is silent."""
    x = np.random.default_rng(0).random((20, 1, 5, 5))
    np.save(tmp_path / "x.npy", x)
    with pytest.warns(UserWarning, match=r"x.npy: no held-out image has a value below 0, .*store 2 x - 1"):
        npz(str(tmp_path / "x.npy"), mapped=mapped)
    np.save(tmp_path / "y.npy", 2 * x - 1)
    npz(str(tmp_path / "y.npy"), mapped=mapped)


def test_what_is_trained_on_is_no_test(tmp_path: Path) -> None:
    path = str(tmp_path / "x.npy")
    np.save(path, np.random.default_rng(0).normal(size=(20, 2)))
    with pytest.raises(DataError, match="`test_path` is what is trained on"):
        npz(path, test_path=f"{tmp_path}/../{tmp_path.name}/x.npy")
