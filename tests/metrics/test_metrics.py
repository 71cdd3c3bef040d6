"""Metrics against closed forms, scipy and torchmetrics."""

import math
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import linalg, optimize, stats
from scipy.spatial.distance import cdist
from torch import Tensor, nn

from diffrl.data.files import digits
from diffrl.data.synthetic import gmm
from diffrl.diffusion.exact import MixtureDenoiser
from diffrl.diffusion.networks.digits_cnn import DigitsCNN, load_digits_cnn
from diffrl.diffusion.schedules.base import Schedule
from diffrl.diffusion.schedules.registry import PROCESSES
from diffrl.extras import MissingExtra
from diffrl.metrics.discrepancy import mmd
from diffrl.metrics.distances import evaluation_noise, sample_distance, value_error
from diffrl.metrics.features import digits_features
from diffrl.metrics.measures import measure_names
from diffrl.metrics.point_clouds import frechet_distance, sliced_w2, w2
from tests.kit.oracles import randn
from tests.kit.paths import EXAMPLES

# --- value error

SIGMAS = [0.1, 0.3, 1.0, 3.0]


def oracle_of(process: Schedule) -> tuple[MixtureDenoiser, Tensor]:
    data = gmm(dim=16, test_size=200)
    assert data.mixture is not None
    return MixtureDenoiser(process, data.mixture.means, data.mixture.stds, data.mixture.weights), data.test


@pytest.mark.parametrize("name", list(PROCESSES))
def test_value_error_of_a_shifted_oracle_is_closed_form(name: str) -> None:
    process = PROCESSES[name]()
    oracle, x0 = oracle_of(process)
    c, sd = 0.03, 0.5
    errors = value_error(
        lambda x, t, cond: oracle(x, t, cond) + c, oracle, x0.double(), process, SIGMAS, sigma_data=sd
    )
    assert list(errors) == ["0.1", "0.3", "1", "3"]
    for key, sigma in zip(errors, SIGMAS, strict=True):
        c_out = sigma * sd / math.sqrt(sigma**2 + sd**2)
        # a discrete process has only times near these levels
        tolerance = 1e-9 if process.continuous else 0.05
        assert errors[key] == pytest.approx(c**2 * 16 / c_out**2, rel=tolerance)


def test_value_error_of_the_oracle_is_zero() -> None:
    process = PROCESSES["edm"]()
    oracle, x0 = oracle_of(process)
    assert set(value_error(oracle, oracle, x0, process, SIGMAS, sigma_data=0.5).values()) == {0.0}


def test_value_error_of_the_identity_is_the_noise() -> None:
    # D = x_t, D* = x0 (a point mass per datum is not needed: the oracle here just returns x0)
    process, x0 = PROCESSES["edm"](), torch.zeros(3000, 4, dtype=torch.float64)
    errors = value_error(lambda x, t, c: x, lambda x, t, c: 0 * x, x0, process, [0.2, 5.0], sigma_data=0.5)
    for sigma, key in ((0.2, "0.2"), (5.0, "5")):
        expected = 4 * sigma**2 / (sigma * 0.5) ** 2 * (sigma**2 + 0.25)
        assert errors[key] == pytest.approx(expected, rel=5 * math.sqrt(2 / 12000))


@pytest.mark.parametrize("batch_size", [1, 7, 200])
def test_value_error_does_not_depend_on_the_batch_size(batch_size: int) -> None:
    process = PROCESSES["vp"]()
    oracle, x0 = oracle_of(process)

    def off(x: Tensor, t: Tensor, cond: Tensor | None) -> Tensor:
        assert len(x) == len(t) <= max(batch_size, 50)
        return 0.5 * x

    x0 = x0.double()[:50]
    errors = value_error(off, oracle, x0, process, SIGMAS, sigma_data=0.5, batch_size=batch_size)
    whole = value_error(off, oracle, x0, process, SIGMAS, sigma_data=0.5, batch_size=50)
    assert errors == pytest.approx(whole, rel=1e-12)
    other = value_error(off, oracle, x0, process, SIGMAS, sigma_data=0.5, seed=1)
    assert all(abs(other[key] / whole[key] - 1) > 1e-4 for key in whole)


def test_value_error_hands_each_point_its_condition() -> None:
    x0 = torch.arange(30.0)[:, None]

    def by_label(x: Tensor, t: Tensor, cond: Tensor | None) -> Tensor:
        assert cond is not None
        return cond[:, None].to(x)

    errors = value_error(
        by_label,
        lambda x, t, c: 0 * x,
        x0,
        PROCESSES["edm"](),
        [1.0],
        sigma_data=1.0,
        cond=torch.arange(30),
        batch_size=8,
    )
    assert errors["1"] == pytest.approx(sum(i**2 for i in range(30)) / 30 * 2)


@pytest.mark.parametrize(("name", "sigma"), [("edm", 0.0), ("edm", -1.0), ("ddpm", 1e-4), ("ddpm", 1e4)])
def test_value_error_refuses_levels_that_do_not_exist(name: str, sigma: float) -> None:
    process = PROCESSES[name]()
    oracle, x0 = oracle_of(process)
    with pytest.raises(ValueError, match="sigma is"):
        value_error(oracle, oracle, x0, process, [sigma], sigma_data=0.5)


def test_evaluation_noise_is_standard_normal_and_each_samples_own() -> None:
    noise = evaluation_noise(torch.empty(4000, 2, 3, dtype=torch.float64), seed=5)
    assert stats.kstest(noise.flatten().numpy(), "norm").pvalue > 1e-3
    part = evaluation_noise(torch.empty(10, 2, 3), seed=5, first=100)
    assert part.dtype == torch.float32
    torch.testing.assert_close(part, noise[100:110].float())
    assert not torch.equal(noise, evaluation_noise(noise, seed=6))
    # neighbours and seeds are independent streams
    shifted = evaluation_noise(noise, seed=6).flatten()[6:]
    assert abs(float(torch.corrcoef(torch.stack([noise.flatten()[:-6], shifted]))[0, 1])) < 0.04


# --- Wasserstein


@pytest.mark.parametrize("D", [1, 2, 5])
def test_w2_of_a_shifted_cloud_is_the_shift(D: int) -> None:
    x, shift = randn(60, D), randn(D, seed=1)
    assert w2(x, x + shift) == pytest.approx(float(shift.norm()), rel=1e-9)
    assert w2(x, x) == 0


def test_missing_pot_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ot", None)
    with pytest.raises(MissingExtra, match=r"pip install 'diffrl\[eval\]'"):
        w2(randn(3, 2), randn(3, 2))


def test_w2_is_the_best_assignment() -> None:
    x, y = randn(80, 3), 2 * randn(80, 3, seed=1)
    cost = cdist(x, y, "sqeuclidean")
    rows, columns = optimize.linear_sum_assignment(cost)
    assert w2(x, y) == pytest.approx(math.sqrt(cost[rows, columns].mean()), rel=1e-9)


def test_w2_of_different_numbers_is_that_of_repeated_points() -> None:
    x, y = randn(20, 2), randn(30, 2, seed=1)
    repeated = w2(x.repeat_interleave(3, 0), y.repeat_interleave(2, 0))
    assert w2(x, y) == pytest.approx(repeated, rel=1e-9)


@pytest.mark.parametrize(("n", "m"), [(40, 40), (40, 25), (1, 30)])
def test_sliced_w2_in_one_dimension_is_w2(n: int, m: int) -> None:
    x, y = randn(n, 1), 1 + 2 * randn(m, 1, seed=1)
    assert sliced_w2(x, y, projections=3) == pytest.approx(w2(x, y), rel=1e-9)


def test_sliced_w2_of_a_shift_is_its_share_in_a_random_direction() -> None:
    x, D = randn(50, 8), 8
    shift = randn(D, seed=1)
    # E (θ·s)² = |s|²/D; relative variance of (θ·s)² is 2(D-1)/(D+2)
    value = sliced_w2(x, x + shift, projections=4000)
    tolerance = 5 * math.sqrt(2 * (D - 1) / (D + 2) / 4000)
    assert value**2 == pytest.approx(float(shift.square().sum()) / D, rel=tolerance)


def test_sliced_w2_agrees_with_pot() -> None:
    import ot

    x, y = randn(70, 4), randn(50, 4, seed=1) * torch.tensor([1.0, 2.0, 0.5, 1.0]) + 0.3
    directions = np.random.default_rng(0).standard_normal((4, 20_000))
    directions /= np.linalg.norm(directions, axis=0)
    witness = ot.sliced_wasserstein_distance(x.numpy(), y.numpy(), projections=directions)
    assert sliced_w2(x, y, projections=20_000) == pytest.approx(witness, rel=0.02)


def test_sliced_w2_is_reproducible_by_seed() -> None:
    x, y = randn(30, 2, 3), randn(30, 2, 3, seed=1)
    assert sliced_w2(x, y) == sliced_w2(x.flatten(1), y.flatten(1)) != sliced_w2(x, y, seed=1)


# --- Fréchet


def test_frechet_distance_of_gaussians_is_closed_form() -> None:
    # commuting covariances: |m - m'|² + Σ (s_i - s'_i)²
    n = 200_000
    s, r, m = torch.tensor([1.0, 2.0, 0.5]), torch.tensor([0.5, 2.0, 1.5]), torch.tensor([0.3, -1.0, 0.0])
    fx, fy = s * randn(n, 3), m + r * randn(n, 3, seed=1)
    expected = float(m.square().sum() + (s - r).square().sum())
    assert frechet_distance(fx, fy) == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize(("n", "m"), [(50, 40), (200, 300)])
def test_frechet_distance_agrees_with_scipys_matrix_root(n: int, m: int) -> None:
    fx, fy = randn(n, 6) @ randn(6, 6, seed=1), randn(m, 6, seed=2) @ randn(6, 6, seed=3) + 0.5
    cx, cy = np.cov(fx.numpy(), rowvar=False), np.cov(fy.numpy(), rowvar=False)
    root = linalg.sqrtm(cx @ cy).real
    mean = float((fx.mean(0) - fy.mean(0)).square().sum())
    assert frechet_distance(fx, fy) == pytest.approx(mean + np.trace(cx + cy - 2 * root), rel=1e-9)


def test_frechet_distance_is_stable_with_fewer_samples_than_dims() -> None:
    fx, fy = randn(5, 64), randn(4, 64, seed=1)
    shift = randn(64, seed=2)
    assert frechet_distance(fx, fx) == pytest.approx(0, abs=1e-12)
    assert frechet_distance(fx, fx + shift) == pytest.approx(float(shift.square().sum()), rel=1e-12)
    # √(C_x C_y) acts on the span of C_x: reduce the witness to it
    A, B = fx - fx.mean(0), fy - fy.mean(0)
    root = torch.linalg.svdvals(A @ B.T / math.sqrt(4 * 3)).sum()
    traces = A.square().sum() / 4 + B.square().sum() / 3
    expected = float((fx.mean(0) - fy.mean(0)).square().sum() + traces - 2 * root)
    assert frechet_distance(fx, fy) == pytest.approx(expected, rel=1e-10)
    # and it is the limit of scipy's root of covariances made regular
    cx, cy = (np.cov(f.numpy(), rowvar=False) + 1e-10 * np.eye(64) for f in (fx, fy))
    half = linalg.sqrtm(cx).real
    trace = np.trace(linalg.sqrtm(half @ cy @ half).real)
    assert float(root) == pytest.approx(trace, rel=1e-3)


class Features(nn.Module):
    num_features = 64  # torchmetrics then tries no image of its own

    def __init__(self) -> None:
        super().__init__()
        self.network = load_digits_cnn()

    def forward(self, x: Tensor) -> Tensor:
        return self.network.features(x)


def test_fd_digits_cnn_agrees_with_torchmetrics() -> None:
    from torchmetrics.image.fid import FrechetInceptionDistance

    data = digits()
    assert data.train is not None
    x, y = data.train[:300] + 0.2 * randn(300, 1, 8, 8).float(), data.test
    fid = FrechetInceptionDistance(feature=Features(), normalize=False).set_dtype(torch.float64)
    fid.update(x.double(), real=False)
    fid.update(y.double(), real=True)
    assert sample_distance("fd_digits_cnn", x, y) == pytest.approx(float(fid.compute()), rel=1e-3)


# --- the feature network


def test_digits_cnn_classifies_unseen_digits() -> None:
    data, network = digits(conditional=True), load_digits_cnn()
    accuracy = float((network(data.test).argmax(1) == data.test_labels).double().mean())
    assert accuracy >= 0.97
    assert not network.training and not any(p.requires_grad for p in network.parameters())
    features = digits_features(data.test)
    assert features.shape == (355, 64) and float(features.min()) >= 0
    torch.testing.assert_close(network.head(features), network(data.test))
    assert 50_000 <= sum(p.numel() for p in DigitsCNN().parameters()) <= 100_000


def test_loading_digits_cnn_leaves_the_random_state() -> None:
    torch.manual_seed(3)
    expected = torch.randn(2)
    torch.manual_seed(3)
    load_digits_cnn()
    assert torch.equal(torch.randn(2), expected)


def test_digits_cnn_refuses_other_shapes_and_missing_weights(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"takes images \[N, 1, 8, 8\]"):
        digits_features(torch.zeros(4, 64))
    with pytest.raises(FileNotFoundError, match="train_digits_features"):
        load_digits_cnn(tmp_path / "none.safetensors")


def test_training_digits_cnn_is_reproducible(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main = runpy.run_path(str(EXAMPLES / "train_digits_features.py"))["main"]
    files = [tmp_path / "a" / "x.safetensors", tmp_path / "b.safetensors"]
    accuracies = [main(file, seed=1, epochs=2) for file in files]
    assert accuracies[0] > 0.5 and files[0].read_bytes() == files[1].read_bytes()
    assert f"test accuracy {accuracies[0]:.4f}" in capsys.readouterr().out
    network, data = load_digits_cnn(files[0]), digits(conditional=True)
    accuracy = float((network(data.test).argmax(1) == data.test_labels).double().mean())
    assert accuracy == pytest.approx(accuracies[0])


def test_fd_digits_cnn_grows_with_the_damage() -> None:
    data = digits()
    assert data.train is not None
    noise = randn(1442, 1, 8, 8).float()
    distances = [sample_distance("fd_digits_cnn", data.train + s * noise, data.test) for s in (0, 0.3, 1)]
    assert 0 < 2 * distances[0] < distances[1] < distances[2] / 2


# --- MMD and the registry


def test_mmd_is_the_u_statistic() -> None:
    x, y = randn(12, 3), randn(9, 3, seed=1) + 0.5
    both = np.concatenate([x, y])
    distances = [np.linalg.norm(both[i] - both[j]) for i in range(21) for j in range(i)]
    h = np.median(distances)

    def k(a: np.ndarray, b: np.ndarray) -> float:
        return math.exp(-float(((a - b) ** 2).sum()) / (2 * h**2))

    X, Y = x.numpy(), y.numpy()
    k_xx = np.mean([k(X[i], X[j]) for i in range(12) for j in range(12) if i != j])
    k_yy = np.mean([k(Y[i], Y[j]) for i in range(9) for j in range(9) if i != j])
    k_xy = np.mean([k(a, b) for a in X for b in Y])
    assert mmd(x, y) == pytest.approx(k_xx + k_yy - 2 * k_xy, rel=1e-9)


def test_mmd_is_unbiased() -> None:
    values = [mmd(randn(20, 2, seed=i), randn(20, 2, seed=1000 + i)) for i in range(300)]
    assert abs(np.mean(values)) < 4 * np.std(values) / math.sqrt(300)
    assert min(values) < 0 < max(values)


@pytest.mark.parametrize("name", ["w2", "sliced_w2", "mmd", "fd_digits_cnn"])
def test_every_distance_is_symmetric_and_sees_a_difference(name: str) -> None:
    assert name in measure_names()
    x = randn(60, 1, 8, 8).tanh().float()
    y, near = x.flip(0) + 0.5, x.flip(0) + 0.05 * randn(60, 1, 8, 8, seed=2).float()
    assert sample_distance(name, x, y) == pytest.approx(sample_distance(name, y, x), rel=1e-6)
    assert sample_distance(name, x, y) > sample_distance(name, x, near)
    broken = x.clone()
    broken[7] = math.nan
    with pytest.raises(ValueError, match="sample 7 of x holds NaN"):
        sample_distance(name, broken, y)
    with pytest.raises(ValueError, match="samples must be|takes images"):
        sample_distance(name, x, y[:, :, :4])


def test_unknown_distances_are_named() -> None:
    with pytest.raises(ValueError, match="'fid'; there are w2, sliced_w2"):
        sample_distance("fid", randn(3, 2), randn(3, 2))


@pytest.mark.parametrize("distance", [frechet_distance, mmd])
def test_one_sample_is_too_few(distance: Callable[[Tensor, Tensor], float]) -> None:
    with pytest.raises(ValueError, match="at least 2 samples"):
        distance(randn(1, 2), randn(5, 2))
