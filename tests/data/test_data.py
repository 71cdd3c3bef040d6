"""Data sets: known laws against their samples, splits, batches, and what is refused."""

import math
import sys
from typing import Any

import numpy as np
import pytest
import torch

import diffrl
from diffrl.data.dataset import Data
from diffrl.data.files import digits
from diffrl.data.image_files import DataError
from diffrl.data.mixtures import Mixture
from diffrl.data.registry import DATASETS
from diffrl.data.synthetic import gmm, rings
from diffrl.diffusion.networks.mlp import MLP
from diffrl.errors import InputError, InputTypeError
from diffrl.extras import MissingExtra
from diffrl.objectives.value import ValueLoss
from diffrl.training.build import build_data
from tests.kit.oracles import generator

SYNTHETIC = ["gmm", "rings", "checkerboard", "moons", "spirals"]


# --- mixtures


def test_mixture_samples_have_its_mean_and_covariance() -> None:
    means = torch.tensor([[1.0, 0.0, -1.0], [-0.5, 2.0, 0.0]])
    mixture = Mixture(means, torch.tensor([0.3, 0.6]), torch.tensor([0.25, 0.75]))
    n = 200_000
    x = mixture.sample(n, generator())
    assert x.dtype == torch.float64 and x.shape == (n, 3)
    m = 0.25 * means[0] + 0.75 * means[1]
    between = sum(w * torch.outer(mu - m, mu - m) for w, mu in zip((0.25, 0.75), means, strict=True))
    covariance = between + (0.25 * 0.3**2 + 0.75 * 0.6**2) * torch.eye(3)
    # 5 standard errors of a mean, and of a variance
    torch.testing.assert_close(x.mean(0), m.double(), atol=5 * 1.3 / math.sqrt(n), rtol=0)
    torch.testing.assert_close(x.T.cov(), covariance.double(), atol=5 * 2.5 / math.sqrt(n), rtol=0)
    assert mixture.sigma_data == pytest.approx(float(x.std(correction=0)), rel=5e-3)


def test_mixture_components_are_drawn_by_weight_with_their_own_width() -> None:
    mixture = Mixture(torch.tensor([[-10.0], [10.0]]), torch.tensor([0.0, 2.0]), torch.tensor([0.1, 0.9]))
    x = mixture.sample(50_000, generator())
    right = x > 0
    assert float(right.double().mean()) == pytest.approx(0.9, abs=0.007)
    assert bool((x[~right] == -10).all())
    assert float(x[right].std()) == pytest.approx(2.0, rel=0.02)


@pytest.mark.parametrize(
    ("stds", "weights"),
    [([0.1], [0.5, 0.5]), ([0.1, -0.1], [0.5, 0.5]), ([0.1, 0.1], [0.5, 0.6]), ([0.1, 0.1], [-0.5, 1.5])],
)
def test_mixture_refuses_what_is_none(stds: list[float], weights: list[float]) -> None:
    with pytest.raises(ValueError, match="a mixture needs"):
        Mixture(torch.zeros(2, 3), torch.tensor(stds), torch.tensor(weights))


@pytest.mark.parametrize("field", ["means", "stds", "weights"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_mixture_refuses_what_is_not_finite(field: str, value: float) -> None:
    parts = {"means": torch.zeros(2, 3), "stds": torch.ones(2), "weights": torch.ones(2) / 2}
    parts[field].view(-1)[0] = value
    with pytest.raises(InputError, match="a mixture needs finite means"):
        Mixture(**parts)


def test_gmm_is_the_mixture_that_its_arguments_say() -> None:
    data = gmm(dim=500, components=40, std=0.05, spread=0.5, mixture_seed=3)
    mixture = data.mixture
    assert mixture is not None and mixture.means.shape == (40, 500) and data.event_shape == (500,)
    assert float(mixture.means.std()) == pytest.approx(0.5, rel=0.03)
    assert mixture.stds.unique().tolist() == [0.05]
    log_weights = mixture.weights.log()
    assert float(log_weights.std()) == pytest.approx(1.0, abs=0.4)  # softmax of normals: logs are normal
    assert not torch.equal(mixture.means, gmm(dim=500, components=40).mixture.means)


def test_rings_are_equally_spaced_equal_gaussians() -> None:
    mixture = rings(modes=6, radius=0.7, std=0.01).mixture
    assert mixture is not None
    torch.testing.assert_close(mixture.means.norm(dim=1), torch.full((6,), 0.7, dtype=torch.float64))
    neighbours = (mixture.means - mixture.means.roll(1, 0)).norm(dim=1)  # a hexagon's side is its radius
    torch.testing.assert_close(neighbours, torch.full((6,), 0.7, dtype=torch.float64))
    assert mixture.weights.unique().tolist() == [1 / 6]


# --- every synthetic set


@pytest.mark.parametrize("name", SYNTHETIC)
def test_synthetic_sets_draw_afresh_and_reproducibly(name: str) -> None:
    data = DATASETS[name](test_size=300)
    assert data.name == name and data.train is None and data.num_classes == 0
    assert data.test.shape == (300, *data.event_shape) and data.test.dtype == torch.float32
    g = generator(1)
    first, labels = data.batch(50, g)
    second, _ = data.batch(50, g)
    again, _ = data.batch(50, generator(1))
    assert labels is None and first.shape == (50, *data.event_shape) and first.dtype == torch.float32
    assert torch.equal(first, again) and not torch.equal(first, second)
    assert torch.equal(data.test, DATASETS[name](test_size=300).test)
    large, _ = data.batch(50_000, generator(2))
    assert data.sigma_data == pytest.approx(float(large.std()), rel=0.01)


@pytest.mark.parametrize("name", ["rings", "checkerboard", "moons", "spirals"])
def test_planar_sets_span_about_the_unit_square(name: str) -> None:
    x, _ = DATASETS[name]().batch(20_000, generator())
    assert x.shape[1] == 2 and 0.85 < float(x.abs().max()) < 1.3


def test_checkerboard_fills_the_dark_cells_evenly() -> None:
    x, _ = DATASETS["checkerboard"](cells=4).batch(40_000, generator())
    cell = ((x + 1) * 2).floor().long().clamp(max=3)
    counts = torch.zeros(4, 4).index_put((cell[:, 0], cell[:, 1]), torch.ones(len(x)), accumulate=True)
    dark = (torch.arange(4)[:, None] + torch.arange(4)) % 2 == 0
    assert float(counts[~dark].sum()) == 0
    torch.testing.assert_close(counts[dark], torch.full((8,), 5000.0), atol=5 * math.sqrt(5000), rtol=0)


def test_moons_without_noise_are_scikit_learns_curves() -> None:
    from sklearn.datasets import make_moons

    curves = (torch.from_numpy(make_moons(4000, noise=None)[0]).float() - torch.tensor([0.5, 0.25])) / 1.5
    x, _ = DATASETS["moons"](noise=0.0).batch(500, generator())
    assert float(torch.cdist(x, curves).min(1).values.max()) < 2e-3
    assert float(torch.cdist(curves, x).min(1).values.max()) < 0.1  # all of both curves is reached


def test_spirals_without_noise_lie_on_their_curves() -> None:
    arms, turns = 3, 1.25
    x, _ = DATASETS["spirals"](arms=arms, turns=turns, noise=0.0).batch(5000, generator())
    r = x.double().norm(dim=1)
    arm = (torch.atan2(x[:, 1], x[:, 0]).double() / (2 * math.pi) - turns * r) * arms
    torch.testing.assert_close(arm, arm.round(), atol=2e-4, rtol=0)
    assert set((arm.round().long() % arms).tolist()) == {0, 1, 2}
    assert float((r**2).mean()) == pytest.approx(0.5, abs=0.02)  # r² uniform: even over the disc


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("gmm", {"dim": 0}),
        ("gmm", {"components": 0}),
        ("rings", {"modes": 0}),
        ("checkerboard", {"cells": 0}),
        ("spirals", {"arms": 0}),
        ("moons", {"test_size": 0}),
    ],
)
def test_synthetic_sets_refuse_empty_ones(name: str, arguments: dict[str, int]) -> None:
    with pytest.raises(DataError, match=f"{name}.*{next(iter(arguments))}.*at least 1"):
        DATASETS[name](**arguments)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("gmm", {"dim": 10**18}, r"takes .* GiB of memory, more than 8; lower dim or components"),
        ("gmm", {"test_size": 10**12}, "GiB of memory, more than 8; lower dim or test_size"),
        ("gmm", {"dim": 5.5}, r"data\.dim is 5.5; it must be a whole number"),
        ("gmm", {"std": math.nan}, r"data\.std is nan, but must lie in \[0, 1e\+15\]"),
        ("gmm", {"spread": math.inf}, r"data\.spread is inf"),
        ("gmm", {"mixture_seed": 2**70}, r"data\.mixture_seed is 1180591620717411303424"),
        ("rings", {"modes": 10**12}, "GiB of memory, more than 8; lower modes"),
        ("rings", {"radius": -1.0}, r"data\.radius is -1.0"),
        ("checkerboard", {"cells": 10**6}, "GiB of memory, more than 8; lower cells"),
        ("moons", {"noise": -0.1}, r"data\.noise is -0.1"),
        ("spirals", {"arms": 10**30}, "lower arms"),
        ("spirals", {"turns": 1e300}, r"data\.turns is 1e\+300"),
    ],
)
def test_synthetic_sets_refuse_what_cannot_be_drawn(name: str, arguments: Any, message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        build_data({"data": {"name": name, **arguments}})
    assert "\n" not in str(error.value)


# --- digits and finite data


def test_digits_are_scikit_learns_and_every_fifth_of_a_class_is_test() -> None:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    data = digits(conditional=True)
    assert data.event_shape == (1, 8, 8) and data.num_classes == 10
    assert data.train is not None and data.train_labels is not None and data.test_labels is not None
    assert float(data.train.min()) == -1 and float(data.train.max()) == 1
    seen = [0] * 10
    expected: dict[bool, list[int]] = {True: [], False: []}
    for i, label in enumerate(bunch.target):
        seen[label] += 1
        expected[seen[label] % 5 == 0].append(i)
    for is_test, x, labels in ((True, data.test, data.test_labels), (False, data.train, data.train_labels)):
        rows = expected[is_test]
        assert labels.tolist() == bunch.target[rows].tolist()
        np.testing.assert_allclose((x[:, 0].numpy() + 1) * 8, bunch.images[rows], atol=1e-6)
    assert (len(data.train), len(data.test)) == (1442, 355)
    assert data.sigma_data == pytest.approx(float(np.std(data.train.numpy().astype(np.float64))), rel=1e-9)


def test_missing_scikit_learn_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(MissingExtra, match=r"pip install 'diffrl\[data\]'"):
        digits()


def test_unconditional_digits_have_no_labels() -> None:
    data = digits(conditional=False)
    assert data.num_classes == 0 and data.train_labels is None and data.test_labels is None
    assert data.batch(4, generator())[1] is None


def test_batches_are_rows_of_train_with_their_labels_and_replacement() -> None:
    train = torch.arange(20.0)[:, None] / 10
    data = Data("mine", train[:3], torch.zeros(3, dtype=torch.long), train, torch.arange(20) % 7, 7)
    seen = torch.zeros(20)
    repeated = False
    for seed in range(200):
        x, labels = data.batch(20, generator(seed))
        rows = (x[:, 0] * 10).round().long()
        assert labels is not None and torch.equal(labels, rows % 7)
        repeated |= len(rows.unique()) < 20
        seen += rows.bincount(minlength=20)
    assert repeated
    torch.testing.assert_close(seen, torch.full((20,), 200.0), atol=5 * math.sqrt(200), rtol=0)


@pytest.mark.parametrize("n", [0, 21])
def test_batches_larger_than_the_data_are_refused(n: int) -> None:
    data = Data("mine", torch.randn(3, 2), train=torch.randn(20, 2))
    assert data.batch(20)[0].shape == (20, 2)
    with pytest.raises(DataError, match="batch_size 21 > 20 training samples" if n else "at least one"):
        data.batch(n)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_samples_of_any_floating_dtype_train_a_network_of_float32(dtype: torch.dtype) -> None:
    x = torch.randn(30, 2, generator=generator(0)).to(dtype)
    mine = {"train": Data("mine", test=x[:5], train=x), "draw": Data("mine", test=x, draw=lambda n, g: x[:n])}
    for way, data in mine.items():
        x0, _ = data.batch(4, generator(0))
        assert x0.dtype == data.test.dtype == torch.float32
        chain = diffrl.sample_chain(diffrl.EDM(), x0, num_steps=3, coupling="markov")
        loss = ValueLoss(diffrl.Denoiser(MLP((2,)), diffrl.EDM()))(chain)["loss_value"]
        assert loss.dtype == torch.float32, way
    assert torch.equal(mine["train"].train, x.float())
    with pytest.raises(InputTypeError, match=r"mine \(draw\) has dtype torch.int64"):
        Data("mine", test=x, draw=lambda n, g: torch.arange(2 * n).view(n, 2)).batch(4)


def test_data_that_do_not_fit_are_refused() -> None:
    x = torch.randn(6, 2)
    y = torch.arange(6) % 3
    broken = x.clone()
    broken[4, 1] = math.inf
    cases: list[tuple[str, dict[str, Any]]] = [
        ("nothing to train on", {"test": x}),
        ("does not fit samples", {"test": x, "train": torch.randn(6, 3)}),
        ("sample 4 holds NaN or infinity", {"test": x, "train": broken}),
        ("contradict each other", {"test": x, "train": x, "num_classes": 3}),
        ("contradict each other", {"test": x, "train": x, "test_labels": y, "num_classes": 3}),
        (
            "numbers in 0..1",
            {"test": x, "train": x, "test_labels": y, "train_labels": y, "num_classes": 2},
        ),
        (
            "6 int64 numbers",
            {"test": x, "train": x, "test_labels": y, "train_labels": y.float(), "num_classes": 3},
        ),
        ("every value is the same", {"test": x, "train": torch.full((6, 2), 0.1)}),
        (
            "every value is the same",
            {"test": x, "mixture": Mixture(torch.full((3, 2), 0.1), torch.zeros(3), torch.ones(3) / 3)},
        ),
    ]
    for message, arguments in cases:
        with pytest.raises(DataError, match=message):
            Data("mine", **arguments)
    for train in (x.numpy(), torch.arange(12).view(6, 2)):
        with pytest.raises(InputTypeError, match=r"mine \(train\)"):
            Data("mine", test=x, train=train)
    with pytest.raises(InputTypeError, match=r'name is a Tensor: give a text, Data\("mine", test='):
        Data(x, x)


def test_registry_has_the_names_that_users_type() -> None:
    assert list(DATASETS) == sorted([*SYNTHETIC, "digits", "idx", "folder", "hf", "npz"])
