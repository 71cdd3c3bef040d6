"""Data that stay in a file: equal to the same data in memory, draw by draw, and read no further than they are drawn."""

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Generator, Tensor

from diffrl.data.dataset import Data, pieces
from diffrl.data.files import npz
from diffrl.data.image_files import DataError
from diffrl.data.mapped import MappedRows, map_npz
from diffrl.diffusion.schedules.edm import EDM
from diffrl.envs.arguments import largest_number
from diffrl.errors import InputError
from diffrl.objectives.posteriors import exact_x0_law
from diffrl.training.trials import held_out

RNG = np.random.default_rng(3)
GRAY = RNG.integers(0, 256, (50, 4, 6), dtype=np.uint8)
COLOUR = RNG.integers(0, 256, (50, 6, 8, 3), dtype=np.uint8)
FLOATS = RNG.uniform(-1, 1, (50, 3, 6, 8)).astype(">f8")
VECTORS = RNG.normal(0, 30, (50, 5)).astype("<f4")
LABELS = RNG.permutation(np.arange(50) % 3 + 4)


def stored(path: Path, x: NDArray[Any], kind: str) -> str:
    if kind == "npy":
        np.save(path / "a.npy", x)
        return str(path / "a.npy")
    np.savez(path / "a.npz", odd=np.zeros(3, np.uint8), x=x, labels=LABELS)  # x begins at no round offset
    return str(path / "a.npz")


@pytest.mark.parametrize("x", [GRAY, COLOUR, FLOATS, VECTORS], ids=["gray", "colour", "floats", "vectors"])
@pytest.mark.parametrize("kind", ["npy", "npz"])
def test_mapped_data_are_those_in_memory_draw_by_draw(tmp_path: Path, x: NDArray[Any], kind: str) -> None:
    options: dict[str, Any] = {"conditional": kind == "npz", "test_fraction": 0.2}
    path = stored(tmp_path, x, kind)
    read, mapped = npz(path, **options), npz(path, mapped=True, **options)
    assert read.train is not None and mapped.train is None and mapped.rows is not None
    assert torch.equal(torch.cat([*pieces(mapped.rows)]), read.train)
    assert torch.equal(mapped.test, read.test)
    assert (mapped.num_train, mapped.classes, mapped.class_shares) == (40, read.classes, read.class_shares)
    for seed in range(3):
        (a, la), (b, lb) = (d.batch(17, Generator().manual_seed(seed)) for d in (read, mapped))
        assert torch.equal(a, b) and a.dtype == b.dtype == torch.float32
        assert (la is None and lb is None) or (la is not None and lb is not None and torch.equal(la, lb))
    assert mapped.sigma_data == pytest.approx(read.sigma_data, rel=1e-12)
    assert largest_number(mapped) == largest_number(read)


def test_a_pooled_file_and_one_of_test_samples_are_mapped_too(tmp_path: Path) -> None:
    path, test = stored(tmp_path, GRAY, "npy"), str(tmp_path / "test.npy")
    np.save(test, GRAY[:7])
    read, mapped = (npz(path, test_path=test, pool=2, mapped=m) for m in (False, True))
    assert mapped.event_shape == (1, 2, 3) and mapped.num_train == 50 and len(mapped.test) == 7
    assert read.train is not None and mapped.rows is not None
    assert torch.equal(mapped.rows[torch.arange(50)], read.train)


def test_more_than_the_memory_allowed_can_be_mapped_and_stays_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "large.npy"
    shape = (
        1_000_000,
        16,
        16,
        3,
    )  # .72 GiB, and 2.9 as float32; a hole in the file takes no room on the disk
    with path.open("wb") as file:
        header = {"descr": "|u1", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        first, row = file.tell(), 16 * 16 * 3
        file.truncate(first + 1_000_000 * row)
        for number in (0, 999_000, 999_999):
            file.seek(first + number * row)
            file.write(bytes([255]) * row)
    with pytest.raises(DataError, match="takes 2.86 GiB of memory, more than 1"):
        npz(str(path), max_gib=1)
    data = npz(str(path), max_gib=1, mapped=True, test_fraction=1e-3)
    assert data.num_train == 999_000 and data.test.shape == (1000, 3, 16, 16)
    assert float(data.test[0].min()) == float(data.test[-1].min()) == 1 and float(data.test[1].max()) == -1
    x, _ = data.batch(8, Generator().manual_seed(0))
    assert x.shape == (8, 3, 16, 16) and float(x.abs().min()) == 1
    with pytest.raises(DataError, match=r"test part by `test_fraction`: takes 1.43 GiB.*more than 1"):
        npz(str(path), max_gib=1, mapped=True, test_fraction=0.5)


def test_rows_know_their_mirror_images_and_parts_of_themselves() -> None:
    rows = MappedRows(FLOATS, "here", np.array([3, ~3, 0, ~7]))
    x = torch.from_numpy(FLOATS.astype(np.float32))
    assert torch.equal(rows[torch.arange(4)], torch.stack([x[3], x[3].flip(-1), x[0], x[7].flip(-1)]))
    assert torch.equal(rows.take(torch.tensor([3, 1]))[torch.arange(2)], torch.stack([x[7], x[3]]).flip(-1))


def test_a_digest_tells_which_rows_and_what_they_hold(tmp_path: Path) -> None:
    path = stored(tmp_path, GRAY, "npz")

    def fingerprint(**options: Any) -> str:
        return npz(path, mapped=True, **options).fingerprint

    first = fingerprint()
    assert first == fingerprint() == fingerprint(test_fraction=0.1)
    assert (
        len({first, fingerprint(test_fraction=0.2), fingerprint(conditional=True), fingerprint(pool=2)}) == 4
    )
    changed = GRAY.copy()
    changed[44, 3, 5] ^= 1  # the last of the training rows
    path = stored(tmp_path, changed, "npz")
    assert fingerprint() != first
    changed[44], changed[45] = GRAY[44], 0  # a test row
    path = stored(tmp_path, changed, "npz")
    assert fingerprint() == first


def test_rows_that_are_held_out_are_not_trained_on(tmp_path: Path) -> None:
    data = npz(stored(tmp_path, GRAY, "npz"), mapped=True, conditional=True, test_fraction=0.2)
    read = npz(stored(tmp_path, GRAY, "npz"), conditional=True, test_fraction=0.2)
    for mine, theirs in zip(held_out(data, 5), held_out(read, 5), strict=True):
        assert mine.rows is not None and theirs.train is not None
        assert torch.equal(torch.cat([*pieces(mine.rows)]), theirs.train)
        assert mine.train_labels is not None and theirs.train_labels is not None
        assert torch.equal(mine.train_labels, theirs.train_labels)


def test_what_needs_all_rows_is_refused(tmp_path: Path) -> None:
    data = npz(stored(tmp_path, GRAY, "npy"), mapped=True)
    with pytest.raises(InputError, match=r"rows in a file.*data.mapped=false"):
        exact_x0_law(EDM(), data)
    with pytest.raises(DataError, match="batch_size 46 > 45 training samples"):
        data.batch(46)


def test_faults_of_rows_are_met_when_they_are_drawn() -> None:
    x = VECTORS.copy()
    x[11, 2] = np.nan
    rows = MappedRows(x, "here", np.arange(50))
    assert bool(rows[torch.arange(11)].isfinite().all())
    with pytest.raises(DataError, match="here: sample 11 holds NaN or infinity; remove it"):
        rows[torch.tensor([30, 11])]
    wide = FLOATS.copy()
    wide[9] = 1.5
    with pytest.raises(DataError, match=r"float images must lie in \[-1, 1\]"):
        MappedRows(wide, "here", np.arange(50))[torch.tensor([9])]


def compressed(path: Path) -> None:
    np.savez_compressed(path, x=GRAY)


def fortran(path: Path) -> None:
    np.savez(path, x=np.asfortranarray(GRAY))


def whole(path: Path) -> None:
    np.savez(path, x=GRAY.astype(np.int64))


def cut(path: Path) -> None:
    np.savez(path, x=GRAY)
    with zipfile.ZipFile(path) as archive:
        raw = archive.read("x.npy")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x.npy", raw[:-1])


def pickled(path: Path) -> None:
    np.savez(path, x=np.array([object()]), allow_pickle=True)


def empty(path: Path) -> None:
    np.savez(path, x=GRAY[:0])


def short_labels(path: Path) -> None:
    np.savez(path, x=GRAY, labels=LABELS[1:])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (compressed, r"x is compressed and cannot be mapped; store it by numpy.savez"),
        (fortran, r"is in Fortran order; store numpy.ascontiguousarray of it"),
        (whole, r"dtype int64 is ambiguous"),
        (cut, r"unreadable, truncated or no npz/npy file \(1199 bytes where \(50, 4, 6\) needs 1200\)"),
        (pickled, r"pickled objects are not loaded"),
        (empty, r"at least one value each, not shape \(0, 4, 6\)"),
        (short_labels, r"labels must be 50 whole numbers"),
    ],
    ids=lambda v: getattr(v, "__name__", ""),
)
def test_files_that_cannot_be_mapped_are_refused_in_a_line(tmp_path: Path, make: Any, message: str) -> None:
    make(tmp_path / "a.npz")
    with pytest.raises(DataError, match=message) as error:
        npz(str(tmp_path / "a.npz"), mapped=True, conditional=make is short_labels)
    assert "\n" not in str(error.value)


def test_a_mapped_array_is_the_file_itself_and_read_only(tmp_path: Path) -> None:
    array, labels = map_npz(stored(tmp_path, GRAY, "npz"))
    assert isinstance(array, np.memmap) and not array.flags.writeable
    np.testing.assert_array_equal(array, GRAY)
    assert labels is not None and labels.tolist() == LABELS.tolist()


class InFloat64(MappedRows):
    def __getitem__(self, i: Tensor) -> Tensor:
        return super().__getitem__(i).double()


def test_data_of_rows_are_checked_like_others() -> None:
    rows, test = MappedRows(VECTORS, "here", np.arange(50)), torch.eye(5)
    assert Data("mine", test, rows=rows).event_shape == (5,)
    with pytest.raises(DataError, match="give train or rows, not both"):
        Data("mine", test, train=test, rows=rows)
    with pytest.raises(DataError, match=r"samples of \(5,\) do not fit \(4,\)"):
        Data("mine", torch.eye(4), rows=rows)
    with pytest.raises(DataError, match=r"samples have dtype torch\.float64: let them be float32"):
        Data("mine", test, rows=InFloat64(VECTORS, "here", np.arange(50)))
    with pytest.raises(DataError, match="labels must be 50 int64 numbers in 0..1"):
        labels = torch.zeros(5, dtype=torch.int64)
        Data("mine", test, labels, num_classes=2, rows=rows, train_labels=labels)
    with pytest.raises(DataError, match="every value is the same"):
        Data("mine", test, rows=MappedRows(np.ones((9, 5), "f4"), "here", np.arange(9)))
