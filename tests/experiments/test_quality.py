"""Quality of samples in a run: in training, at the end, measured again, in words and pictures, by full names."""

import csv
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from diffrl.errors import DiffrlError
from diffrl.experiments.evaluate import evaluate_run
from diffrl.experiments.reports.quality_figure import draw_quality
from diffrl.experiments.reports.run_table import figure_rows, summary_table
from diffrl.experiments.train import TrainingJob, run_experiment
from diffrl.metrics.measures import FEATURE_MEASURES
from diffrl.training.build import build_data
from diffrl.training.evaluation import Evaluation, draw_samples
from diffrl.training.runs import RunFolder, load
from tests.kit.configs import small

MEASURES = [f"{measure}_identity" for measure in FEATURE_MEASURES]
SHORT = ("compare=false", "trainer.grad_steps=20", "trainer.report_every=5", "trainer.eval_every=5")
LOOKS = (f"eval.quality=[{','.join(MEASURES)}]", "eval.quality_every=10", "eval.seed=7", "eval.streams=keyed")


@pytest.fixture(scope="module")
def drawn() -> list[int]:
    """Levels of all samples that were drawn."""
    return []


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory, drawn: list[int]) -> RunFolder:
    folder = tmp_path_factory.mktemp("quality") / "run"
    words = (f"run_dir={folder}", *SHORT, *LOOKS)
    draw = TrainingJob._draw

    def noted(job: TrainingJob, num_steps: int, samples: int, *which: Any) -> tuple[Tensor, int]:
        drawn.extend([num_steps] * (samples == 40))
        return draw(job, num_steps, samples, *which)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainingJob, "_draw", noted)
        return run_experiment(small(*words), progress=False)


def rows(folder: RunFolder) -> list[dict[str, str]]:
    return list(csv.DictReader((folder.path / "metrics.csv").read_text(encoding="utf-8").splitlines()))


def test_figures_at_the_end_carry_features_number_and_seed(measured: RunFolder) -> None:
    found = measured.results()["objectives"]["td"]
    assert found["sample_distance"]["metric"] == "sliced_w2@40_key7"
    assert [*found["quality"]] == [f"{name}@40_key7" for name in MEASURES]
    assert all([*by_nfe] == ["3", "7"] for by_nfe in found["quality"].values())
    rows = dict(figure_rows(found))
    fd = found["quality"]["fd_identity@40_key7"]["7"]
    assert rows["Fréchet distance (identity), 40 samples, key 7, NFE 7"] == f"{fd:#.3g}"
    table = summary_table(measured.results())
    assert "precision (identity), NFE 3" in table and "40 samples, key 7" in table


def test_training_is_looked_at_at_its_own_interval(measured: RunFolder, drawn: list[int]) -> None:
    table, found = rows(measured), measured.results()["objectives"]["td"]
    columns = [f"{m}@40_key7_nfe{n}" for m in ("sliced_w2", *MEASURES) for n in (3, 7)]
    assert [*table[0]][-10:] == columns
    looked = {row["grad_steps"]: [bool(row[name]) for name in columns] for row in table}
    assert looked == {str(step): 10 * [step % 10 == 0] for step in (0, 5, 10, 15, 20)}
    assert drawn == [1, *3 * [2, 4]]  # once to try it; the last look is that of the results
    last = table[-1]
    assert float(last["sliced_w2@40_key7_nfe7"]) == found["sample_distance"]["by_nfe"]["7"]
    assert float(last["kid_identity@40_key7_nfe3"]) == found["quality"]["kid_identity@40_key7"]["3"]


def test_looking_changes_nothing_of_the_training(measured: RunFolder, tmp_path: Path) -> None:
    plain = run_experiment(small(f"run_dir={tmp_path / 'plain'}", *SHORT), progress=False)
    table = rows(plain)
    assert not any("@" in name for name in table[0]) and "quality" not in plain.results()["objectives"]["td"]
    for row, beside in zip(table, rows(measured), strict=True):
        assert all(beside[name] == figure for name, figure in row.items() if name != "seconds")
    assert draw_quality(plain.path) is None


def test_figures_do_not_depend_on_what_is_drawn_side_by_side(measured: RunFolder) -> None:
    kept = measured.results()["objectives"]["td"]
    again = evaluate_run(measured.path, {"at_once": 7})
    for name, by_nfe in kept["quality"].items():
        assert again["quality"][name] == pytest.approx(by_nfe, rel=1e-5)
    other = evaluate_run(measured.path, {"seed": 8, "quality": ("fd_identity",), "num_steps": (2,)})
    assert other["sample_distance"]["metric"] == "sliced_w2@40_key8"
    assert other["quality"]["fd_identity@40_key8"]["3"] != kept["quality"]["fd_identity@40_key7"]["3"]
    run, options = load(measured.path), {"num_steps": 2, "seed": 7, "streams": "keyed"}
    x, _ = draw_samples(run.denoiser, run.data, run.sampler, samples=40, batch_size=9, **options)
    assert run.sample(40, at_once=40, **options).allclose(x, rtol=1e-5, atol=1e-6)
    distance = Evaluation(samples=40, streams="keyed").sample_distance(x, run.data)
    assert distance == pytest.approx(kept["sample_distance"]["by_nfe"]["3"], rel=1e-5)


def test_the_picture_shows_the_figures(measured: RunFolder, unrendered: None) -> None:
    path = draw_quality(measured.path)
    assert path is not None and path.exists()
    shown = list(csv.DictReader(path.with_suffix(".csv").read_text(encoding="utf-8").splitlines()))
    assert len(shown) == 10 + 3 * 10  # at the end, and in training at 0, 10, 20
    found = measured.results()["objectives"]["td"]["quality"]["recall_identity@40_key7"]["7"]
    values = [float(r["value"]) for r in shown if (r["figure"], r["nfe"]) == ("recall_identity@40_key7", "7")]
    assert values[0] == values[-1] == found


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["eval.quality=[fid]"], "^eval.quality: no distance is called 'fid'; there are w2"),
        (
            ["eval.distance=fd_nope"],
            "^eval.distance: no distance is called 'fd_nope'; .* before one of digits_cnn",
        ),
        (["eval.quality=[fd_digits_cnn]"], r"takes images \[N, 1, 8, 8\]"),
        (
            ["eval.quality=[fd_inception]"],
            "features inception need a file of weights.* `?eval.weights`?, of wei",
        ),
        (["eval.quality=[fd_inception]", "eval.weights=x.pth"], "x.pth is missing: features inception need"),
        (
            ["eval.quality=[recall_identity]", "eval.samples=3"],
            "3 neighbours need more points than that, not 3",
        ),
        (["eval.quality=[kid_identity]", "eval.samples=1"], "kid needs at least 2 samples of each, not 1"),
        (["eval.weights=x.pth"], "eval.weights is given, but no measure has features that take them"),
        (["eval.statistics=x"], "eval.statistics is given, but no measure keeps them"),
        (["eval.quality_every=3"], "eval.quality_every is 3: give a multiple of trainer.eval_every, 5"),
        (["eval.streams=mixed"], "eval.streams is 'mixed'"),
        (["eval.seed=-1"], "eval.seed is -1"),
    ],
)
def test_what_cannot_be_measured_is_refused_at_the_start(words: list[str], message: str) -> None:
    config = small(*SHORT, *words)
    with pytest.raises(DiffrlError, match=message):
        TrainingJob(config, build_data(config), "td").check()
