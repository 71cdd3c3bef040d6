"""Kernel distance, precision and recall, features by name: against plain loops and closed forms; what is refused."""

import math
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from diffrl.errors import FileError, InputError
from diffrl.extras import MissingExtra
from diffrl.metrics import manifolds
from diffrl.metrics.features import FEATURES, digits_features, named_features
from diffrl.metrics.kernel_distance import kid
from diffrl.metrics.manifolds import precision, recall
from diffrl.metrics.measures import FigureName, Reference, features_of, measure_names
from diffrl.metrics.point_clouds import frechet_distance
from tests.kit.oracles import randn

# --- the kernel distance


def test_kid_of_all_points_is_the_plain_loop() -> None:
    X, Y = randn(11, 3), 0.7 * randn(11, 3, seed=1) + 0.4

    def mean_of(x: Tensor, y: Tensor, *, same: bool) -> float:
        terms = [
            (float(a @ b) / 3 + 1) ** 3
            for i, a in enumerate(x)
            for j, b in enumerate(y)
            if not (same and i == j)
        ]
        return sum(terms) / len(terms)

    expected = mean_of(X, X, same=True) + mean_of(Y, Y, same=True) - 2 * mean_of(X, Y, same=False)
    assert kid(X, Y) == pytest.approx(expected, rel=1e-12)


def test_kid_of_gaussians_is_the_closed_form() -> None:
    # in 1-D, (xy + 1)³ = Σ_j C(3, j) xʲ yʲ, so that MMD² = Σ_j C(3, j) (E xʲ - E yʲ)²
    m, s = 0.5, 1.2
    of_x, of_y = (0, 1, 0), (m, m**2 + s**2, m**3 + 3 * m * s**2)
    exact = sum(math.comb(3, j + 1) * (a - b) ** 2 for j, (a, b) in enumerate(zip(of_x, of_y, strict=True)))
    x, y = randn(60, 200, 1), m + s * randn(60, 200, 1, seed=1)
    found = np.array([kid(a, b) for a, b in zip(x, y, strict=True)])
    assert abs(found.mean() - exact) < 4 * found.std() / math.sqrt(60)
    assert found.std() < exact  # the bound means something


def test_kid_of_subsets_is_seeded_and_leaves_the_random_state() -> None:
    x, y = randn(90, 2), 0.5 * randn(90, 2, seed=1) + 0.5
    torch.manual_seed(7)
    expected = torch.randn(2)
    torch.manual_seed(7)
    found = [kid(x, y, subset_size=30, subsets=20, seed=seed) for seed in (0, 0, 1)]
    assert torch.equal(torch.randn(2), expected)
    assert found[0] == found[1] != found[2]
    many = kid(x, y, subset_size=30, subsets=500)
    assert many == pytest.approx(kid(x, y), rel=0.1)  # the mean over all subsets


def test_kid_refuses_one_point_and_names_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="at least 2 samples of each, not 1 and 5"):
        kid(randn(1, 2), randn(5, 2))
    monkeypatch.setitem(sys.modules, "torchmetrics.image.kid", None)
    with pytest.raises(MissingExtra, match=r"torchmetrics.* is missing: pip install 'diffrl\[eval\]'"):
        kid(randn(3, 2), randn(5, 2))


# --- precision and recall


def in_manifold(x: Tensor, y: Tensor, k: int) -> float:
    """Share of x within the k-th neighbour's distance of some y, by plain loops."""
    inside = 0
    for a in x.tolist():
        found = False
        for j, b in enumerate(y.tolist()):
            others = sorted(math.dist(b, c) for i, c in enumerate(y.tolist()) if i != j)
            found = found or math.dist(a, b) <= others[k - 1]
        inside += found
    return inside / len(x)


@pytest.mark.parametrize("k", [1, 3])
def test_precision_and_recall_are_the_plain_loops(k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = randn(25, 2), 0.5 * randn(31, 2, seed=1) + 0.8
    y[4] = y[9]  # a repeated point has a neighbour at distance 0
    found = precision(x, y, k=k), recall(x, y, k=k)
    assert [*found] == pytest.approx([in_manifold(x, y, k), in_manifold(y, x, k)])
    assert 0 < found[0] < 1 and 0 < found[1] < 1 and found[0] != found[1]
    monkeypatch.setattr(manifolds, "NUMBERS", 70)  # two rows at once
    assert (precision(x, y, k=k), recall(x, y, k=k)) == found


def test_precision_sees_what_is_no_datum_and_recall_what_is_left_out() -> None:
    data = torch.cat([randn(40, 2), randn(40, 2, seed=1) + 50])
    one_mode, stray = data[:40] + 1e-6, torch.cat([data[:60], randn(20, 2, seed=2) - 90])
    assert (precision(data, data), recall(data, data)) == (1, 1)
    assert (precision(one_mode, data), recall(one_mode, data)) == (1, 0.5)
    assert precision(stray, data) == 0.75 and recall(stray, data) > 0.9
    assert (precision(data + 1e3, data), recall(data + 1e3, data)) == (0, 0)
    with pytest.raises(InputError, match="by 3 neighbours need more points than that, not 3"):
        precision(data, data[:3])


# --- by name


def test_every_measure_of_features_is_that_of_the_features() -> None:
    x, y = randn(50, 1, 8, 8).tanh().float(), 0.5 * randn(70, 1, 8, 8, seed=1).float()
    fx, fy = digits_features(x), digits_features(y)
    names = ["sliced_w2", *(f"{m}_digits_cnn" for m in ("fd", "kid", "precision", "recall"))]
    found = Reference(y).measured(names, x)
    assert list(found) == names and {*names} <= {*measure_names()}
    assert found["fd_digits_cnn"] == frechet_distance(fx, fy) and found["kid_digits_cnn"] == kid(fx, fy)
    chosen = fy[torch.randperm(70, generator=torch.Generator().manual_seed(0))[:50]]  # as many as samples
    assert found["precision_digits_cnn"] == precision(fx, chosen)
    assert found["recall_digits_cnn"] == recall(fx, chosen)


@pytest.mark.parametrize("name", ["fid", "fd_", "fd_nothing", "is_digits_cnn", "precision", "digits_cnn"])
def test_there_is_no_measure_without_named_features(name: str) -> None:
    with pytest.raises(
        InputError, match=f"no distance is called '{name}'; there are w2.*fd_, kid_.*inception"
    ):
        features_of(name)


def test_a_figure_says_what_it_is_of() -> None:
    name = FigureName("fd_digits_cnn", 500, "key7")
    assert str(name) == "fd_digits_cnn@500_key7" and FigureName.of(str(name)) == name
    assert str(FigureName.of("sliced_w2@2000")) == "sliced_w2@2000"
    with pytest.raises(InputError, match="'FID' names no figure"):
        FigureName.of("FID")


# --- the user's features


class Halved(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2).double()
        self.sizes: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        assert not self.training and not torch.is_grad_enabled()
        self.sizes.append(len(x))
        return self.layer(x)


@pytest.fixture
def own() -> Iterator[None]:
    known = dict(FEATURES._entries) if len(FEATURES) else {}
    yield
    FEATURES._entries = known


def test_own_features_are_any_callable(own: None, tmp_path: Path) -> None:
    module, (x, y) = Halved(), (randn(30, 3), randn(40, 3, seed=1))
    FEATURES.register("halved")(lambda: module)
    FEATURES.register("rows")(lambda: lambda x: x[:, :2])
    FEATURES.register("flat")(lambda: lambda x: x[:, 0])
    FEATURES.register("none")(lambda: None)
    reference = Reference(y)
    for _ in range(2):
        found = reference.measured(["fd_halved", "kid_halved", "fd_rows"], x)
    assert module.sizes == [30, 40, 30]  # of the data once, of samples once for all measures
    with torch.no_grad():
        assert found["fd_halved"] == pytest.approx(frechet_distance(module(x), module(y)), rel=1e-12)
    assert found["fd_rows"] == frechet_distance(x[:, :2], y[:, :2])
    kept = Reference(y, statistics=tmp_path)
    assert kept.measured(["fd_halved"], x)["fd_halved"] == found["fd_halved"]
    assert [file.name[:7] for file in tmp_path.iterdir()] == ["halved-"]
    with pytest.raises(InputError, match="features rows are no module.*leave `statistics` out"):
        kept.measured(["fd_rows"], x)
    with pytest.raises(InputError, match=r"features flat of 30 samples have shape \(30,\): give \[N, F\]"):
        reference.measured(["fd_flat"], x)
    with pytest.raises(
        InputError, match="features none made None: register a function that returns a callable"
    ):
        reference.measured(["fd_none"], x)


# --- Inception's


def test_inception_needs_a_file_and_downloads_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        InputError, match="inception need a file of weights, and download none: give .*github.com"
    ):
        named_features("inception")
    file = tmp_path / "weights.pth"
    with pytest.raises(
        FileError, match="weights.pth is missing: features inception need weights-inception-2015"
    ):
        named_features("inception", weights=file)
    file.write_bytes(b"no weights")
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", None)
    with pytest.raises(MissingExtra, match=r"torch_fidelity.* is missing: pip install 'diffrl\[inception\]'"):
        named_features("inception", weights=file)
