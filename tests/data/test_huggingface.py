"""Data sets of the library `datasets` on this machine: the images of a folder, without a word to any hub."""

import io
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from diffrl.data import huggingface
from diffrl.data.huggingface import hf
from diffrl.data.image_files import DataError
from diffrl.extras import MissingExtra

PIXELS = np.random.default_rng(2).integers(0, 256, (20, 4, 6, 3), dtype=np.uint8)
X = torch.from_numpy(PIXELS.astype(np.float32)).div(127.5).sub(1).permute(0, 3, 1, 2)
LABELS = [i % 2 for i in range(20)]


def png(pixels: Any) -> bytes:
    raw = io.BytesIO()
    Image.fromarray(pixels).save(raw, "png")
    return raw.getvalue()


@pytest.fixture
def datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The library, with a cache of its own and no network."""
    found = pytest.importorskip("datasets")

    def refuse(*_: Any) -> None:
        raise AssertionError("the network is asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(found.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    found.disable_progress_bars()
    return found


def table(datasets: Any, **more: list[Any]) -> Any:
    kinds = {"picture": datasets.Image(), "animal": datasets.ClassLabel(names=["dog", "cat"])}
    columns = {"picture": [{"bytes": png(p), "path": None} for p in PIXELS], "animal": LABELS}
    made = datasets.Dataset.from_dict(columns, features=datasets.Features(kinds))
    for name, values in more.items():
        made = made.add_column(name, values)
    return made


def rows(data: Any, n: int) -> Tensor:
    found: Tensor = data.rows[torch.arange(n)]
    return found


def test_every_form_on_the_disk_gives_the_images_of_the_set(datasets: Any, tmp_path: Path) -> None:
    made = table(datasets, tag=[f"t{i % 3}" for i in range(20)])
    made.save_to_disk(str(tmp_path / "saved"))
    (tmp_path / "hub").mkdir()
    made.to_parquet(str(tmp_path / "hub" / "train-00000-of-00001.parquet"))
    made.select(range(6)).to_parquet(str(tmp_path / "hub" / "test-00000-of-00001.parquet"))
    data = hf(str(tmp_path / "saved"), conditional=True, test_fraction=0.2)
    assert data.train is not None and data.train_labels is not None and data.classes == ("dog", "cat")
    held = torch.arange(20) % 5 == 4
    assert torch.equal(data.train, X[~held]) and torch.equal(data.test, X[held])
    assert data.train_labels.tolist() == [y for i, y in enumerate(LABELS) if i % 5 != 4]
    options: dict[str, Any] = {"split": "train", "test_split": "test", "mapped": True, "flip": True}
    left = hf(str(tmp_path / "hub"), conditional=True, label_column="tag", **options)
    assert torch.equal(rows(left, 40), torch.cat([X, X.flip(-1)])) and torch.equal(left.test, X[:6])
    assert left.classes == ("t0", "t1", "t2") and left.split is not None and "test" in left.split.rule
    file = next((tmp_path / "saved").glob("*.arrow"))
    assert torch.equal(rows(hf(str(file), mapped=True, test_fraction=0.2), 16), X[~held])


def test_a_split_that_lacks_one_of_its_files_is_refused(datasets: Any, tmp_path: Path) -> None:
    table(datasets).to_parquet(str(tmp_path / "train-00000-of-00002.parquet"))
    with pytest.raises(DataError, match="train-00001-of-00002.parquet is missing, and would be left out"):
        hf(str(tmp_path))
    table(datasets).to_parquet(str(tmp_path / "train-00001-of-00002.parquet"))
    assert len(hf(str(tmp_path), test_fraction=0.2).test) == 8


def test_what_cannot_be_meant_is_told_with_what_there_is(datasets: Any, tmp_path: Path) -> None:
    path, several = str(tmp_path / "one"), str(tmp_path / "several")
    made = table(datasets, n=list(range(20)))
    made.save_to_disk(path)
    datasets.DatasetDict({"train": made, "test": made}).save_to_disk(several)
    for options, message in (
        ({"path": several}, "holds the splits train, test; set `split` to one of them"),
        ({"path": several, "split": "val"}, "has no split 'val', only train, test; change `split`"),
        ({"path": several, "split": "train", "test_split": "train"}, "'train' is the split that is trained"),
        ({"path": path, "image_column": "n"}, "has no images in column 'n'; it has picture .*image_column"),
        ({"path": path, "image_column": "img"}, "has no column 'img'; it has picture .*, animal .*, n "),
        ({"path": path, "conditional": True, "label_column": "picture"}, "has no classes in column 'pic"),
    ):
        with pytest.raises(DataError, match=message) as error:
            hf(**options)
        assert "\n" not in str(error.value)
    for picture, message in (
        ({"bytes": png(PIXELS[0, :3]), "path": None}, r"row 1 is 6x3, but row 0 is 6x4; give `size`"),
        (
            {"bytes": png(PIXELS[0, ..., 0].astype(np.uint16)), "path": None},
            "row 1: image mode I;16 is not 8",
        ),
        ({"bytes": b"nothing", "path": None}, "row 1: unreadable or truncated image .*; copy it again"),
        ({"bytes": None, "path": "hf://data/a.png"}, "row 1: is at hf://data/a.png and not on this machine"),
        (None, "row 1: holds no image in column 'picture'; remove the row"),
    ):
        kind = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}  # as it is stored
        features = datasets.Features({"picture": kind})
        cells = {"picture": [{"bytes": png(PIXELS[0]), "path": None}, picture]}
        datasets.Dataset.from_dict(cells, features=features).save_to_disk(str(tmp_path / "bad"))
        for mapped in (False, True):
            with pytest.raises(DataError, match=message):
                hf(str(tmp_path / "bad"), mapped=mapped, test_fraction=0.5).batch(1)


def test_a_row_without_a_label_is_named(datasets: Any, tmp_path: Path) -> None:
    table(datasets, tag=["cat", None, *("dog",) * 18]).save_to_disk(str(tmp_path / "gap"))
    with pytest.raises(DataError, match="column 'tag' has no label in row 1: take out such rows, or"):
        hf(str(tmp_path / "gap"), conditional=True, label_column="tag")


def test_a_name_of_a_hub_or_a_missing_library_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("uoft-cs/cifar10", "mnist"):
        with pytest.raises(
            DataError, match=f"{name}: no such folder here; diffrl downloads nothing.*save_to_disk"
        ):
            hf(name)

    def missing(module: str, extra: str) -> None:
        raise MissingExtra(f"{module} is missing: pip install 'diffrl[{extra}]'")

    monkeypatch.setattr(huggingface, "require", missing)
    with pytest.raises(MissingExtra, match=r"datasets is missing: pip install 'diffrl\[hf\]'"):
        hf(str(tmp_path))
