"""Progressive distillation: its stages, its loss by hand, what is Monte Carlo, and its solution on normal data."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diffrl.diffusion.denoisers import Denoiser
from diffrl.diffusion.exact import GaussianDenoiser
from diffrl.diffusion.schedules.base import Schedule
from diffrl.diffusion.schedules.ddpm import DDPM
from diffrl.diffusion.schedules.edm import EDM
from diffrl.diffusion.schedules.flow import Flow
from diffrl.errors import InputError
from diffrl.objectives.monte_carlo import monte_carlo_loss
from diffrl.objectives.progressive import HalvingSteps, ProgressiveLoss
from diffrl.objectives.soft_update import SoftUpdate
from tests.kit.oracles import generator, randn
from tests.kit.value_loss import data, denoiser, distance, gradient, number, perturb

PROCESSES: list[tuple[Schedule, Any]] = [(Flow(), "velocity"), (DDPM(train_steps=64), "v")]
each = pytest.mark.parametrize(("process", "kind"), PROCESSES, ids=["flow", "ddpm"])


def loss_of(D: nn.Module, **options: Any) -> ProgressiveLoss:  # noqa: ANN401
    loss = ProgressiveLoss(D, **options)
    SoftUpdate(loss, eps=1.0)
    return loss


def step_of_ddim(process: Schedule, x: Tensor, clean: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """α_s x0 + σ_s ε with ε = (x - α_t x0)/σ_t."""
    noise = (x - process.alpha(t) * clean) / process.sigma(t)
    return process.alpha(s) * clean + process.sigma(s) * noise


@each
def test_the_loss_in_a_plain_loop(process: Schedule, kind: Any) -> None:
    D = denoiser(process, kind)
    perturb(D)
    loss, draw = loss_of(D), HalvingSteps(process, start=8)
    perturb(D.network)  # the teacher stays behind
    states = draw(data(24), cond=None, generator=generator(1))
    teacher, total = loss.bootstrap_network.module.denoiser, torch.zeros((), dtype=torch.float64)
    for i in range(24):
        x, (t, middle, end) = states["x_t"][i], (states[k][i, 0] for k in ("t", "r", ("next", "t")))
        first = step_of_ddim(process, x, teacher(x, t), t, middle)
        second = step_of_ddim(process, first, teacher(first, middle), middle, end)
        ratio = process.sigma(end) / process.sigma(t)
        y = (second - ratio * x) / (process.alpha(end) - ratio * process.alpha(t))
        snr = float((process.alpha(t) / process.sigma(t)) ** 2)
        total = total + max(snr, 1.0) * (y.detach() - D(x, t)).square().mean() / 24
    found = loss(states)["loss_value"]
    torch.testing.assert_close(found, total, rtol=1e-9, atol=0)
    assert distance(gradient(found, D), gradient(total, D)) < 1e-8
    assert loss.network_evaluations == 3 * 24


@each
def test_levels_are_those_of_the_sampler(process: Schedule, kind: Any) -> None:
    draw = HalvingSteps(process, start=8)
    states = draw(data(200), cond=None, generator=generator(1))
    fine = process.time_grid(8).tolist()
    steps = {tuple(float(states[k][i]) for k in ("t", "r", ("next", "t"))) for i in range(200)}
    assert steps == {tuple(fine[i : i + 3]) for i in (0, 2, 4, 6)}


class Datum(nn.Module):
    """A teacher that knows x0."""

    def __init__(self, x0: Tensor) -> None:
        super().__init__()
        self.x0 = x0

    def denoise(self, x: Tensor, t: Tensor, cond: Tensor | None) -> Tensor:
        return self.x0


@each
def test_with_the_datum_as_teacher_it_is_monte_carlo(process: Schedule, kind: Any) -> None:
    D = denoiser(process, kind)
    perturb(D)
    states, loss = HalvingSteps(process, start=8)(data(24), cond=None, generator=generator(1)), loss_of(D)
    loss.bootstrap_network.module = Datum(states["x0"])
    found, plain = loss(states)["loss_value"], monte_carlo_loss(D, weight="trunc_snr")(states)["loss_value"]
    torch.testing.assert_close(found, plain, rtol=1e-10, atol=0)
    assert distance(gradient(found, D), gradient(plain, D)) < 1e-9


class Linear(nn.Module):
    """D(x, t) = b_i x, a number for each level of a grid."""

    def __init__(self, process: Schedule, levels: Tensor, b: Tensor) -> None:
        super().__init__()
        self.process, self.levels, self.b = process, levels, nn.Parameter(b)

    def forward(self, x: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
        return self.b[(t[:, None] - self.levels).abs().argmin(1)][:, None] * x

    def scalings(self, t: Tensor) -> Any:
        raise AssertionError("trunc_snr asks none")


def test_the_student_that_takes_the_teachers_two_steps_is_the_solution() -> None:
    """Gradient 0 row by row at the closed form on normal data, and not at the exact denoiser."""
    process = Flow()
    grid, exact = process.time_grid(8), GaussianDenoiser(process, torch.zeros(2), 0.36 * torch.eye(2))
    x, b = torch.ones(1, 2, dtype=torch.float64), []
    for i in (0, 2, 4, 6):
        t, middle, end = grid[i : i + 1], grid[i + 1 : i + 2], grid[i + 2 : i + 3]
        first = step_of_ddim(process, x, exact(x, t), t, middle)
        second = step_of_ddim(process, first, exact(first, middle), middle, end)
        ratio = end / t
        b.append((second - ratio * x)[0, 0] / (1 - end - ratio * (1 - t))[0])
    states = HalvingSteps(process, start=8)(data(24), cond=None, generator=generator(1))
    losses = []
    for coefficients in (torch.stack(b), exact(x.expand(4, 2), grid[:-1:2])[:, 0]):
        D = Linear(process, grid[:-1:2], coefficients)
        loss = loss_of(D)
        loss.bootstrap_network.module.denoiser.forward = exact.forward
        value = loss(states)["loss_value"]
        losses.append(number(value))
        slope = gradient(value, D).abs().max()
    assert losses[0] < 1e-25 and losses[1] > 1e-5 and float(slope) > 1e-4


def stages_of(draw: HalvingSteps, J: int) -> Iterator[tuple[int, float]]:
    for step in range(J):
        draw.set_progress(step, J)
        yield draw.num_steps, draw.target_decay


def test_stages_halve_and_the_last_two_are_longer() -> None:
    found = list(stages_of(HalvingSteps(Flow(), start=16), 12))
    assert [n for n, _ in found] == [8] * 2 + [4] * 2 + [2] * 4 + [1] * 4
    assert [decay for _, decay in found] == [1, 0, 1, 0, 1, 1, 1, 0, 1, 1, 1, 1]
    assert list(stages_of(HalvingSteps(Flow(), start=2), 3)) == [(1, 1.0)] * 3


def test_the_student_becomes_the_teacher_at_the_end_of_a_stage() -> None:
    D = denoiser(Flow(), "velocity")
    loss, draw = ProgressiveLoss(D), HalvingSteps(Flow(), start=4)
    update, first = SoftUpdate(loss, eps=1.0), D.network.last.weight.detach().clone()
    teacher = loss.bootstrap_network.module.denoiser.network.last.weight
    for step in range(4):
        draw.set_progress(step, 4)
        with torch.no_grad():
            D.network.last.weight.add_(1.0)
        update.eps = draw.target_decay
        update.step()
        torch.testing.assert_close(teacher, first + (0.0 if step < 1 else 2.0))


def test_one_row_and_one_step() -> None:
    D = denoiser(Flow(), "velocity")
    states = HalvingSteps(Flow(), start=2)(randn(1, 2), cond=None, generator=generator(0))
    assert (float(states["t"]), float(states["r"]), float(states["next", "t"])) == (1.0, 0.5, 0.0)
    assert bool(loss_of(D)(states)["loss_value"].isfinite())


@pytest.mark.parametrize(
    ("process", "options", "message"),
    [
        (Flow(), {"start": 12}, "start is 12, but must be end=1 times a power of 2"),
        (Flow(), {"start": 1}, r"start is 1, but must be a whole number in \[2"),
        (EDM(), {"start": 8}, "every second of 8 levels of EDM"),
        (DDPM(train_steps=4), {"start": 8}, "only 4 timesteps"),
    ],
)
def test_what_does_not_fit_is_named(process: Schedule, options: dict[str, int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        HalvingSteps(process, **options)
    assert isinstance(denoiser(), Denoiser)
