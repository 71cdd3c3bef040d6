"""CDM: its loss in a plain loop, which settings are double sampling and denoising, its levels, and its solution."""

import pytest
import torch
from torch import Tensor, nn

from diffrl.diffusion.exact import GaussianDenoiser
from diffrl.diffusion.schedules.vp import VP
from diffrl.errors import InputError
from diffrl.objectives import DoubleSamplingLoss
from diffrl.objectives.cdm import ShortRollouts, cdm_loss, reverse_sde
from diffrl.objectives.denoising import sample_log_normal_states
from diffrl.objectives.monte_carlo import monte_carlo_loss
from tests.kit.oracles import Estimate, assert_within, generator, randn
from tests.kit.value_loss import PROCESS, SD, data, denoiser, distance, gradient, perturb

NORMAL = GaussianDenoiser(PROCESS, torch.zeros(2), 0.36 * torch.eye(2))


def test_the_loss_in_a_plain_loop() -> None:
    D, x0 = denoiser(), data(6)
    perturb(D)
    twins = ShortRollouts(PROCESS, denoiser=D)(x0, cond=None, generator=generator(2))
    g = generator(2)
    sigma = (-1.2 + 1.2 * torch.randn(6, generator=g, dtype=torch.float64)).exp()
    noise, u = randn_of(g, 6, 2), torch.rand(6, 1, 1, generator=g, dtype=torch.float64).flatten()
    total, x = torch.zeros((), dtype=torch.float64), x0 + sigma[:, None] * noise
    s = torch.minimum((sigma - 0.05 * u).clamp(min=0.002), sigma)
    grid = [(sigma ** (1 / 7) + j / 5 * (s ** (1 / 7) - sigma ** (1 / 7))) ** 7 for j in range(6)]
    ends = torch.stack([x, x], 1).view(12, 2)
    for now, then in zip(grid[:-1], grid[1:], strict=True):
        now, then = (c.repeat_interleave(2)[:, None] for c in (now, then))
        z = randn_of(g, 12, 2)
        with torch.no_grad():
            slope = (ends - D(ends, now[:, 0])) / now
        ends = ends + 2 * (then - now) * slope + (2 * (now - then).abs() * now).sqrt() * z
    torch.testing.assert_close(twins["next", "x_t"].view(12, 2), ends)
    for i in range(6):
        clean = D(x[i : i + 1], sigma[i : i + 1])[0]
        one, two = (D(ends[2 * i + k][None], s[i : i + 1])[0] for k in (0, 1))
        w = (sigma[i] ** 2 + SD**2) / (sigma[i] * SD) ** 2
        total = total + (w * (clean - x0[i]) ** 2 + 2 * (one - clean) * (two - clean)).mean() / 6
    loss = cdm_loss(D)
    found = loss(twins)["loss_value"]
    torch.testing.assert_close(found, total, rtol=1e-9, atol=0)
    assert distance(gradient(found, D), gradient(total, D)) < 1e-8
    assert loss.network_evaluations == 6 * (1 + 2 + 2 * 5)


def randn_of(g: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=g, dtype=torch.float64)


def test_it_is_double_sampling_by_another_name() -> None:
    D = denoiser()
    twins = ShortRollouts(PROCESS, denoiser=D)(data(6), cond=None, generator=generator(2))
    named = DoubleSamplingLoss(D, weight="none", residual_coef=2.0, denoising_coef=1.0)
    found, same = cdm_loss(D)(twins)["loss_value"], named(twins)["loss_value"]
    assert torch.equal(found, same) and torch.equal(gradient(found, D), gradient(same, D))


def test_without_the_product_it_is_denoising() -> None:
    D, x0 = denoiser(), data(6)
    twins = ShortRollouts(PROCESS, denoiser=D)(x0, cond=None, generator=generator(2))
    plain = monte_carlo_loss(D, weight="edm")(sample_log_normal_states(PROCESS, x0, generator=generator(2)))
    found = cdm_loss(D, residual_coef=0.0)(twins)["loss_value"]
    torch.testing.assert_close(found, plain["loss_value"], rtol=1e-12, atol=0)


def test_levels_are_the_published_ones() -> None:
    """t - s ≤ 0.05 down to 0.002, and from below that level nothing moves."""
    twins = ShortRollouts(PROCESS, denoiser=denoiser())(data(400), cond=None, generator=generator(2))
    t, s = twins["t"], twins["next", "t"]
    assert bool((t - s <= 0.05 + 1e-12).all() and (s >= 0.002).all() and (s < t).all())
    assert torch.equal(s[:, 0], s[:, 1]) and float((t - s).max()) > 0.045
    draw = ShortRollouts(PROCESS, denoiser=denoiser(), P_mean=-8.0, P_std=0.0)
    low = draw(data(1), cond=None, generator=generator(2))
    assert torch.equal(low["next", "t"], low["t"]) and torch.equal(low["next", "x_t"], low["x_t"])


def test_the_exact_denoiser_is_the_solution_up_to_eulers_steps() -> None:
    """Mean product of the residuals of two rollouts: 0 within errors at a small gap, not so where both are one."""
    M = 20_000
    x0 = 0.6 * randn(M, 2)
    draw = ShortRollouts(PROCESS, denoiser=Parametric(), P_mean=0.0, P_std=0.0)
    twins = draw(x0, cond=None, generator=generator(4))
    t, s = twins["t"][:, 0, 0], twins["next", "t"][:, 0, 0]
    clean = NORMAL(twins["x_t"][:, 0], t)
    one, two = (NORMAL(twins["next", "x_t"][:, k], s) - clean for k in (0, 1))
    product, square = (one * two).sum(1), one.square().sum(1)
    assert_within(Estimate(product.mean(), product.std() / M**0.5), 0.0)
    assert float(square.mean()) > 20 * float(product.std()) / M**0.5


class Parametric(nn.Module):
    """The exact denoiser, with a parameter for those who ask its device."""

    def __init__(self) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
        return NORMAL(x, t)


def test_rollouts_follow_the_reverse_process() -> None:
    """From N(0, v + t²) by many small steps of the exact SDE: the variance at s is v + s²."""
    M, v = 20_000, 0.36
    times = torch.linspace(1.0, 0.5, 201, dtype=torch.float64)[:, None].expand(-1, M)
    x = reverse_sde(Parametric(), (v + 1) ** 0.5 * randn(M, 2), times, generator=generator(5))
    found = x.square().mean(1)
    assert_within(Estimate(found.mean(), found.std() / M**0.5), v + 0.25)


def test_what_does_not_fit_is_named() -> None:
    D = denoiser()
    with pytest.raises(InputError, match="the process is VP: CDM"):
        ShortRollouts(VP(), denoiser=D)
    with pytest.raises(InputError, match="gap is 0"):
        ShortRollouts(PROCESS, denoiser=D, gap=0.0)
    with pytest.raises(InputError, match="rollout_steps is 0"):
        ShortRollouts(PROCESS, denoiser=D, rollout_steps=0)
