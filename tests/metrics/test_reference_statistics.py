"""Statistics of a reference set: what is kept is what would be computed, and what does not fit is refused."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Generator, Tensor

from diffrl.data.files import digits
from diffrl.errors import FileError, InputError
from diffrl.metrics.distances import sample_distance
from diffrl.metrics.point_clouds import frechet_distance
from diffrl.metrics.reference_statistics import Features, Statistics, frechet, kept_statistics
from diffrl.training.evaluation import Evaluation

W = torch.randn(5, 3, generator=Generator().manual_seed(0), dtype=torch.float64)
X = torch.randn(40, 5, generator=Generator().manual_seed(1), dtype=torch.float64)


def features(weights: Tensor = W, name: str = "linear", calls: list[int] | None = None) -> Features:
    def compute(x: Tensor) -> Tensor:
        if calls is not None:
            calls.append(len(x))
        return x @ weights

    return Features(name, compute, lambda: {"w": weights})


def test_statistics_are_mean_and_covariance_and_give_the_distance() -> None:
    f, g = (X @ W).numpy(), X @ W * 1.3 + 0.2
    found = Statistics.of(X @ W)
    np.testing.assert_allclose(found.mean.numpy(), f.mean(0), atol=1e-12)
    np.testing.assert_allclose((found.root.T @ found.root).numpy(), np.cov(f.T), atol=1e-12)
    assert frechet(found, Statistics.of(g)) == frechet_distance(X @ W, g) > 0
    assert frechet(found, found) == pytest.approx(0, abs=1e-12)
    with pytest.raises(InputError, match="at least 2 samples, not 1"):
        Statistics.of(X[:1])


def test_they_are_computed_once_for_data_and_features(tmp_path: Path) -> None:
    calls: list[int] = []
    first = kept_statistics(features(calls=calls), X, tmp_path / "new" / "folder")
    again = kept_statistics(features(calls=calls), X.clone(), tmp_path / "new" / "folder")
    assert calls == [40]
    assert torch.equal(first.mean, again.mean) and torch.equal(first.root, again.root)
    assert len([*(tmp_path / "new" / "folder").iterdir()]) == 1
    changed = X.clone()
    changed[17, 2] += 1e-9
    for other, x in ((features(calls=calls), changed), (features(W + 1e-9, calls=calls), X)):
        kept_statistics(other, x, tmp_path / "new" / "folder")
    kept_statistics(features(name="other", calls=calls), X, tmp_path / "new" / "folder")
    assert calls == [40] * 4 and len([*(tmp_path / "new" / "folder").iterdir()]) == 4


def changed_number(path: Path, other: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[-3] ^= 1
    path.write_bytes(raw)


def of_other_data(path: Path, other: Path) -> None:
    path.write_bytes(other.read_bytes())


def cut(path: Path, other: Path) -> None:
    path.write_bytes(path.read_bytes()[:-8])


def no_description(path: Path, other: Path) -> None:
    path.write_bytes(safetensors.torch.save(safetensors.torch.load(path.read_bytes())))


def other_tensors(path: Path, other: Path) -> None:
    path.write_bytes(safetensors.torch.save({"mean": W}))


def empty(path: Path, other: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("harm", [changed_number, of_other_data, cut, no_description, other_tensors, empty])
def test_files_that_do_not_fit_are_refused(tmp_path: Path, harm: Callable[[Path, Path], None]) -> None:
    kept_statistics(features(), X, tmp_path / "a")
    kept_statistics(features(), X + 1, tmp_path / "b")
    (path,), (other,) = (tmp_path / "a").iterdir(), (tmp_path / "b").iterdir()
    harm(path, other)
    with pytest.raises(InputError, match=r"damaged, or of other data or features: remove it") as error:
        kept_statistics(features(), X, tmp_path / "a")
    assert "\n" not in str(error.value) and str(path) in str(error.value)
    path.unlink()
    assert torch.equal(kept_statistics(features(), X, tmp_path / "a").mean, Statistics.of(X @ W).mean)


def test_a_place_that_is_none_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(FileError, match=r"file.*cannot be"):
        kept_statistics(features(), X, tmp_path / "file")


def test_distances_of_digits_are_the_same_with_a_folder_and_without(tmp_path: Path) -> None:
    data = digits()
    assert data.train is not None
    x, y = data.test, data.train
    expected = sample_distance("fd_digits_cnn", x, y)
    for _ in range(2):
        assert sample_distance("fd_digits_cnn", x, y, statistics=tmp_path) == expected
    assert len([*tmp_path.iterdir()]) == 1
    evaluation = Evaluation(distance="fd_digits_cnn", statistics=str(tmp_path))
    assert evaluation.sample_distance(x, data) == expected and len([*tmp_path.iterdir()]) == 1
    with pytest.raises(InputError, match="w2 is no distance of features that keeps them"):
        sample_distance("sliced_w2", x, y, statistics=tmp_path)
