"""Distances of the samples of `compare plan=mnist` in the features of a classifier, by two samplers.

    python examples/mnist_features.py runs/compare_mnist FOLDER [--also RUN ...] [--samplers ddim]

FOLDER holds MNIST's idx files; RUN is a finished run of its own on the same images, measured by its own sampler. A
distance of pixels hardly sees strokes. So a small network learns the ten classes of the training images, and the
Fréchet distance of its 64 features is taken between them and 1,000 samples of each finished run, by DDIM and by
Heun's method: a line each in OUT/features.csv, and for scale one each of 1,000 training images and of the held-out
ones. What is there already is kept, by its sampler and number of samples. About a minute a run on one CPU core.
"""

import argparse
import csv
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from diffrl import load
from diffrl.data.dataset import Data
from diffrl.data.files import idx
from diffrl.diffusion.samplers.registry import SAMPLERS
from diffrl.errors import DiffrlError, InputError
from diffrl.experiments.comparison import cell_figures
from diffrl.experiments.index import read_index
from diffrl.experiments.studies import WHERE
from diffrl.metrics.point_clouds import frechet_distance, sliced_w2
from diffrl.text_files import write_csv
from diffrl.training.evaluation import draw_samples
from diffrl.training.runs import RunFolder

LEVELS = {
    "ddim": (2, 3, 5, 9, 18, 35),
    "heun": (2, 3, 5, 9, 18),  # 2N - 1 evaluations
    "consistency": (1, 2, 3, 5, 9),
}
BESIDE = {**dict.fromkeys(WHERE, ""), "study": "beside"}
COLUMNS = (*WHERE, "sampler", "nfe", "samples", "frechet", "sliced_w2")


class Classifier(nn.Module):
    """Two convolutions and two linear layers, with means over pixels between, for images [N, 1, H, W] in [-1, 1]."""

    def __init__(self, height: int, width: int) -> None:
        super().__init__()
        convolutions = nn.Conv2d(1, 16, 3, padding=1), nn.Conv2d(16, 32, 3, padding=1)
        layers = [part for conv in convolutions for part in (conv, nn.ReLU(), nn.AvgPool2d(2))]
        inner = 32 * (height // 4) * (width // 4)
        self.body = nn.Sequential(*layers, nn.Flatten(), nn.Linear(inner, 64), nn.ReLU())
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [N, 10]."""
        return self.head(self.body(x))


def train_classifier(data: Data, epochs: int) -> Classifier:
    """Train on the training images; prints the accuracy on the held-out ones."""
    assert data.train is not None and data.train_labels is not None and data.test_labels is not None
    torch.manual_seed(0)
    network = Classifier(*data.event_shape[1:])
    optimiser = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=1e-2)
    for _ in range(epochs):
        for batch in torch.randperm(len(data.train)).split(64):
            optimiser.zero_grad()
            logits = network(data.train[batch])
            cross_entropy(logits, data.train_labels[batch], label_smoothing=0.05).backward()
            optimiser.step()
    with torch.no_grad():
        accuracy = (network(data.test).argmax(1) == data.test_labels).float().mean().item()
    print(f"{data.event_shape}: accuracy on held-out images {accuracy:.4f}", flush=True)
    return network.eval()


def distances(classifier: Classifier, x: Tensor, real: Tensor) -> dict[str, float]:
    """Fréchet distance in features and sliced W2 in pixels of samples in [-1, 1] to real images."""
    with torch.no_grad():
        found, wanted = (
            torch.cat([classifier.body(part) for part in images.split(1000)]) for images in (x, real)
        )
    return {"frechet": frechet_distance(found, wanted), "sliced_w2": sliced_w2(x, real)}


def rows_of(
    classifier: Classifier, data: Data, denoiser: Any, samplers: Sequence[str], samples: int
) -> list[dict[str, Any]]:
    """The distances of a denoiser's samples by each sampler and number of evaluations."""
    rows = []
    for name in samplers:
        for num_steps in LEVELS[name]:
            sampler = SAMPLERS.build({"name": name})
            x, nfe = draw_samples(denoiser, data, sampler, num_steps=num_steps, samples=samples)
            assert data.train is not None
            found = distances(classifier, x.clamp(-1, 1), data.train)
            rows.append({"sampler": name, "nfe": nfe, "samples": samples, **found})
    return rows


def runs_of(out: Path, also: Sequence[Path]) -> Iterator[tuple[dict[str, str], Path]]:
    """Where each finished run belongs, and its folder: the cells of the comparison, then those beside it."""
    for cell in read_index(out, WHERE)["cells"]:
        if cell_figures(path := out / "cells" / cell["folder"]):
            yield {key: str(cell[key]) for key in WHERE}, path
    beside: dict[tuple[str, str], Path] = {}
    for path in also:
        config = RunFolder.open(path).config()
        place = str(config["objective"]["name"]), str(config["seed"])
        if (other := beside.setdefault(place, path)) != path:
            raise InputError(
                f"{other} and {path} are both {place[0]} at seed {place[1]}: give --also one of them"
            )
        yield {**BESIDE, "scheme": place[0], "seed": place[1]}, path


def main(
    out: Path, folder: Path, also: Sequence[Path], samplers: Sequence[str], samples: int, epochs: int
) -> list[dict[str, Any]]:
    """Measure every finished run by the samplers that features.csv lacks of it; returns all lines.

    Raises:
        InputError: a run was trained on other data than idx files.
    """
    file, rows = out / "features.csv", list[dict[str, Any]]()
    if file.exists():
        with file.open(newline="", encoding="utf-8") as lines:
            rows = list(csv.DictReader(lines))
    images, labels = (str(folder / f"mnist-t10k-{part}-ubyte.gz") for part in ("images-idx3", "labels-idx1"))
    known: dict[int, tuple[Data, Classifier]] = {}
    for where, path in runs_of(out, also):
        config = RunFolder(path).config()
        by = [config["sampler"]["name"]] if where["study"] == "beside" else samplers
        here = [row for row in rows if where.items() <= row.items() and int(row["samples"]) == samples]
        by = [name for name in by if name not in {row["sampler"] for row in here}]
        if not by:
            continue
        if (name := config["data"]["name"]) != "idx":
            raise InputError(
                f"{path} was trained on {name}: only runs on MNIST's files (data=idx) are measured here"
            )
        pool = config["data"]["pool"]
        if pool not in known:
            data = idx(images, labels, pool=pool)
            known[pool] = data, train_classifier(data, epochs)
        data, classifier = known[pool]
        assert data.train is not None
        real = {
            "training images": data.train[torch.randperm(len(data.train))[:samples]],
            "held-out images": data.test,
        }
        for name, x in real.items():
            scale = {**where, "scheme": name, "seed": "0"}
            if not any(scale.items() <= row.items() for row in rows):
                found = distances(classifier, x, data.train)
                rows.append({**scale, "sampler": "", "nfe": 0, "samples": len(x), **found})
        rows += [{**where, **row} for row in rows_of(classifier, data, load(path).denoiser, by, samples)]
        write_csv(file, COLUMNS, rows)
        print(f"measured: {', '.join(where.values())}", flush=True)
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="folder of the comparison")
    parser.add_argument("folder", type=Path, help="folder of MNIST's idx files")
    parser.add_argument("--also", type=Path, nargs="+", default=[], help="finished runs beside it")
    parser.add_argument("--samplers", nargs="+", choices=[*LEVELS], default=["ddim", "heun"])
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--epochs", type=int, default=8)
    given = parser.parse_args()
    try:
        main(given.out, given.folder, given.also, given.samplers, given.samples, given.epochs)
    except DiffrlError as error:
        sys.exit(f"error: {error}")
