"""The distances in a classifier's features: of the runs that are finished, once each, and 0 between equal sets."""

import json
import shutil
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from diffrl.training.evaluation import draw_samples
from tests.kit.examples import example
from tests.kit.runs import run


def write_mnist(folder: Path) -> None:
    rng = np.random.default_rng(0)
    arrays = {"images-idx3": rng.integers(0, 256, (60, 16, 16)), "labels-idx1": np.arange(60) % 10}
    for part, array in arrays.items():
        head = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
        raw = head + array.astype(np.uint8).tobytes()
        (folder / f"mnist-t10k-{part}-ubyte.gz").write_bytes(raw)  # packed or not: the reader looks


def test_finished_runs_are_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = example("mnist_features")
    monkeypatch.setattr(script, "LEVELS", {"ddim": (2,), "heun": (2,), "consistency": (1,)})
    write_mnist(tmp_path)
    images = f"data.path={tmp_path / 'mnist-t10k-images-idx3-ubyte.gz'}"
    words = ["data=idx", images, "data.pool=2", "network=mlp", "network.hidden=8", "compare=false"]
    folder = run(tmp_path / "cells" / "a", *words, "trainer.grad_steps=2", "eval.points=4", "eval.samples=4")
    place = {"study": "s", "case": "c", "scheme": "TD", "seed": 1}
    cells = [{**place, "folder": "a"}, {**place, "seed": 2, "folder": "missing"}]
    index = {"commands": [], "cells": cells}
    (tmp_path / "index.json").write_text(json.dumps(index), encoding="utf-8")

    def measured(*also: Path, by: tuple[str, ...] = ("ddim", "heun")) -> list[dict[str, Any]]:
        return script.main(tmp_path, tmp_path, also, by, samples=20, epochs=1)

    assert [row["scheme"] for row in measured(by=("ddim",))] == ["training images", "held-out images", "TD"]
    rows = measured()  # the other sampler is asked for later
    assert [row["scheme"] for row in rows] == ["training images", "held-out images", "TD", "TD"]
    assert [(row["sampler"], int(row["nfe"])) for row in rows[2:]] == [("ddim", 2), ("heun", 3)]
    data = script.idx(str(tmp_path / "mnist-t10k-images-idx3-ubyte.gz"), pool=2)
    denoiser, sampler = script.load(folder.path).denoiser, script.SAMPLERS.build({"name": "ddim"})
    x, _ = draw_samples(denoiser, data, sampler, num_steps=2, samples=20)
    assert float(rows[2]["sliced_w2"]) == pytest.approx(script.sliced_w2(x.clamp(-1, 1), data.train))

    words += ["sampler=consistency", "seed=3"]  # a run beside the comparison has a sampler of its own
    also = run(tmp_path / "also", *words, "trainer.grad_steps=2", "eval.points=4", "eval.samples=4")
    rows = measured(also.path)
    assert {"study": "beside", "seed": "3", "sampler": "consistency", "nfe": 1}.items() <= rows[-1].items()

    twin = Path(shutil.copytree(also.path, tmp_path / "twin"))
    with pytest.raises(ValueError, match=r"also and .*twin are both td at seed 3: give --also one of them"):
        measured(also.path, twin)
    monkeypatch.setattr(script, "draw_samples", lambda *_, **__: pytest.fail("it was measured before"))
    assert [float(row["frechet"]) for row in measured(also.path)] == [float(row["frechet"]) for row in rows]


@pytest.mark.parametrize("size", [(8, 8), (14, 14), (28, 28)])
def test_equal_images_are_at_no_distance(size: tuple[int, int]) -> None:
    script = example("mnist_features")
    x = torch.rand(70, 1, *size, generator=torch.Generator().manual_seed(0)) * 2 - 1
    torch.manual_seed(0)
    classifier = script.Classifier(*size)
    assert classifier(x).shape == (70, 10)
    near, far = (script.distances(classifier, x, y) for y in (x, x.abs()))
    assert near == pytest.approx({"frechet": 0, "sliced_w2": 0}, abs=1e-4)
    assert far["frechet"] > 10 * near["frechet"] and far["sliced_w2"] > 0.1
