"""Recorded preferences: what is read from arrays and from tables of files, and what is said of damage."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from diffrl.data.image_files import DataError
from diffrl.data.preferences import read_pairs

A, B = np.zeros((3, 2), np.float32), np.ones((3, 2), np.float32)


def npz(folder: Path, **arrays: Any) -> Path:
    np.savez(folder / "pairs.npz", **arrays)
    return folder / "pairs.npz"


def table(folder: Path, *lines: Any) -> Path:
    text = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    (folder / "pairs.jsonl").write_text("\n".join(text), encoding="utf-8")
    return folder / "pairs.jsonl"


def image(folder: Path, name: str, value: int, size: tuple[int, int] = (4, 3), mode: str = "L") -> str:
    Image.new(mode, size, value if mode == "L" else (value, 0, 0)).save(folder / name)
    return name


# Arrays


def test_arrays_of_floats_keep_their_values_however_large(tmp_path: Path) -> None:
    latents = np.random.default_rng(0).normal(size=(2, 5, 4, 3, 3)) * 7
    pairs = read_pairs(npz(tmp_path, preferred=latents[0], rejected=latents[1], labels=np.arange(5)))
    torch.testing.assert_close(pairs.preferred, torch.from_numpy(latents[0]).float())
    torch.testing.assert_close(pairs.rejected, torch.from_numpy(latents[1]).float())
    assert len(pairs) == 5 and pairs.event_shape == (4, 3, 3)
    assert pairs.labels is not None and pairs.labels.tolist() == [0, 1, 2, 3, 4] and pairs.prompts is None


def test_arrays_of_bytes_are_images_and_prompts_are_text(tmp_path: Path) -> None:
    pixels = np.full((2, 8, 6, 3), 255, np.uint8)
    pairs = read_pairs(
        npz(tmp_path, preferred=pixels, rejected=pixels // 255 * 0, prompts=["a cat", "zwei Hünde"])
    )
    assert pairs.event_shape == (3, 8, 6) and (pairs.preferred == 1).all() and (pairs.rejected == -1).all()
    assert pairs.prompts == ["a cat", "zwei Hünde"] and pairs.labels is None


# Tables


def test_a_table_names_images_next_to_it(tmp_path: Path) -> None:
    for name, value in (("a.png", 255), ("b.png", 0)):
        image(tmp_path, name, value)
    lines = [{"preferred": "a.png", "rejected": "b.png", "label": 3, "annotator": "x"}, "",
             {"preferred": "b.png", "rejected": str(tmp_path / "a.png"), "label": 0}]  # fmt: skip
    pairs = read_pairs(table(tmp_path, *lines))
    assert pairs.event_shape == (1, 3, 4) and pairs.labels is not None and pairs.labels.tolist() == [3, 0]
    assert pairs.preferred[:, 0, 0, 0].tolist() == [1, -1] and pairs.rejected[:, 0, 0, 0].tolist() == [-1, 1]
    assert list(pairs.rows) == ["line 1", "line 3"]


def test_gray_images_go_with_coloured_ones_and_sizes_can_be_made_equal(tmp_path: Path) -> None:
    line = {
        "preferred": image(tmp_path, "a.png", 255),
        "rejected": image(tmp_path, "b.png", 255, (8, 8), "RGB"),
    }
    pairs = read_pairs(table(tmp_path, {**line, "prompt": "red"}), size=2)
    assert pairs.event_shape == (3, 2, 2) and pairs.prompts == ["red"]
    assert (pairs.preferred == 1).all() and pairs.rejected[0, :, 0, 0].tolist() == [1, -1, -1]


def test_a_table_may_name_arrays(tmp_path: Path) -> None:
    np.save(tmp_path / "w.npy", A[0].astype(np.float64) + 9)
    np.save(tmp_path / "l.npy", B[0])
    pairs = read_pairs(table(tmp_path, {"preferred": "w.npy", "rejected": "l.npy"}))
    assert pairs.preferred.tolist() == [[9, 9]] and pairs.rejected.tolist() == [[1, 1]]
    assert pairs.preferred.dtype == torch.float32


# Damage

NAN = np.where(np.arange(6).reshape(3, 2) == 5, np.nan, 0.0)
ARRAYS: list[tuple[dict[str, Any], str]] = [
    ({"preferred": A}, "pairs.npz: holds no array `rejected`; store"),
    ({"preferred": A, "rejected": B[:2]}, r"`preferred` has shape \(3, 2\) and `rejected` \(2, 2\); row i"),
    ({"preferred": A, "rejected": NAN}, "pairs.npz, row 2: the rejected sample holds NaN or infinity; remove"),
    ({"preferred": A, "rejected": B.astype(int)}, "rejected is int64 of shape .*; store floats"),
    ({"preferred": A[:, 0], "rejected": B[:, 0]}, "preferred is float32 of shape .*; store floats"),
    ({"preferred": A[:0], "rejected": B[:0]}, "preferred is float32 of shape .*; store floats"),
    ({"preferred": A, "rejected": B, "labels": [0, -1, 2]}, "label -1 is negative; number"),
    ({"preferred": A, "rejected": B, "labels": [0, 1]}, "labels must be 3 whole numbers"),
    ({"preferred": A, "rejected": B, "prompts": ["a", "b"]}, "store 3 strings, one a pair"),
    ({"preferred": A, "rejected": B, "prompts": np.array(["a"] * 3), "labels": [0, 1, 2]}, "keep one of them"),
    ({"preferred": A, "rejected": np.array([{}] * 3, object)}, "pickled objects are not loaded"),
]  # fmt: skip


@pytest.mark.parametrize(("arrays", "said"), ARRAYS)
def test_a_fault_of_arrays_is_named(arrays: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=said):
        read_pairs(npz(tmp_path, **arrays))


PAIR = {"preferred": "a.png", "rejected": "a.png"}
LINES: list[tuple[list[Any], str]] = [
    ([], "pairs.jsonl: holds no pair; write one a line"),
    ([PAIR, "{"], "pairs.jsonl, line 2: is no JSON; write one object a line"),
    (["[]"], 'line 1: lacks the path "preferred" or "rejected"; write'),
    ([{"chosen": "a.png", "rejected": "a.png"}], 'line 1: lacks the path "preferred"'),
    ([{**PAIR, "rejected": 3}], 'line 1: lacks the path "preferred" or "rejected"'),
    ([{**PAIR, "label": -1}], "line 1: label -1 is no whole number"),
    ([{**PAIR, "label": True}], "line 1: label True is no whole number"),
    ([{**PAIR, "prompt": 3}], "line 1: prompt 3 is no string"),
    ([PAIR, {**PAIR, "label": 1}], 'line 1: has no "label", but others have'),
    ([{**PAIR, "label": 1, "prompt": "x"}], 'has both "label" and "prompt"; keep one'),
    ([PAIR, {**PAIR, "rejected": "none.png"}], "line 2: .*none.png: no such file"),
    ([PAIR, {**PAIR, "rejected": "~nobody-of-that-name/a.png"}], "line 2: .*a.png: no such file"),
    ([PAIR, {**PAIR, "rejected": "cut.png"}], "line 2: .*cut.png: unreadable or truncated image"),
    ([PAIR, {**PAIR, "rejected": "wide.png"}], r"line 2: wide.png has shape \(1, 3, 9\), but a.png has"),
    ([PAIR, {**PAIR, "rejected": "x.npy"}], r"line 2: x.npy has shape \(2,\), but a.png has .*all arrays of one"),
    ([{**PAIR, "preferred": "int.npy"}], "line 1: .*int.npy: is int64 of shape .*; store the floats of one"),
    ([{"preferred": "nan.npy", "rejected": "x.npy"}], "line 1: the preferred sample holds NaN"),
]  # fmt: skip


@pytest.mark.parametrize(("lines", "said"), LINES)
def test_a_fault_of_a_table_is_named(lines: list[Any], said: str, tmp_path: Path) -> None:
    image(tmp_path, "a.png", 0)
    image(tmp_path, "wide.png", 0, (9, 3))
    (tmp_path / "cut.png").write_bytes((tmp_path / "a.png").read_bytes()[:40])
    for name, array in (("x", A[0]), ("nan", A[0] + np.nan), ("int", np.arange(2))):
        np.save(tmp_path / f"{name}.npy", array)
    with pytest.raises(DataError, match=said):
        read_pairs(table(tmp_path, *lines))


def test_files_that_are_none_are_named(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("a,b", encoding="utf-8")
    (tmp_path / "x.npz").write_bytes(b"PK\x03\x04 cut")
    for name, said in (
        ("x.csv", "are read from .npz and .jsonl files"),
        ("x.npz", "unreadable, truncated or not an npz file"),
        ("none.npz", "no such file or folder; diffrl downloads nothing"),
    ):
        with pytest.raises(DataError, match=said):
            read_pairs(tmp_path / name)
    with pytest.raises(DataError, match="`size` is 0"):
        read_pairs(tmp_path / "x.npz", size=0)


def test_what_takes_too_much_memory_is_refused_before_it_is_taken(tmp_path: Path) -> None:
    many = npz(tmp_path, preferred=A, rejected=B)
    np.save(tmp_path / "x.npy", A[0])
    line = {"preferred": "x.npy", "rejected": "x.npy"}
    for path in (many, table(tmp_path, *[line] * 3)):
        with pytest.raises(DataError, match=f"{re.escape(str(path))}.*raise `max_gib`"):
            read_pairs(path, max_gib=40 / 2**30)  # two sides of three pairs of two floats are 48 bytes
        assert len(read_pairs(path, max_gib=48 / 2**30)) == 3
