"""Consistency distillation: its pairs, which setting is consistency training, and its solution on normal data."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diffrl.diffusion.exact import GaussianDenoiser
from diffrl.diffusion.schedules.edm import EDM
from diffrl.objectives.consistency import ct_loss
from diffrl.objectives.consistency_pairs import sample_consistency_pairs
from diffrl.objectives.distillation import DistillationPairs, distillation_loss
from tests.kit.consistency import consistency, level
from tests.kit.oracles import generator, randn
from tests.kit.value_loss import gradient, number

STD = 0.5
TEACHER = GaussianDenoiser(EDM(), torch.zeros(2), STD**2 * torch.eye(2))


def test_forward_is_consistency_training() -> None:
    D, x0 = consistency(), STD * randn(16, 2)
    draw = DistillationPairs(EDM(), num_scales=12, transition="forward")
    found = distillation_loss(D, bootstrap="own")(draw(x0, cond=None, generator=generator(3)))["loss_value"]
    pairs = sample_consistency_pairs(EDM(), x0, num_scales=12, generator=generator(3))
    plain = ct_loss(D, metric="l2", bootstrap="own")(pairs)["loss_value"]
    assert torch.equal(found, plain) and torch.equal(gradient(found, D), gradient(plain, D))


def test_the_loss_in_a_plain_loop() -> None:
    D, x0, N = consistency(), STD * randn(8, 2), 9
    draw = DistillationPairs(EDM(), num_scales=N, teacher=TEACHER)
    pairs = draw(x0, cond=None, generator=generator(3))
    total = torch.zeros((), dtype=torch.float64)
    for i in range(8):
        k = int(pairs["index"][i])
        x = pairs["x_t"][i]
        t, s = (torch.tensor([level(j, N)], dtype=torch.float64) for j in (k, k + 1))
        v = (x - TEACHER(x, t)) / t
        x_s = x + (s - t) * v
        x_s = x + (s - t) * (v + (x_s - TEACHER(x_s, s)) / s) / 2
        total = total + (D(x, t) - D(x_s, s).detach()).square().mean() / 8
    loss = distillation_loss(D, bootstrap="own")
    found = loss(pairs)["loss_value"]
    torch.testing.assert_close(found, total, rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(gradient(found, D), gradient(total, D), rtol=1e-9, atol=1e-12)
    assert loss.network_evaluations == 4 * 8


class Exact(nn.Module):
    """The consistency function of N(0, STD²) that ends at σ_min, scaled by 1 + θ."""

    prediction_type, sigma_data, process = "consistency", STD, EDM()

    def __init__(self) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, x: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
        scale = ((STD**2 + EDM().sigma_min ** 2) / (STD**2 + t**2)).sqrt()[:, None]
        return (1 + self.theta * (t[:, None] > EDM().sigma_min)) * scale * x


def test_the_exact_function_is_the_solution_up_to_heun() -> None:
    """Row by row, not on average: the loss falls with the sixth power of the step, forward pairs keep theirs."""
    x0 = STD * randn(512, 2)
    losses: dict[str, list[float]] = {"teacher": [], "forward": []}
    for N in (40, 80):
        for kind, found in losses.items():
            options: dict[str, Any] = {"teacher": TEACHER} if kind == "teacher" else {}
            draw = DistillationPairs(EDM(), num_scales=N, transition=kind, **options)
            pairs = draw(x0, cond=None, generator=generator(3))
            value = distillation_loss(Exact(), bootstrap="own")(pairs)["loss_value"]
            found.append(number(value))
    taught, plain = losses["teacher"], losses["forward"]
    assert taught[0] < 1e-3 * plain[0] and taught[0] / taught[1] > 30 and plain[0] / plain[1] < 6


def test_the_grid_stays_and_the_target_follows_as_published() -> None:
    draw = DistillationPairs(EDM(), teacher=TEACHER)
    for step in (0, 50, 99):
        draw.set_progress(step, 100)
        assert (draw.num_scales, draw.target_decay) == (40, 0.95)


def test_one_row_and_two_levels() -> None:
    """N = 2: from σ_max to σ_min in one step, where f is the identity."""
    draw = DistillationPairs(EDM(), num_scales=2, teacher=TEACHER, solver="euler")
    pairs = draw(STD * randn(1, 2), cond=None, generator=generator(0))
    x, t, s = pairs["x_t"][0], pairs["t"][0, 0], pairs["next", "t"][0, 0]
    assert float(t) == pytest.approx(80) and float(s) == pytest.approx(0.002)
    torch.testing.assert_close(pairs["next", "x_t"][0], x + (s - t) * (x - TEACHER(x, t)) / t)
    assert not bool(pairs["valid"])
