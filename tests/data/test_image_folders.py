"""Folders and archives as other programs write them: turned photographs, links, zips of Windows, EDM's labels."""

import json
import stat
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from diffrl.data.files import folder
from diffrl.data.image_files import DataError
from diffrl.data.image_folders import read_image_folder

RNG = np.random.default_rng(1)


def image(*shape: int) -> NDArray[np.uint8]:
    return RNG.integers(0, 256, shape or (4, 4, 3), dtype=np.uint8)


def save(path: Path, pixels: NDArray[np.uint8] | None = None, **options: Any) -> NDArray[np.uint8]:
    """A lossless image, of random pixels if none are given."""
    pixels = image() if pixels is None else pixels
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)
    return pixels


def scaled(pixels: NDArray[np.uint8]) -> torch.Tensor:
    return torch.from_numpy(pixels / 127.5 - 1).float().permute(2, 0, 1)


# --- orientation


@pytest.mark.parametrize(
    ("orientation", "turn"),
    [
        (1, lambda x: x),
        (2, np.fliplr),
        (3, lambda x: np.rot90(x, 2)),
        (4, np.flipud),
        (5, lambda x: x.swapaxes(0, 1)),
        (6, lambda x: np.rot90(x, -1)),
        (7, lambda x: np.rot90(x, 2).swapaxes(0, 1)),
        (8, np.rot90),
    ],
)
@pytest.mark.parametrize("suffix", ["png", "tiff"])
def test_images_are_turned_as_they_say(
    tmp_path: Path, orientation: int, turn: Callable[[NDArray], NDArray], suffix: str
) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = save(tmp_path / f"a.{suffix}", image(4, 6, 3), exif=exif)
    found, _ = read_image_folder(tmp_path, conditional=False)
    np.testing.assert_array_equal(found[0].transpose(1, 2, 0), turn(pixels))


def test_a_photograph_on_its_side_is_white_at_the_right(tmp_path: Path) -> None:
    white_at_the_top = np.zeros((8, 8), np.uint8)
    white_at_the_top[:4] = 255
    exif = Image.Exif()
    exif[0x0112] = 6
    save(tmp_path / "a.jpg", white_at_the_top, exif=exif, quality=100)
    found, _ = read_image_folder(tmp_path, conditional=False)
    assert found[0, 0, :, 5:].min() > 250 and found[0, 0, :, :3].max() < 5


# --- zips


def test_zips_made_on_windows_have_their_classes(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for name in ("cats", "ants"):
            for i in range(4):
                save(tmp_path / "one.png")
                name_there = f"top\\{name}\\{i}.png"
                archive.writestr(zipfile.ZipInfo(name_there), (tmp_path / "one.png").read_bytes())
    assert "top\\cats\\0.png" in zipfile.ZipFile(tmp_path / "a.zip").namelist()
    data = folder(str(tmp_path / "a.zip"), conditional=True, test_fraction=0.5)
    assert data.classes == ("ants", "cats") and data.train_labels is not None
    assert data.train_labels.tolist() == [0, 0, 1, 1]


def test_a_zip_that_holds_a_name_twice_is_refused(tmp_path: Path) -> None:
    save(tmp_path / "0.png")
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for name in ("cats/0.png", "cats\\0.png"):
            archive.writestr(zipfile.ZipInfo(name), (tmp_path / "0.png").read_bytes())
    with pytest.raises(DataError, match="holds cats/0.png twice"):
        folder(str(tmp_path / "a.zip"))


def test_links_in_a_zip_are_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        save(tmp_path / "one.png")
        archive.write(tmp_path / "one.png", "cats/0.png")
        link = zipfile.ZipInfo("dogs")
        link.create_system, link.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
        archive.writestr(link, "cats")
    with pytest.raises(DataError, match=r"a.zip: dogs is a link.*pack what it leads to"):
        folder(str(tmp_path / "a.zip"), conditional=True)


# --- links in folders


def test_linked_class_folders_are_followed(tmp_path: Path) -> None:
    for i in range(4):
        save(tmp_path / "elsewhere" / f"{i}.png")
        save(tmp_path / "root" / "ants" / f"{i}.png")
    (tmp_path / "root" / "cats").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "root" / "ants" / "4.png").symlink_to(tmp_path / "elsewhere" / "0.png")
    data = folder(str(tmp_path / "root"), conditional=True, test_fraction=0.5)
    assert data.classes == ("ants", "cats") and data.train is not None
    assert len(data.train) + len(data.test) == 9


def test_links_that_lead_in_a_circle_or_nowhere_are_refused(tmp_path: Path) -> None:
    save(tmp_path / "root" / "cats" / "0.png")
    circle = tmp_path / "root" / "cats" / "again"
    circle.symlink_to(tmp_path / "root")
    with pytest.raises(DataError, match="again: a link that leads back to a folder above it; remove it"):
        folder(str(tmp_path / "root"))
    circle.unlink()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "back").symlink_to(tmp_path / "root")
    circle.symlink_to(tmp_path / "other")  # a circle of two links
    with pytest.raises(DataError, match="leads back to a folder above it"):
        folder(str(tmp_path / "root"))
    circle.unlink()
    (tmp_path / "root" / "cats" / "1.png").symlink_to(tmp_path / "gone.png")
    with pytest.raises(OSError, match=r"1.png cannot be read.*not there"):
        folder(str(tmp_path / "root"))


def test_images_of_kinds_that_are_not_read_are_no_secret(tmp_path: Path) -> None:
    save(tmp_path / "0.png")
    (tmp_path / "1.heic").write_bytes(b"whatever")
    with pytest.raises(DataError, match=r"1.heic is of a kind that is not read; convert it"):
        folder(str(tmp_path))


# --- archives of EDM


def edm_archive(root: Path, labels: Any, packed: bool = False, top: str = "") -> str:
    """2 index folders of 4 images each, and the table of labels."""
    names = [f"{i // 4:05d}/img{i:08d}.png" for i in range(8)]
    for name in names:
        save(root / top / name)
    table = labels if isinstance(labels, str) else json.dumps({"labels": labels and labels(names)})
    (root / top / "dataset.json").write_text(table, encoding="utf-8")
    if not packed:
        return str(root)
    path = root.with_suffix(".zip")
    with zipfile.ZipFile(path, "w") as archive:
        for file in root.rglob("*"):
            archive.write(file, file.relative_to(root).as_posix())
    return str(path)


def by_turns(names: list[str]) -> list[list[Any]]:
    return [[name, 6 + i % 2] for i, name in enumerate(names)]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("top", ["", "cifar/"])
def test_labels_of_an_edm_archive_are_those_of_its_table(tmp_path: Path, packed: bool, top: str) -> None:
    path = edm_archive(tmp_path / "root", by_turns, packed, top)
    data = folder(path, conditional=True, test_fraction=0.25)
    assert data.classes == ("6", "7") and data.num_classes == 2
    assert data.train_labels is not None and data.test_labels is not None
    assert data.train_labels.tolist() == [0, 1, 0, 0, 1, 0] and data.test_labels.tolist() == [1, 1]
    assert folder(path, test_fraction=0.25).num_classes == 0


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (None, "no class folders and no labels; set `conditional` to false"),
        (lambda names: by_turns(names)[:-1], r"no label for 00001/img00000007.png"),
        (lambda names: [[name, [0.0, 1.0]] for name in names], "labels must be whole numbers"),
        (lambda names: [[name, -1] for name in names], "label -1 is negative"),
        (
            lambda names: [*by_turns(names), ["00001/lost.png", 6]],
            r"names 00001/lost.png, which is no image here",
        ),
        (lambda names: [*by_turns(names), [names[3], 6]], r"names 00000/img00000003.png twice; leave one"),
        (lambda names: [[name, None] for name in names], "labels must be whole numbers"),
        (lambda names: [[7, 6]], "dataset.json is damaged, or no table of labels"),
        (lambda names: [1, 2], "dataset.json is damaged, or no table of labels"),
        ('{"labels": [["0000', "dataset.json is damaged, or no table of labels"),
        ("[]", "dataset.json is damaged, or no table of labels"),
        ('{"more": 1}', "dataset.json is damaged, or no table of labels"),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_tables_of_labels_that_cannot_be_used_are_refused(
    tmp_path: Path, labels: Any, message: str, packed: bool
) -> None:
    with pytest.raises(DataError, match=message) as error:
        folder(edm_archive(tmp_path / "root", labels, packed), conditional=True)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("labels", [None, by_turns])
def test_index_folders_of_an_edm_archive_are_no_classes(tmp_path: Path, labels: Any) -> None:
    path = edm_archive(tmp_path / "root", labels)
    data = folder(path, test_fraction=0.25)
    assert data.num_classes == 0 and data.train is not None and len(data.train) == 6
    if labels:
        assert folder(path, conditional=True, test_fraction=0.25).classes == (
            "6",
            "7",
        )  # and not 00000, 00001


# --- what else a folder may lack


def test_conditional_data_without_classes_are_refused(tmp_path: Path) -> None:
    for i in range(4):
        save(tmp_path / f"{i}.png")
    with pytest.raises(DataError, match="no class folders and no labels; set `conditional` to false"):
        folder(str(tmp_path), conditional=True)


@pytest.mark.parametrize("size", [0, -3, 8.5, "8", True])
def test_sizes_below_one_are_refused(tmp_path: Path, size: Any) -> None:
    save(tmp_path / "0.png")
    with pytest.raises(DataError, match=f"`size` is {size!r}; it must be at least 1"):
        folder(str(tmp_path), size=size)
