"""Images that stay in their files: those in memory, draw by draw; the same by workers; and what may go wrong."""

import multiprocessing
import os
import pickle
import signal
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from diffrl.data.dataset import Data, pieces
from diffrl.data.decoding import decode
from diffrl.data.files import folder
from diffrl.data.image_files import DataError
from diffrl.training.batches import Batches
from diffrl.training.identity import identity_of
from diffrl.training.trainer import Length

RNG = np.random.default_rng(8)
NAMES = [f"{label}/{i}.png" for label in ("ants", "cats") for i in range(12)]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for j, name in enumerate(NAMES):
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        shape = (4, 6) if j % 3 else (4, 6, 3)  # gray ones among colour ones
        Image.fromarray(RNG.integers(0, 256, shape, dtype=np.uint8)).save(path)
    return tmp_path / "images"


def packed(root: Path) -> Path:
    with zipfile.ZipFile(root.with_suffix(".zip"), "w") as archive:
        for name in NAMES:
            archive.write(root / name, f"top\\{name}".replace("/", "\\"))
    return root.with_suffix(".zip")


def mapped(path: Path, **options: int) -> Data:
    return folder(str(path), conditional=True, test_fraction=0.25, mapped=True, flip=True, **options)


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_images_left_in_their_files_are_those_in_memory(root: Path, kind: str) -> None:
    path = root if kind == "folder" else packed(root)
    read = folder(str(path), conditional=True, test_fraction=0.25, flip=True)
    left = mapped(path)
    assert read.train is not None and left.train is None and left.rows is not None and left.num_train == 36
    assert torch.equal(torch.cat([*pieces(left.rows)]), read.train)
    assert torch.equal(left.test, read.test) and left.classes == read.classes == ("ants", "cats")
    copied = pickle.loads(pickle.dumps(left.rows))  # as a worker gets them
    assert torch.equal(copied[torch.tensor([3, 20])], read.train[[3, 20]])
    for a, b in zip(read.batch(7, torch.Generator()), left.batch(7, torch.Generator()), strict=True):
        assert a is not None and b is not None and torch.equal(a, b)
    assert left.sigma_data == pytest.approx(read.sigma_data, rel=1e-12)
    sized = folder(str(path), size=3, mapped=True)
    whole = folder(str(path), size=3).train
    assert (
        sized.rows is not None and whole is not None and torch.equal(sized.rows[torch.arange(21)], whole[:21])
    )


def test_the_fingerprint_is_of_the_bytes_of_what_is_trained_on(root: Path) -> None:
    found = [mapped(root).fingerprint for _ in range(2)]
    assert found[0] == found[1] != folder(str(root), conditional=True, mapped=True).fingerprint
    Image.new("RGB", (6, 4)).save(root / "ants" / "0.png")
    assert mapped(root).fingerprint != found[0]


def test_what_is_wrong_is_named(root: Path) -> None:
    with pytest.raises(DataError, match="`workers` is 2, but its samples are in memory.*`mapped` to true"):
        folder(str(root), workers=2)
    with pytest.raises(ValueError, match="workers is -1"):
        mapped(root, workers=-1)
    with pytest.raises(DataError, match="its test part by `test_fraction`: takes"):
        folder(str(root), test_fraction=0.9, mapped=True, max_gib=1e-6)
    Image.new("L", (7, 4)).save(root / "ants" / "0.png")
    with pytest.raises(DataError, match=r"ants/1.*png is 6x4, but ants/0.png is 7x4; give `size`"):
        mapped(root)
    Image.new("I;16", (6, 4)).save(root / "cats" / "3.png")
    with pytest.raises(DataError, match=r"cats/3.png: image mode I;16 is not 8-bit; convert it"):
        mapped(root)


def test_an_image_that_has_become_another_is_named_when_it_is_drawn(root: Path) -> None:
    """The run would go on with other data than its checkpoints tell of."""
    rows = mapped(root).rows
    assert rows is not None
    for name in NAMES:
        Image.new("RGB", (6, 4)).save(root / name)
    with pytest.raises(DataError, match=r"images: ants/\d+.png was changed since the start: bring back"):
        rows[torch.tensor([0])]


@pytest.mark.parametrize(("raw", "found"), [(b"", "empty"), (b"GIF8 no image", "first bytes 47 49 46 38")])
def test_bytes_that_are_no_image_are_named_by_file_and_remedy(raw: bytes, found: str) -> None:
    with pytest.raises(DataError) as error:
        decode(raw, "cats/3.png", None, 1)
    assert str(error.value) == (
        f"cats/3.png: unreadable or truncated image ({found}); copy it again, or remove it"
    )


def drawn(batches: Batches, steps: range) -> Iterator[tuple[Tensor, Tensor]]:
    for step in steps:
        x0, labels, generator = batches(step)
        assert labels is not None
        yield x0, torch.cat([labels.flatten(), torch.rand(3, generator=generator)])


def test_batches_by_workers_are_the_same_and_what_befalls_them_is_one_line(root: Path) -> None:
    """One start of two workers: from the middle on, out of turn, a file that is damaged, and a death."""
    length = Length(30, batch_size=5, label_dropout=0.3, augment=0.5)
    alone, shared = (Batches(mapped(root, workers=n), 3, length, num_classes=2) for n in (0, 2))
    state = torch.get_rng_state()
    with shared.ahead(4, 30):  # as a run that is resumed at step 4
        assert torch.equal(torch.get_rng_state(), state)
        for step, (ours, theirs) in enumerate(
            zip(drawn(alone, range(4, 12)), drawn(shared, range(4, 12)), strict=True)
        ):
            assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True)), step
        assert torch.equal(shared(25)[0], alone(25)[0])  # out of its turn, and the turn is kept
        assert torch.equal(shared(12)[0], alone(12)[0])
        spoilt = [*root.rglob("*.png")]
        for file in spoilt:
            file.write_bytes(file.read_bytes()[:40])
        with pytest.raises(DataError, match=r"images: (ants|cats)/\d+.png: unreadable or trunc.*copy it"):
            for step in range(13, 20):  # those that were read before are whole
                shared(step)
        workers = [p for p in multiprocessing.active_children() if p.pid]
        assert len(workers) == 2
        for worker in workers:
            os.kill(worker.pid, signal.SIGTERM)  # as a batch system sends to all: it is not for them
        time.sleep(0.2)
        assert [worker.exitcode for worker in workers] == [None, None]
        workers[0].kill()
        begun = time.monotonic()
        with pytest.raises(RuntimeError, match=r"data.workers has died.*lower data.workers") as error:
            for step in range(shared._next, 30):
                try:
                    shared(step)
                except DataError:
                    shared._next = step + 1
        assert time.monotonic() - begun < 30 and "\n" not in str(error.value)
    assert not multiprocessing.active_children()


def test_the_number_of_workers_is_no_part_of_what_a_run_is() -> None:
    assert identity_of({"data": {"name": "folder", "workers": 2}, "seed": 1}) == {
        "data.name": "folder",
        "seed": 1,
    }
