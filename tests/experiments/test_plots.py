"""Figures from result files: the numbers drawn are the run's, for every kind of data."""

import csv
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib import image
from matplotlib.figure import Figure
from torch import Tensor

from diffrl.experiments.image_sheets import image_sheet
from diffrl.experiments.reports.run_figure import draw_samples, draw_summary
from diffrl.experiments.reports.style import STYLE, draw_points, plane_of
from diffrl.extras import MissingExtra
from diffrl.training.runs import RunFolder, RunFolderError
from tests.kit.runs import run


@pytest.fixture(scope="module")
def rings(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return run(tmp_path_factory.mktemp("rings") / "run")


def is_drawn(png: Path) -> bool:
    """Whether there is ink in every part of the picture."""
    ink = image.imread(png)[..., :3].min(2) < 0.8
    parts = [part for row in np.array_split(ink, 4) for part in np.array_split(row, 3, axis=1)]
    return ink.shape[0] > 600 and all(float(part.mean()) > 0.003 for part in parts)


def numbers(picture: Path) -> list[dict[str, str]]:
    """Those that a picture shows."""
    with picture.with_suffix(".csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_summary(rings: RunFolder, fonts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(STYLE, "pdf.fonttype", fonts)
    figure = draw_summary(rings.path)
    assert figure == rings.path / "plots" / "summary.png" and is_drawn(figure)
    pdf = figure.with_suffix(".pdf").read_bytes()
    assert pdf.startswith(b"%PDF") and b"/CIDFontType2" in pdf and b"/Type3" not in pdf  # text stays text


def test_the_numbers_beside_the_figure_are_the_run_s(rings: RunFolder) -> None:
    if not (rings.path / "plots" / "summary.csv").exists():
        draw_summary(rings.path)
    table = numbers(rings.path / "plots" / "summary.png")
    for name, figures in rings.results()["objectives"].items():
        own = [row for row in table if row["objective"] == name]
        errors = {row["sigma"]: float(row["y"]) for row in own if row["panel"] == "value_error"}
        assert errors == figures["value_error"]
        distances = {row["x"]: float(row["y"]) for row in own if row["panel"] == "sample_distance"}
        assert distances == figures["sample_distance"]["by_nfe"]
        means = [row for row in own if row["panel"] == "learning_curve" and row["sigma"] == "mean"]
        assert [int(row["x"]) for row in means] == [0, 10, 20, 30]
        assert float(means[-1]["y"]) == pytest.approx(sum(errors.values()) / 2)


def test_nothing_but_result_files_is_read(rings: RunFolder, tmp_path: Path) -> None:
    """The folder of a run that was trained elsewhere, without its checkpoints, is enough."""
    for name in ("config.yaml", "results.json", "metrics.csv"):
        (tmp_path / name).write_bytes((rings.path / name).read_bytes())
    (tmp_path / "samples").mkdir()
    for file in (rings.path / "samples").iterdir():
        (tmp_path / "samples" / file.name).write_bytes(file.read_bytes())
    assert is_drawn(draw_summary(tmp_path))


@pytest.mark.parametrize(
    "overrides",
    [
        ["data=checkerboard", "compare=false"],
        ["data=gmm", "data.dim=5"],
        ["data=digits", "eval.points=20", "eval.num_steps=[3]"],
        ["data=digits", "data.conditional=true", "eval.points=20", "objective=td_edm"],
        ["eval.distance=mmd", "eval.sigmas=[1]", "trainer.eval_every=1000"],
    ],
)
def test_every_kind_of_run_is_drawn(overrides: list[str], tmp_path: Path) -> None:
    folder = run(tmp_path / "run", "trainer.grad_steps=4", *overrides)
    picture = draw_summary(folder.path)
    assert is_drawn(picture)
    held = {row["y"] for row in numbers(picture) if row["panel"] == "denoising_error"}
    errors = [figures["denoising_error"].values() for figures in folder.results()["objectives"].values()]
    real = "data=digits" in overrides  # whose value error rewards what knows the training set by heart
    assert held == ({str(error) for of in errors for error in of} if real else set())


def test_figures_that_are_not_positive_are_drawn(rings: RunFolder, tmp_path: Path) -> None:
    folder = run(tmp_path / "run", "trainer.grad_steps=4")
    results = folder.results()
    for figures in results["objectives"].values():
        figures["sample_distance"] = {"metric": "mmd@40", "by_nfe": {"3": -0.001, "7": 0.0}}
    (folder.path / "results.json").write_text(json.dumps(results), encoding="utf-8")
    assert is_drawn(draw_summary(folder.path))


@pytest.mark.parametrize("event", [(1,), (2,), (7,), (3, 4), (1, 8, 8), (3, 6, 6)])
@pytest.mark.parametrize("count", [1, 10])
def test_samples_of_every_shape(event: tuple[int, ...], count: int, tmp_path: Path) -> None:
    g = torch.Generator().manual_seed(0)
    x, data = torch.randn(count, *event, generator=g), torch.randn(50, *event, generator=g)
    picture = draw_samples(x, tmp_path / "x.png", title="samples", data=data)
    assert picture == tmp_path / "x.png" and image.imread(picture).shape[0] > 300
    if count > 1:
        draw_samples(x, tmp_path / "y.png", title="samples")


def test_tiles() -> None:
    x = torch.linspace(-1, 1, 5)[:, None, None, None].expand(5, 3, 2, 4).numpy()
    sheet = image_sheet(x, 3)
    assert sheet.shape == (2 + 1 + 2, 4 + 1 + 4 + 1 + 4, 3)
    np.testing.assert_allclose(sheet[:2, :4], 0.0)
    np.testing.assert_allclose(sheet[:2, 5:9], 0.25)
    np.testing.assert_allclose(sheet[3:, 5:9], 1.0)
    np.testing.assert_allclose(sheet[2], 1.0)
    np.testing.assert_allclose(image_sheet(10 * x, 3)[3:, :4], 1.0)  # beyond [-1, 1] is clipped


def test_plane_is_that_of_greatest_variance() -> None:
    g = torch.Generator().manual_seed(0)
    scales = torch.tensor([0.1, 3.0, 0.1, 1.0])
    points = (scales * torch.randn(4000, 4, generator=g) + 5).numpy()
    plane, labels = plane_of(points)
    seen = plane(points)
    np.testing.assert_allclose(seen.std(0), [3, 1], rtol=0.05)
    np.testing.assert_allclose(seen.mean(0), 0, atol=1e-4)
    assert abs(np.corrcoef(seen[:, 0], points[:, 1])[0, 1] - 1) < 1e-3  # and the sign is fixed
    assert labels == ("first principal axis", "second principal axis")
    flat, labels = plane_of(points[:, :2])
    assert np.array_equal(flat(points[:3, :2]), points[:3, :2]) and labels == ("x₁", "x₂")


def test_points_out_of_sight_are_counted() -> None:
    frame = np.array([[0.0, 0.0], [1.0, 1.0]])
    points = np.array([[0.5, 0.5], [1.05, 0.0], [1.2, 0.5], [0.5, -3.0], [9.0, 9.0]])
    for seen, words in ((points, ["3 of 5 outside"]), (points[:2], [])):
        axes = Figure().subplots()
        draw_points(axes, seen, None, "k", frame)
        assert [text.get_text() for text in axes.texts] == words


def test_without_matplotlib(rings: RunFolder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for draw in (
        lambda: draw_summary(rings.path),
        lambda: draw_samples(Tensor(2, 2), tmp_path / "x", title=""),
    ):
        with pytest.raises(MissingExtra, match=r"matplotlib is missing: pip install 'diffrl\[plot\]'"):
            draw()


def test_without_a_run(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="holds no run"):
        draw_summary(tmp_path)
