"""Images of the Hugging Face library `datasets`, by local path: nothing is asked of any hub."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from diffrl.data.dataset import Data
from diffrl.data.encoded import images_of
from diffrl.data.image_files import MAX_GIB, DataError, check_labels, existing, readable
from diffrl.data.parts import Part, check_test_part, elsewhere, from_parts, split_by
from diffrl.data.registry import DATASETS
from diffrl.data.splits import spaced
from diffrl.extras import require
from diffrl.ranges import require_int

__all__ = ["hf"]

SHARD = re.compile(r"(.+)-\d{5}-of-(\d{5})")
HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
IMAGE = {"bytes": "binary", "path": "string"}  # an image as it is stored


@DATASETS.register("hf")
def hf(
    path: str,
    split: str | None = None,
    test_split: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    size: int | None = None,
    conditional: bool = False,
    test_fraction: float = 0.1,
    max_gib: float = MAX_GIB,
    mapped: bool = False,
    workers: int = 0,
    flip: bool = False,
) -> Data:
    """Images of a Hugging Face data set on this machine: a folder of `save_to_disk`, or parquet or arrow files.

    Files in a folder that are called NAME-00000-of-00002.parquet, as the hub has them, are the split NAME; files of
    other names are together one split without a name. Images are treated as those of `diffrl.data.folder`, and the
    library stays offline. Of parquet files it keeps a copy as arrow files in a cache of its own (HF_DATASETS_CACHE).
    Without `test_split`, row i is test where ⌊(i+1) f⌋ > ⌊i f⌋ with f = test_fraction.

    Source: https://huggingface.co/docs/datasets, "Load" and "Process".

    Args:
        path: the folder, or one parquet or arrow file; no name of a data set on a hub.
        split: which one to train on; None: the only one.
        test_split: which one is test; then test_fraction is unused.
        image_column: name of the column of images; None: the only one.
        label_column: name of the column of classes, which are whole numbers or text; None: the only one that is stored
            as ClassLabel.
        size: crop each image at its centre and resize it to size × size; None: all must be of one size.
        conditional: use the classes.
        test_fraction: part of the split that is test, in (0, 1).
        max_gib: GiB of memory that the images may take.
        mapped: leave the training images where they are, and decode one each time that it is drawn.
        workers: with `mapped`, processes that decode and augment batches ahead of the training; their number changes
            no batch.
        flip: train on the mirror image of every training image too, left for right, after the images themselves.

    Raises:
        DataError: no such folder, a name of a hub, splits or columns that are not there or not clear, and any fault of
            an image, named in one sentence.
        MissingExtra: datasets or pillow are not installed.
    """
    if size is not None:
        require_int("size", size)
    tables = _tables(_local(path))
    train_table, names = _chosen("split", split, tables, path)
    columns = _Columns.of(train_table, path, image_column, label_column, conditional)
    part = columns.part(train_table, path, size, max_gib, mapped)
    flip_gib = max_gib if flip else None
    if test_split is None:
        mask, rule = spaced(len(part[0]), test_fraction)
        check_test_part(part[0], mask, max_gib, path)
        parts = split_by("hf", part, mask, rule)
    else:
        test_table, _ = _chosen("test_split", test_split, tables, path)
        if test_split == names:
            raise DataError(
                f"{path}: `test_split` {test_split!r} is the split that is trained on; give another"
            )
        test = _Columns.of(test_table, path, columns.image, columns.label, conditional).part(
            test_table, path, size, max_gib
        )
        parts = part, test, elsewhere(names, test_split, part, test)
    return from_parts("hf", *parts, flip_gib, workers, columns.classes)


def _local(path: str) -> Path:
    """What is on this machine.

    Raises:
        DataError: it is not there; a name of a hub is told as one.
    """
    if HUB_NAME.fullmatch(path) and not Path(path).exists():
        raise DataError(
            f"{path}: no such folder here; diffrl downloads nothing, so if this is a name on a hub, save the data set "
            "by `save_to_disk` and point `path` at that folder"
        )
    return existing(path, folder=True)


def _tables(path: Path) -> Mapping[str, Any]:
    """Splits by name; "" is one without a name."""
    datasets = require("datasets", "hf")
    with readable(str(path), "unreadable data set"), _offline(datasets):
        if path.is_dir() and any((path / file).exists() for file in ("state.json", "dataset_dict.json")):
            found = datasets.load_from_disk(str(path))
            return found if isinstance(found, Mapping) else {"": found}
        files = sorted(path.iterdir()) if path.is_dir() else [path]
        splits: dict[str, list[str]] = {}
        for file in (file for file in files if file.suffix in (".parquet", ".arrow")):
            shard = SHARD.fullmatch(file.stem)
            splits.setdefault(shard[1] if shard else "", []).append(str(file))
            if shard and path.is_dir():
                _require_shards(path, shard[1], shard[2], file.suffix)
        if not splits:
            raise DataError(
                f"{path}: neither a folder of `save_to_disk` nor parquet or arrow files; save the data set anew"
            )
        return {name: _read_files(datasets, files) for name, files in splits.items()}


def _require_shards(path: Path, name: str, total: str, suffix: str) -> None:
    """Refuse a split of which some of its numbered files are not there."""
    for number in range(int(total)):
        file = f"{name}-{number:05}-of-{total}{suffix}"
        if not (path / file).exists():
            raise DataError(f"{path}: {file} is missing, and would be left out of the set; copy it again")


def _read_files(datasets: Any, files: list[str]) -> Any:
    if all(file.endswith(".parquet") for file in files):
        return datasets.Dataset.from_parquet(files)
    if all(file.endswith(".arrow") for file in files):
        return datasets.concatenate_datasets([datasets.Dataset.from_file(file) for file in files])
    raise DataError(f"{Path(files[0]).parent}: holds parquet and arrow files of one split; leave one kind")


@contextmanager
def _offline(datasets: Any) -> Iterator[None]:
    """The library asks no hub in here, and shows no bars."""
    hub: Any = require("huggingface_hub.constants", "hf")
    config = datasets.config
    online, bars = (hub.HF_HUB_OFFLINE, config.HF_HUB_OFFLINE), datasets.is_progress_bar_enabled()
    hub.HF_HUB_OFFLINE = config.HF_HUB_OFFLINE = True
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        hub.HF_HUB_OFFLINE, config.HF_HUB_OFFLINE = online
        if bars:
            datasets.enable_progress_bars()


def _chosen(option: str, name: str | None, tables: Mapping[str, Any], path: str) -> tuple[Any, str]:
    """A split and its name."""
    known = ", ".join(tables)
    if name is None:
        if len(tables) > 1:
            raise DataError(f"{path}: holds the splits {known}; set `{option}` to one of them")
        name = next(iter(tables))
    if name not in tables:
        raise DataError(
            f"{path}: has no split {name!r}, only {known or 'one without a name'}; change `{option}`"
        )
    if len(tables[name]) == 0:
        raise DataError(f"{path}: its split {name!r} holds no row; give another")
    return tables[name], name


@dataclass(frozen=True)
class _Columns:
    """Which columns are read.

    Args:
        image: column of the images.
        label: column of the classes, if they are wanted.
        classes: names of the classes where the labels are numbers with names.
    """

    image: str
    label: str | None
    classes: tuple[str, ...] | None

    @classmethod
    def of(cls, table: Any, path: str, image: str | None, label: str | None, conditional: bool) -> "_Columns":
        """The columns that were named, or else those that can be meant."""
        kinds: Mapping[str, Any] = table.features
        images = [name for name, kind in kinds.items() if _is_image(kind)]
        image = _column("image_column", image, images, kinds, path, "images")
        if not conditional:
            return cls(image, None, None)
        named = [name for name, kind in kinds.items() if hasattr(kind, "names")]  # ClassLabel
        usable = [n for n, kind in kinds.items() if n in named or _is_label(kind)]
        label = _column("label_column", label, named if label is None else usable, kinds, path, "classes")
        names = getattr(kinds[label], "names", None)
        return cls(image, label, None if names is None else tuple(names))

    def part(self, table: Any, path: str, size: int | None, max_gib: float, mapped: bool = False) -> Part:
        """Samples, and the class of each."""
        labels = None
        if self.label is not None:
            given = table.with_format("arrow")[self.label].to_pylist()
            if None in given:
                raise DataError(
                    f"{path}: column {self.label!r} has no label in row {given.index(None)}: take out such rows, or "
                    "give conditional=false"
                )
            labels = np.asarray(given)
            if labels.dtype.kind not in "U":
                labels = check_labels(labels, len(table), f"{path}: column {self.label!r}")
                if self.classes is not None and labels.max() >= len(self.classes):
                    raise DataError(
                        f"{path}: label {labels.max()} is none of {len(self.classes)} classes; save it anew"
                    )
        images = _Cells(path, _undecoded(table, self.image), self.image)
        return images_of(images, size, max_gib, mapped), labels


def _column(
    option: str, name: str | None, fitting: list[str], kinds: Mapping[str, Any], path: str, what: str
) -> str:
    """The column by that name, or the only one that fits."""
    if name is None and len(fitting) == 1:
        return fitting[0]
    if name in fitting:
        return name
    told = ", ".join(f"{column} ({_told(kind)})" for column, kind in kinds.items())
    if name is None:
        several = f"{len(fitting)} columns" if fitting else "no column"
        raise DataError(f"{path}: has {several} of {what} among {told}; set `{option}`")
    fault = f"no column {name!r}" if name not in kinds else f"no {what} in column {name!r}"
    raise DataError(f"{path}: has {fault}; it has {told}; change `{option}`")


def _told(kind: Any) -> str:
    return str(getattr(kind, "dtype", type(kind).__name__))


def _is_image(kind: Any) -> bool:
    """Whether a column holds encoded images, declared as such or not."""
    if type(kind).__name__ == "Image":
        return True
    return isinstance(kind, Mapping) and {k: _told(v) for k, v in kind.items()} == IMAGE


def _is_label(kind: Any) -> bool:
    """Whether a column holds whole numbers or text."""
    return type(kind).__name__ == "Value" and bool(re.match("u?int|string|large_string", _told(kind)))


def _undecoded(table: Any, column: str) -> Any:
    """The column alone, its images as bytes."""
    table = table.select_columns([column])
    if type(table.features[column]).__name__ == "Image":
        return table.cast_column(column, require("datasets", "hf").Image(decode=False))
    return table


@dataclass(frozen=True)
class _Cells:
    """The images of a column.

    Args:
        where: the data set.
        table: of that column alone.
        column: its name.
    """

    where: str
    table: Any
    column: str

    def __len__(self) -> int:
        return len(self.table)

    def label(self, j: int) -> str:
        """Row j."""
        return f"row {j}"

    def read(self, j: int) -> bytes:
        """The bytes of row j, or of the file on this machine that it names.

        Raises:
            DataError: it holds neither, or they cannot be read.
        """
        where = f"{self.where}: row {j}"
        with readable(where, "unreadable"):
            cell: Mapping[str, Any] = self.table[j][self.column] or {}
        if cell.get("bytes") is not None:
            return bytes(cell["bytes"])
        if not cell.get("path"):
            raise DataError(f"{where}: holds no image in column {self.column!r}; remove the row")
        if "://" in cell["path"]:
            raise DataError(
                f"{where}: is at {cell['path']} and not on this machine; diffrl downloads nothing, so save it with its "
                "images"
            )
        file = existing(cell["path"])
        with readable(str(file), "unreadable image"):
            return file.read_bytes()
