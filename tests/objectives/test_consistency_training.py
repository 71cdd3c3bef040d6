"""Training a consistency function: fixed points, one-step samples, resuming."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diffrl.data.dataset import Data
from diffrl.diffusion.denoisers import Denoiser
from diffrl.diffusion.networks.mlp import MLP
from diffrl.diffusion.samplers.base import Noise
from diffrl.diffusion.samplers.consistency import Multistep
from diffrl.diffusion.samplers.loop import sample
from diffrl.diffusion.schedules.edm import EDM
from diffrl.objectives.consistency import ConsistencyLoss, ct_loss, td_ct_loss
from diffrl.objectives.consistency_pairs import ConsistencyPairs, num_scales, target_decay
from diffrl.objectives.scheme import Objective
from diffrl.training.optim import Optim
from diffrl.training.trainer import Average, Length, Target, Trainer
from tests.kit.consistency import SIGMA_DATA, SIGMA_MAX, consistency, level
from tests.kit.oracles import generator


def mlp(dim: int = 1, seed: int = 0, **sizes: int) -> Denoiser:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return consistency(MLP((dim,), **sizes))


def normal_data(std: float = SIGMA_DATA) -> Data:
    def draw(n: int, g: torch.Generator | None) -> Tensor:
        return std * torch.randn(n, 1, generator=g)

    return Data("normal", draw(1000, generator(9)), draw=draw)


def trainer(
    folder: Path | None, scheme: Callable[..., ConsistencyLoss], grad_steps: int, **draw: Any
) -> Trainer:  # noqa: ANN401
    denoiser = mlp(hidden=32, depth=2, x_features=0, noise_features=16)
    objective = Objective("ct", scheme(denoiser), ConsistencyPairs(EDM(), **draw))
    return Trainer(
        objective,
        normal_data(),
        seed=0,
        folder=folder,
        length=Length(grad_steps=grad_steps, batch_size=256, checkpoint_every=15),
        optim=Optim(lr=3e-3, warmup_steps=20),
        average=Average(halflife=5000),
        target=Target(),
    )


def fixed_point(N: int, b: float, c: float) -> float:
    """Standard deviation of one-step samples where the loss of f(x, σ_i) = g_i x on N(0, σd²) is least (l2).

    With E x² = σd² + σ², E x x' = σd² + σσ', E x0 x = σd² each level's g is a regression on the next one's.
    """
    g, v = 1.0, SIGMA_DATA**2
    for i in reversed(range(N - 1)):
        t, t_next = level(i, N), level(i + 1, N)
        A, A_next = 1 - (level(i + 0.25, N) / t) ** 2, 1 - (level(i + 1.25, N) / t_next) ** 2
        w = b / max(A**2 + A_next**2, 0.01) if i < N - 2 else 0.0
        rest = c if i < N - 2 else b + c
        target = w * A * ((A - A_next) * v + A_next * g * (v + t * t_next)) + rest * g * (v + t * t_next)
        g = target / ((w * A**2 + rest) * (v + t**2))
    return g * SIGMA_MAX


def test_fixed_points() -> None:
    """Plain CT tends to the flow map as levels are added; the TD term of the published variant moves it."""
    plain = [fixed_point(N, 0.0, 1.0) for N in (5, 21, 151, 5000)]
    assert plain == sorted(plain) and plain[-1] == pytest.approx(SIGMA_DATA, rel=1e-3)
    assert fixed_point(51, 1.0, 0.5) > 1.2 * SIGMA_DATA


@pytest.mark.parametrize(
    ("scheme", "b", "c"), [(ct_loss, 0.0, 1.0), (td_ct_loss, 1.0, 0.5)], ids=["ct", "td_ct"]
)
def test_training_widens_one_step_samples_to_the_fixed_point(
    scheme: Callable[..., ConsistencyLoss], b: float, c: float
) -> None:
    def std(denoiser: nn.Module) -> float:
        x = sample(denoiser, (4000, 1), sampler=Multistep(), num_steps=1, noise=Noise(generator()))
        return float(x.std())

    run = trainer(None, partial(scheme, metric="l2"), 600, s_0=5, s_1=10)
    assert std(run.denoiser) < 0.02 * SIGMA_DATA  # a network of zeros gives the data's mean
    for _ in run.steps():
        pass
    assert std(run.ema.module) == pytest.approx(fixed_point(11, b, c), rel=0.1)


def test_resuming_is_exact(tmp_path: Path) -> None:
    """Levels, the target's decay and the target itself go on where they were."""
    whole = trainer(tmp_path / "whole", td_ct_loss, 40)
    losses = [figures["loss_value"] for figures in whole.steps()]

    cut = trainer(tmp_path / "cut", td_ct_loss, 40)
    steps: Any = cut.steps()
    first = [next(steps)["loss_value"] for _ in range(17)]  # saved after 15
    steps.close()
    again = trainer(tmp_path / "cut", td_ct_loss, 40)
    assert again.resume() and again.step == 15
    rest = [figures["loss_value"] for figures in again.steps()]
    assert first[:15] + rest == losses
    for name, tensor in whole.loss.state_dict().items():
        assert torch.equal(tensor, again.loss.state_dict()[name]), name
    assert again.loss.network_evaluations == whole.loss.network_evaluations == 40 * 2 * 256


def test_trainer_takes_the_decay_from_the_objective() -> None:
    run = trainer(None, ct_loss, 30, s_0=2, s_1=5)
    scale = "value_network_params.module.denoiser.network.last.weight"
    teacher = run.loss.state_dict()["target_" + scale].clone()
    levels = []
    for j, _ in enumerate(run.steps()):
        levels.append(run.objective.draw.num_scales)  # type: ignore[attr-defined]
        mu = target_decay(j, 30, 2, 5)
        teacher.lerp_(run.loss.state_dict()[scale], 1 - mu)
        torch.testing.assert_close(run.loss.state_dict()["target_" + scale], teacher, rtol=1e-6, atol=1e-9)
    assert levels == [num_scales(j, 30, 2, 5) for j in range(30)] and set(levels) == {2, 3, 4, 5, 6}
