"""What people see in figures: nothing is cut or hidden, titles say what is shown, text is taken as it is."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.text import Text

from diffrl.experiments.image_sheets import square_columns
from diffrl.experiments.method_findings import AXES, FIGURES, Method
from diffrl.experiments.reports.finetuning_figures import draw_curves, draw_pictures
from diffrl.experiments.reports.parts import reward_label
from diffrl.experiments.reports.run_figure import draw_samples, draw_summary
from diffrl.experiments.reports.run_table import data_label
from diffrl.experiments.reports.style import drawing, plain_ticks
from diffrl.experiments.reports.target_figure import draw_target_errors
from diffrl.experiments.reports.training_figures import draw_figures
from diffrl.experiments.reports.tuning_figure import draw_tuning
from diffrl.training.runs import RunFolder
from diffrl.training.table import Table
from tests.experiments.test_report import make, study
from tests.kit.drawn import cut_off, drawn, points_under_legends, title_of
from tests.kit.runs import run

DOLLARS = r"a $5 reward, $\nosuch{$ and 100 % of it"
LONG = {"name": "class_probability", "target": 7, "among": "all_the_digits_of_the_set", "log": False}


def seen_whole(figures: list[Figure]) -> bool:
    """Whether nothing reaches beyond the canvas, no legend lies over points, and no formula stands as its source."""
    sources = [text for f in figures for text in f.findobj(Text) if "\\mathdefault" in text.get_text()]
    whole = all(cut_off(f) < 0.05 and not points_under_legends(f) for f in figures)
    return bool(figures) and whole and not sources


# Fine-tuning


def methods(folder: Path, *names: str, event: tuple[int, ...] = (2,), heldout: str = "none") -> Any:
    """Made-up findings of methods, with a run folder of samples for each."""
    figures = {k: v for k, v in FIGURES.items() if heldout != "none" or k != "heldout_reward"}
    found = []
    for n, name in enumerate(names):
        one = RunFolder(folder / str(n))
        one.path.mkdir(parents=True)
        (one.path / "samples").mkdir()
        for k, kind in enumerate(("base", "tuned")):
            one.write_samples(kind, {"4": torch.randn(30, *event) + k})
        rows = [
            {**dict.fromkeys(AXES, 10.0 * i * (n + 1)), **dict.fromkeys(figures, i + n)} for i in range(5)
        ]
        found.append(Method(name, (1, 2), (rows, rows), ([1.0], [1.0]), ({}, {}), (one.path, one.path)))
    config = {"reward": LONG, "heldout_reward": {"name": heldout}}
    return SimpleNamespace(methods=found, figures=figures, config=config, common=lambda axis: 40.0)


@pytest.mark.parametrize("heldout", ["none", "class_neighbours"])
def test_curves_of_methods_are_whole_and_name_the_reward(heldout: str, tmp_path: Path) -> None:
    found = methods(tmp_path, "DDPO-SF", "a method of a rather long name", "SDPO", heldout=heldout)
    with drawn() as figures:
        titles = [title for title, _ in draw_curves(found, tmp_path)]
    assert seen_whole(figures)
    assert titles == [title_of(figure) for figure in figures]
    assert all(reward_label(LONG).lower() in title.lower() for title in titles)
    assert len(set(titles)) == len(AXES) + 1


@pytest.mark.parametrize("event", [(2,), (1, 8, 8)])
@pytest.mark.parametrize("count", [1, 3, 5])
def test_samples_before_and_after_say_what_for(event: tuple[int, ...], count: int, tmp_path: Path) -> None:
    found = methods(tmp_path, *(f"method {n}" for n in range(count)), event=event)
    with drawn() as figures:
        draw_pictures(found, tmp_path)
    [figure] = figures
    assert seen_whole([figure]) and reward_label(LONG) in title_of(figure)
    panels = [axes for axes in figure.axes if axes.get_title(loc="left")]
    assert [axes.get_title(loc="left") for axes in panels] == [
        "before tuning\nreward 0.00",
        *(f"method {n}, seed 1\nreward {4 + n:.2f}" for n in range(count)),
    ]
    assert len({axes.get_xlim() for axes in panels}) == 1


def test_names_of_rewards() -> None:
    assert reward_label({"name": "mode_distance", "point": [0.8, 0.0]}) == "mode distance (point=[0.8, 0.0])"
    assert (
        reward_label({"name": "class_probability", "target": 7, "log": False})
        == "class probability (target=7)"
    )
    assert reward_label({"name": "ink"}) == "ink"


def test_a_single_tuning_run_is_drawn(tmp_path: Path) -> None:
    folder = RunFolder(methods(tmp_path, "SDPO").methods[0].folders[0])
    (folder.path / "config.yaml").write_text(
        "{reward: {name: ink}, heldout_reward: {name: none}, loop: {iterations: 9}, seed: 3, dtype: float32}",
        encoding="utf-8",
    )
    folder.write_results({"finetuning": {"base": {"eval_reward": 0.25}, "final": {"eval_reward": 0.75}}})
    table = Table(
        folder.path / "metrics.csv", ("iteration", "reward", "eval_reward", "diversity", "distance_to_base")
    )
    for i in range(10):
        judged = {"eval_reward": i / 9, "diversity": 1 - i / 9, "distance_to_base": i} if i % 3 == 0 else {}
        table.append({"iteration": i, "reward": i / 10, **judged})
    with drawn() as figures:
        assert draw_tuning(folder.path) == folder.path / "plots" / "summary.png"
    [figure] = figures
    assert seen_whole([figure]) and title_of(figure) == "Tuned for ink: 9 iterations, seed 3"
    rewards, likeness, before, after = figure.axes
    assert rewards.lines[1].get_xydata().tolist() == [[0, 0], [3, 3 / 9], [6, 6 / 9], [9, 1]]
    assert [line.get_label() for line in likeness.lines] == ["diversity", "distance to the base"]
    assert "0.25" in before.get_title(loc="left") and "0.75" in after.get_title(loc="left")


# Training


GRID = {"λ": ("0", "0.5", "1"), "η": ("0", "1")}
POINTS = tuple(f"λ={lmbda}, η={eta}" for lmbda in GRID["λ"] for eta in GRID["η"])


@pytest.mark.parametrize("changes", [{}, {"axes": GRID, "schemes": POINTS, "baseline": "λ=1, η=1"}])
def test_figures_of_a_study_are_whole_and_without_keys(changes: dict[str, Any], tmp_path: Path) -> None:
    [panel] = make(tmp_path, study("key_of_study", cases=("key_of_case",), **changes)).panels()
    with drawn() as figures:
        titles = [title for title, _ in draw_figures(panel, tmp_path / "figures")]
    assert len(figures) == 3 and seen_whole(figures)
    assert titles == [title_of(figure) for figure in figures] and len(set(titles)) == 3
    assert all(title.startswith("Which is best") for title in titles)
    assert all(title.endswith("(a mixture of 12 Gaussians in 16-D)") for title in titles)
    assert not [text for figure in figures for text in figure.findobj(Text) if "key_of" in text.get_text()]


def test_errors_of_targets_are_whole(tmp_path: Path) -> None:
    def level(sigma: float) -> dict[str, Any]:
        parts = {
            "bias_sq": 0.1 * sigma,
            "bias_sq_error": 0.0,
            "variance": 20 / sigma,
            "total": 20 / sigma + 0.1 * sigma,
        }
        targets = dict.fromkeys(("lmbda=0", "lmbda=0.5", "lmbda=0.9", "monte_carlo"), parts)
        return {
            "sigma": sigma,
            "targets": targets,
            "value_error": sigma,
            "bellman_residual": 0.2,
            "best_lmbda": 0.5,
        }

    with drawn() as figures:
        draw_target_errors({"levels": [level(0.01 * 3**k) for k in range(9)]}, tmp_path / "targets")
    assert seen_whole(figures) and title_of(figures[0]) == "Errors of targets by noise level"
    assert all(len(axes.get_yticks()) > 1 for axes in figures[0].axes)


def test_names_of_data() -> None:
    edm = {"process": {"name": "edm"}}
    assert (
        data_label({"data": {"name": "gmm", "components": 3, "dim": 8}, **edm})
        == "a mixture of 3 Gaussians in 8-D"
    )
    assert data_label({"data": {"name": "folder", "path": "pictures/of/cats"}, **edm}) == "cats"
    assert data_label({"data": {"name": "rings"}, "process": {"name": "flow"}}) == "rings, process flow"


def ticks_between(low: float, high: float, most: int) -> list[float]:
    with drawing() as figure:
        axes = figure.subplots()
        axes.set(xscale="log", xlim=(low, high))
        axis: Axis = axes.xaxis
        plain_ticks(axis, most)
        return [float(tick) for tick in axis.get_ticklocs()]


@pytest.mark.parametrize("most", [2, 4, 9])
@pytest.mark.parametrize(
    "limits",
    [
        (0.96, 1.04),
        (0.93, 1.04),
        (0.9, 1.3),
        (0.96, 1.9),
        (0.5, 2),
        (0.04, 1.04),
        (0.2, 20),
        (1e-4, 1e6),
        (9.5, 11),
    ],
)
def test_an_axis_has_more_than_one_tick(limits: tuple[float, float], most: int) -> None:
    ticks = ticks_between(*limits, most)
    assert len(ticks) >= 2 and all(limits[0] <= tick <= limits[1] for tick in ticks)
    if most >= 4:
        assert len(ticks) <= most


# Samples, and text of a user


@pytest.mark.parametrize("count", [1, 2, 3, 10, 16, 50, 64])
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 6, 18), (3, 18, 6)])
def test_a_sheet_of_few_images_leaves_no_blank(count: int, shape: tuple[int, ...], tmp_path: Path) -> None:
    columns = square_columns(count)
    assert columns * (-(-count // columns)) - count < columns  # less than a row is empty
    with drawn() as figures:
        draw_samples(torch.zeros(count, *shape), tmp_path / "x.png", title="samples")
    [figure] = figures
    _, _, width, height = figure.axes[0].get_position().bounds
    title = 0.5 / figure.get_figheight()
    assert width > 0.9 and height > 0.9 - title


def test_dollars_are_dollars(tmp_path: Path) -> None:
    with drawn() as figures:
        draw_samples(torch.zeros(4, 1, 4, 4), tmp_path / "x.png", title=DOLLARS)
        folder = run(tmp_path / "run", "compare=false", "trainer.grad_steps=4")
        (folder.path / "command.txt").write_text(f"python train.py 'run_dir={DOLLARS}'\n", encoding="utf-8")
        draw_summary(folder.path)
        draw_curves(methods(tmp_path / "m", DOLLARS, "$$", "$x^{$"), tmp_path)
    assert title_of(figures[0]) == DOLLARS
    assert not any(text.get_parse_math() for figure in figures for text in figure.findobj(Text))
    assert seen_whole(figures)
