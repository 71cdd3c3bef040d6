"""What an evaluation measures: on which rows, with which classes, and what it refuses before training begins."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diffrl.data.dataset import Data
from diffrl.data.mixtures import Mixture
from diffrl.diffusion.denoisers import Denoiser
from diffrl.diffusion.exact import EmpiricalDenoiser, MixtureDenoiser
from diffrl.diffusion.networks.mlp import MLP
from diffrl.diffusion.samplers.ddim import DDIM
from diffrl.diffusion.schedules.edm import EDM
from diffrl.errors import InputError
from diffrl.experiments.train import TrainingJob
from diffrl.metrics.distances import denoising_error, value_error
from diffrl.training.build import Events, build_data
from diffrl.training.evaluation import Evaluation, class_labels, draw_samples
from tests.kit.configs import small
from tests.kit.oracles import randn

PROCESS = EDM()
SIGMAS = (0.1, 0.5, 2.0)


# --- denoising error


def test_denoising_error_is_value_error_plus_that_of_the_exact_denoiser() -> None:
    mixture = Mixture(randn(3, 4), torch.tensor([0.1, 0.3, 0.2]), torch.ones(3) / 3)
    exact = MixtureDenoiser(PROCESS, mixture.means, mixture.stds, mixture.weights)
    x0 = mixture.sample(20_000, torch.Generator().manual_seed(0))

    def rough(x: Tensor, t: Tensor, cond: Tensor | None) -> Tensor:
        return 0.8 * exact(x, t, cond) + 0.1

    own, least = (
        denoising_error(D, x0, PROCESS, SIGMAS, sigma_data=0.5, batch_size=7000) for D in (rough, exact)
    )
    error = value_error(rough, exact, x0, PROCESS, SIGMAS, sigma_data=0.5)
    for key in ("0.1", "0.5", "2"):
        assert own[key] == pytest.approx(least[key] + error[key], rel=0.03)
        assert least[key] < own[key]


def test_denoising_error_of_the_identity_is_the_noise() -> None:
    x0, sigma = randn(4000, 3), 0.4
    found = denoising_error(lambda x, t, c: x, x0, PROCESS, [sigma], sigma_data=0.5)["0.4"]
    c_out = sigma * 0.5 / math.sqrt(sigma**2 + 0.25)
    assert found == pytest.approx(3 * sigma**2 / c_out**2, rel=5 * math.sqrt(2 / 12_000))


class Copies(nn.Module):
    """Knows the training points by heart: the exact denoiser of them."""

    num_classes = 0

    def __init__(self, points: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros((), dtype=torch.float64))
        self.oracle = EmpiricalDenoiser(PROCESS, points)


class CopyingDenoiser(Denoiser):
    def forward(self, x_t: Tensor, t: Tensor, cond: Tensor | None = None, r: Tensor | None = None) -> Tensor:
        return self.network.oracle(x_t, t, cond)


def test_errors_are_taken_on_the_rows_that_they_say() -> None:
    train, test = randn(50, 6), randn(40, 6, seed=1)
    data = Data("mine", test.float(), train=train.float())
    denoiser = CopyingDenoiser(Copies(train.float()), PROCESS, sigma_data=1.0)
    oracle = EmpiricalDenoiser(PROCESS, train.float())
    evaluation = Evaluation(sigmas=(0.1,), points=30)
    assert evaluation.value_error(denoiser, oracle, data) == {"0.1": 0.0}  # it learnt its rows by heart
    held_out = evaluation.denoising_error(denoiser, data)["0.1"]
    expected = denoising_error(oracle, data.test[:30].double(), PROCESS, (0.1,), sigma_data=1.0)["0.1"]
    assert held_out == pytest.approx(expected) and held_out > 100


class LabelDenoiser(Denoiser):
    """D = the label, wherever it is asked."""

    def forward(self, x_t: Tensor, t: Tensor, cond: Tensor | None = None, r: Tensor | None = None) -> Tensor:
        return torch.full_like(x_t, math.nan) if cond is None else cond[:, None].to(x_t).expand_as(x_t)


def test_a_conditional_denoiser_gets_the_labels_of_the_test_rows() -> None:
    y = torch.arange(12) % 3
    x = y[:, None].repeat(1, 2).float() + 0.5
    data = Data("mine", x, y, x, y, 3)
    denoiser = LabelDenoiser(MLP((2,), 3, hidden=8), PROCESS, sigma_data=1.0)
    found = Evaluation(sigmas=(1.0,), points=7, at_once=3).denoising_error(denoiser, data)
    assert found["1"] == pytest.approx(2 * 0.25 / 0.5)


# --- classes


@pytest.mark.parametrize("shares", [[0.94, 0.06], [0.5, 0.3, 0.2], [1.0], [0.0, 1.0, 0.0], [0.25] * 4])
@pytest.mark.parametrize("n", [1, 10, 777])
def test_labels_have_the_shares_of_the_data(shares: list[float], n: int) -> None:
    labels = class_labels(shares, n)
    counts = labels.bincount(minlength=len(shares))
    assert labels.dtype == torch.int64 and len(labels) == n
    assert (counts - n * torch.tensor(shares)).abs().max() < 1
    assert torch.equal(labels[: n // 2], class_labels(shares, n // 2))  # the first are the same, however many


def test_equal_shares_go_in_turn() -> None:
    assert class_labels([1 / 7] * 7, 700).tolist() == list(range(7)) * 100


def labelled(shares: tuple[int, int]) -> Data:
    """Two classes of 2-D points far from each other, in given numbers of 1,000."""
    y = torch.repeat_interleave(torch.arange(2), torch.tensor(shares))
    x = torch.tensor([-1.0, 1.0])[y][:, None] + 0.05 * randn(len(y), 2).float()
    return Data("mine", x[::10], y[::10], x, y, 2)


class PerfectDenoiser(Denoiser):
    """Exact for N(∓1, 0.05² I) by label."""

    def forward(self, x_t: Tensor, t: Tensor, cond: Tensor | None = None, r: Tensor | None = None) -> Tensor:
        assert cond is not None
        mean = torch.tensor([-1.0, 1.0], device=x_t.device)[cond][:, None]
        gain = 0.05**2 / (0.05**2 + t[:, None] ** 2)
        return (mean + gain * (x_t - mean)).to(x_t)


def test_samples_of_a_perfect_model_are_near_uneven_data() -> None:
    data = labelled((940, 60))
    denoiser = PerfectDenoiser(MLP((2,), 2, hidden=8), PROCESS)
    evaluation = Evaluation(samples=1000)
    x, _ = draw_samples(denoiser, data, DDIM(), num_steps=40, samples=1000)
    assert float((x[:, 0] > 0).double().mean()) == pytest.approx(0.06)
    near = evaluation.sample_distance(x, data)
    known = Events((2,), 2, data.class_shares)
    again, _ = draw_samples(denoiser, known, DDIM(), num_steps=40, samples=1000, batch_size=333)
    torch.testing.assert_close(again, x)
    equal, _ = draw_samples(denoiser, Events((2,), 2), DDIM(), num_steps=40, samples=1000)
    assert near < 0.1 < 0.6 < evaluation.sample_distance(equal, data)


# --- what is refused at the start


def job(*overrides: str) -> TrainingJob:
    config = small("compare=false", *overrides)
    return TrainingJob(config, build_data(config), config["objective"]["name"])


def test_the_start_tries_the_sizes_of_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    run = job("eval.points=50", "eval.samples=70", "eval.at_once=40", "eval.num_steps=[5]")
    seen: list[int] = []
    forward = run.average.forward

    def counted(x: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
        seen.append(len(x))
        return forward(x, t, cond)

    monkeypatch.setattr(run.average, "forward", counted)
    run.check()
    at_start = max(seen)
    seen.clear()
    run.errors()
    run._draw(5, 70)
    assert at_start == max(seen) == 40


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["eval.distance=w2", "eval.samples=30000", "eval.points=8"], r"w2 of 30,000.* GiB.*eval\.max_gib"),
        (["eval.distance=nearest"], "no distance is called 'nearest'"),
        (["eval.sigmas=[1.0,-2.0]"], "sigma is -2"),
        (["eval.at_once=0"], "eval.at_once is 0"),
        (["eval.max_gib=-1"], "eval.max_gib is -1"),
    ],
)
def test_what_cannot_be_evaluated_is_refused_before_training(overrides: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        job("data.test_size=10000", *overrides).check()


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_memory_that_does_not_hold_a_batch_is_said_with_its_option(error: Exception) -> None:
    run = job()

    def fail(*_: Any) -> None:
        raise error

    with pytest.raises(InputError, match="eval.at_once is 1000, which the memory.*does not hold: lower it"):
        run.evaluation.check(run.average, run.oracle, run.data, fail)


def test_other_errors_of_the_check_are_left_alone() -> None:
    run = job()

    def fail(*_: Any) -> None:
        raise RuntimeError("shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        run.evaluation.check(run.average, run.oracle, run.data, fail)
    assert replace(run.evaluation, points=3).points == 3
