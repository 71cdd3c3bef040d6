"""Learned variance: its bounds, the terms, the hybrid loss in a plain loop, its fixed point, its sampler."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

import diffrl
from diffrl.diffusion.guidance import GuidedDenoiser
from diffrl.diffusion.learned_variance import learned_log_variance, step_kl
from diffrl.diffusion.networks.mlp import MLP
from diffrl.diffusion.networks.unet import UNet
from diffrl.diffusion.posterior import posterior
from diffrl.diffusion.samplers.base import Model, Noise
from diffrl.diffusion.samplers.counting import grid_for
from diffrl.diffusion.samplers.learned_variance import LearnedAncestral
from diffrl.objectives import HybridLoss
from diffrl.objectives.monte_carlo import monte_carlo_loss
from tests.kit.value_loss import PROCESS, SD, data, draw, gradient, number, perturb

DDPM = diffrl.DDPM(20, beta_start=0.01, beta_end=0.3)


def normals(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def learner(process: Any = PROCESS, num_classes: int = 0) -> diffrl.Denoiser:
    torch.manual_seed(0)
    network = MLP((2,), num_classes, hidden=16, depth=1, x_features=8, noise_features=8, variance=True)
    denoiser = diffrl.Denoiser(network, process, SD).double()
    perturb(denoiser)
    return denoiser


# The bounds


def test_the_bounds_are_the_published_ones() -> None:
    """β_t and β̃_t by the betas of the chain, at v = 1 and v = -1."""
    betas = torch.linspace(0.01, 0.3, 20, dtype=torch.float64)
    bar = (1 - betas).cumprod(0)
    t = torch.arange(1, 20, dtype=torch.float64)
    ones = torch.ones(19, 3, dtype=torch.float64)
    high, low = (learned_log_variance(DDPM, t, t - 1, v * ones).exp()[:, 0] for v in (1, -1))
    torch.testing.assert_close(high, betas[1:], rtol=1e-10, atol=0)
    torch.testing.assert_close(low, betas[1:] * (1 - bar[:-1]) / (1 - bar[1:]), rtol=1e-10, atol=0)
    middle = learned_log_variance(DDPM, t, t - 1, 0 * ones)[:, 0].exp()
    torch.testing.assert_close(middle, (high * low).sqrt())
    last = torch.tensor([0.0], dtype=torch.float64)
    ends = [learned_log_variance(DDPM, last, last - 1, v * ones[:1]).exp()[0, 0] for v in (1, -1)]
    torch.testing.assert_close(torch.stack(ends), betas[0] * torch.tensor([1, 0.5], dtype=torch.float64))


@pytest.mark.parametrize("process", [PROCESS, DDPM, diffrl.Flow()])
def test_the_terms_are_the_divergences(process: Any) -> None:
    grid = process.time_grid(6)
    t, s = grid[:-1], grid[1:]
    x0, D, x, log_variance = (normals(6, 2, seed=i) for i in range(4))
    found = step_kl(process, t, s, x0, D, log_variance)
    for i in range(6):
        A, kappa, std = posterior(process, t[i], s[i], 1.0)
        p = Normal(A * D[i] + kappa * x[i], (log_variance[i] / 2).exp())
        term = -p.log_prob(x0[i]) if i == 5 else kl_divergence(Normal(A * x0[i] + kappa * x[i], std), p)
        torch.testing.assert_close(found[i], term, rtol=1e-9, atol=1e-9)


# The loss


@pytest.mark.parametrize("num_steps", [1, 7])
@pytest.mark.parametrize("c", [0.0, 0.3])
def test_the_loss_is_that_of_a_plain_loop(num_steps: int, c: float) -> None:
    denoiser, chain = learner(), draw(num_steps=num_steps)
    total = torch.zeros((), dtype=torch.float64)
    for b in range(3):
        for k in range(num_steps):
            step = chain[b, k]
            x, x0, t, s = step["x_t"], step["x0"], float(step["t"]), float(step["next", "t"])
            out = denoiser.network(
                x[None] / math.sqrt(t**2 + SD**2), torch.tensor([math.log(t) / 4], dtype=x.dtype)
            )[0]
            F, v = out[:2], out[2:]
            D = SD**2 / (t**2 + SD**2) * x + t * SD / math.sqrt(t**2 + SD**2) * F
            c_out = t * SD / math.sqrt(t**2 + SD**2)
            beta, held = t**2 - s**2, D.detach()
            low = beta * s**2 / t**2 if s else beta / 2
            std = (beta ** ((v + 1) / 2) * low ** ((1 - v) / 2)).sqrt()
            m, m_exact = (s**2 / t**2 * x + (1 - s**2 / t**2) * a for a in (held, x0))
            term = (
                kl_divergence(Normal(m_exact, low**0.5), Normal(m, std))
                if s
                else -Normal(m, std).log_prob(x0)
            )
            total = total + (((D - x0) / c_out) ** 2).mean() + c * num_steps * term.mean()
    expected = total / (3 * num_steps)
    loss = HybridLoss(denoiser, vlb_coef=c)(chain)["loss_value"]
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(gradient(loss, denoiser), gradient(expected, denoiser), rtol=1e-7, atol=1e-10)


def test_the_bound_moves_no_mean() -> None:
    """Of the last layer, the rows of F have Monte Carlo's gradient, whatever c is; those of v have none at c = 0."""
    denoiser, chain = learner(), draw()
    last = denoiser.network.last.weight
    mine, none = (
        torch.autograd.grad(HybridLoss(denoiser, vlb_coef=c)(chain)["loss_value"], last)[0]
        for c in (5.0, 0.0)
    )
    theirs = torch.autograd.grad(monte_carlo_loss(denoiser)(chain)["loss_value"], last)[0]
    torch.testing.assert_close(mine[:2], theirs[:2], rtol=1e-9, atol=1e-12)
    assert number(mine[2:].abs().min()) > 0 and not bool(none[2:].any())


@pytest.mark.parametrize("process", [PROCESS, DDPM])
def test_the_fixed_point_is_the_variance_of_the_reverse_step(process: Any) -> None:
    """x0 ~ N(0, c): the law of x_s given x_t by conditioning the pair; there the mean gradient for log Σ is 0."""
    c, grid = 0.3, process.time_grid(5)
    for t, s in zip(grid[:-2], grid[1:-1], strict=True):
        a_t, a_s, v_t, v_s = *(process.alpha(u) for u in (t, s)), *(process.sigma(u) ** 2 for u in (t, s))
        of_s, of_t, cov = a_s**2 * c + v_s, a_t**2 * c + v_t, a_t / a_s * (a_s**2 * c + v_s)
        exact = of_s - cov**2 / of_t
        A, _, std = posterior(process, t, s, 1.0)
        spread = c * v_t / of_t  # Var(x0 | x_t)
        torch.testing.assert_close(std**2 + A**2 * spread, exact, rtol=1e-9, atol=0)
        log_variance = exact.log().view(1, 1).requires_grad_()
        x0 = spread.sqrt() * torch.tensor([[-1.0], [1.0]], dtype=torch.float64)  # of that variance, D = 0
        step_kl(process, t[None], s[None], x0, 0 * x0, log_variance.expand(2, 1)).sum().backward()
        assert log_variance.grad is not None and abs(float(log_variance.grad)) < 1e-9


def test_a_window_and_labels() -> None:
    denoiser = learner(num_classes=2)
    x0, cond = data(), torch.tensor([0, 1, 2])
    chain = draw(x0=x0, cond=cond, window=2)
    chain["importance"] = torch.full((3, 2, 1), 2.0, dtype=torch.float64)
    loss = HybridLoss(denoiser)
    doubled = loss(chain)
    single = loss(chain.exclude("importance"))
    assert number(doubled["loss_value"]) == pytest.approx(2 * number(single["loss_value"]))
    assert loss.network_evaluations == 12 and chain["loss"].shape == (3, 2, 1)
    with pytest.raises(ValueError, match="takes labels"):
        HybridLoss(denoiser)(draw(x0=x0))


def test_what_is_refused() -> None:
    plain = diffrl.Denoiser(MLP((2,), hidden=4), PROCESS)
    with pytest.raises(ValueError, match=r"network\.variance=true"):
        HybridLoss(plain)
    with pytest.raises(ValueError, match=r"network\.variance=true"):
        plain.with_variance(torch.zeros(1, 2), torch.ones(1))
    with pytest.raises(ValueError, match="vlb_coef is -1"):
        HybridLoss(learner(), vlb_coef=-1)
    plain.network.predicts_variance = True  # type: ignore[assignment]
    with pytest.raises(ValueError, match=r"twice as much in the first event dim"):
        plain(torch.zeros(1, 2), torch.ones(1))


# The network, guidance and the sampler


def test_an_image_network_has_twice_the_channels() -> None:
    network = UNet((3, 8, 8), channels=4, variance=True)
    denoiser = diffrl.Denoiser(network, PROCESS)
    x, t = torch.randn(2, 3, 8, 8), torch.ones(2)
    D_x, v = denoiser.with_variance(x, t)
    assert D_x.shape == v.shape == x.shape and torch.equal(D_x, denoiser(x, t)) and not bool(v.any())
    with torch.no_grad():
        network.last.bias.copy_(torch.arange(6.0))
    assert torch.equal(denoiser.with_variance(x, t)[1][0, :, 0, 0], torch.tensor([3.0, 4.0, 5.0]))


def test_guidance_is_of_the_mean_alone() -> None:
    denoiser, x, cond = learner(num_classes=2), normals(3, 2), torch.tensor([0, 1, 0])
    t = torch.ones(3, dtype=torch.float64)
    for w in (0.0, 1.0, 2.5):
        guided = GuidedDenoiser(denoiser, 2, w)
        D_x, v = guided.with_variance(x, t, cond)
        torch.testing.assert_close(D_x, guided(x, t, cond))
        assert torch.equal(v, denoiser.with_variance(x, t, cond)[1])


def test_a_step_of_the_sampler() -> None:
    denoiser, x = learner(DDPM), normals(4, 2)
    model, grid = Model(denoiser, DDPM, 5), DDPM.time_grid(5)
    with torch.no_grad():
        found = LearnedAncestral().step(model, x, grid[1], grid[2], Noise(torch.Generator().manual_seed(0)))
        D, v = denoiser.with_variance(x, grid[1].expand(4))
    A, kappa, _ = posterior(DDPM, grid[1], grid[2], 1.0)
    z = torch.randn(x.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    std = (learned_log_variance(DDPM, grid[1], grid[2], v) / 2).exp()
    torch.testing.assert_close(found, A * D + kappa * x + std * z)
    last = LearnedAncestral().step(model, x, grid[4], grid[5], Noise(None))
    torch.testing.assert_close(last, denoiser(x, grid[4].expand(4)))
    assert model.nfe == 2 and grid_for(LearnedAncestral(), DDPM, 5) == 5
    exact = diffrl.GaussianDenoiser(DDPM, torch.zeros(2), torch.eye(2))
    with pytest.raises(ValueError, match="predicts no variance"):
        diffrl.sample(exact, (1, 2), sampler=LearnedAncestral(), num_steps=3, seed=0)


class ExactVariance(diffrl.GaussianDenoiser):
    """The exact D, and the v of the exact reverse steps of a grid, for x0 ~ N(0, c)."""

    def __init__(self, c: float, num_steps: int) -> None:
        super().__init__(DDPM, torch.zeros(2), c * torch.eye(2))
        self.c, self.grid = c, DDPM.time_grid(num_steps)

    def with_variance(self, x_t: Tensor, t: Tensor, cond: Tensor | None = None) -> tuple[Tensor, Tensor]:
        s = self.grid[1 + int((self.grid == float(t[0])).nonzero())].expand(1)
        a, sigma2 = DDPM.alpha(t[:1].double()), DDPM.sigma(t[:1].double()) ** 2
        A, _, std = posterior(DDPM, t[:1], s, 1.0)
        exact = std**2 + A**2 * self.c * sigma2 / (a**2 * self.c + sigma2)
        ends = [learned_log_variance(DDPM, t[:1], s, torch.full((1, 1), v).double()) for v in (-1.0, 1.0)]
        u = (exact.log() - ends[0]) / (ends[1] - ends[0])
        return self(x_t, t), (2 * u - 1).to(x_t).expand_as(x_t)


def test_with_the_exact_variance_few_steps_keep_the_spread() -> None:
    """N(0, c) is kept by 4 steps: their law is exact, but for the last, which has the mean of x0 alone."""
    c, N = 0.3, 4
    options: dict[str, Any] = {"num_steps": N, "seed": 0, "dtype": torch.float64}
    exact = ExactVariance(c, N)
    learned = diffrl.sample(exact, (4000, 2), sampler=LearnedAncestral(), **options).var().item()
    plain = diffrl.sample(exact, (4000, 2), sampler=diffrl.Ancestral(), **options).var().item()
    t = DDPM.time_grid(N)[-2]
    a, sigma2 = float(DDPM.alpha(t)), float(DDPM.sigma(t)) ** 2
    start = float(DDPM.alpha(DDPM.time_grid(N)[0])) ** 2
    assert start < 0.05  # what the chain begins without
    assert learned == pytest.approx(c - c * sigma2 / (a**2 * c + sigma2), rel=0.05)
    assert plain < 0.8 * learned


@pytest.mark.slow
def test_training_finds_the_variance() -> None:
    """2-D mixture: after 600 steps the bound on test points is less than that of β̃ or β with the same D."""
    torch.manual_seed(0)
    set_, process = diffrl.data.gmm(dim=2, components=4, std=0.1), diffrl.DDPM(100)
    network = MLP((2,), hidden=64, variance=True)
    denoiser = diffrl.Denoiser(network, process, set_.sigma_data)
    loss, optimiser = HybridLoss(denoiser), torch.optim.Adam(denoiser.parameters(), lr=2e-3)
    g = torch.Generator().manual_seed(0)

    def bound(held: torch.Tensor | None = None) -> float:
        g = torch.Generator().manual_seed(1)
        chain = diffrl.sample_chain(process, set_.test[:500], num_steps=20, generator=g)
        x, t, s, x0 = (chain[k].flatten(0, 1) for k in ("x_t", "t", ("next", "t"), "x0"))
        t, s = t.flatten().double(), s.flatten().double()
        with torch.no_grad():
            D, v = denoiser.with_variance(x, t)
            v = v if held is None else held.expand_as(v)
            log_variance = learned_log_variance(process, t, s, v)
            return 20 * number(step_kl(process, t, s, x0, D, log_variance).mean())

    for _ in range(600):
        x0, _ = set_.batch(64, g)
        chain = diffrl.sample_chain(process, x0, num_steps=20, generator=g)
        optimiser.zero_grad()
        loss(chain)["loss_value"].backward()
        optimiser.step()
    learned, small, large = bound(), bound(torch.tensor(-1.0)), bound(torch.tensor(1.0))
    print(f"bound, nats a dim: learned {learned:.4f}, β̃ {small:.4f}, β {large:.4f}")
    assert learned < min(small, large) - 0.05
