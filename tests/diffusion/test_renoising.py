"""States that get more noise: their law, and the target whose mean is the clean estimate of that law."""

import pytest
import torch

import diffrl
from diffrl.diffusion.exact import GaussianDenoiser
from diffrl.diffusion.predictions import scalings
from diffrl.diffusion.renoising import between, marginal_target, renoise, target_noise
from diffrl.diffusion.schedules.base import Schedule

PROCESSES = [diffrl.Flow(), diffrl.Flow(shift=3.0), diffrl.VP(), diffrl.EDM()]
N = 200_000


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("process", PROCESSES, ids=repr)
@pytest.mark.parametrize("start", [0.5, 0.9, 1.0])  # as a share of the way from noise to data
def test_the_mean_of_the_target_is_the_exact_clean_estimate(process: Schedule, start: float) -> None:
    # x_s ~ N(m, v): not the law of noised data, but that of any generator
    s = process.time_grid(20)[round(20 * start)].expand(N)
    m, v = 0.7, 0.3 + float(process.sigma(s[:1])) ** 2
    x_s = m + v**0.5 * normal(N, 1)
    t = between(process, process.time_grid(20)[2].expand(N), s, torch.full((N,), 0.4))
    eps = normal(N, 1, seed=1)
    x_t, D = renoise(process, x_s, s, t, eps), marginal_target(process, x_s, s, t, eps)
    a, b = (float(c) for c in diffrl.diffusion.posterior.transition(process, s[:1], t[:1]))
    mean, variance = a * m, a**2 * v + b**2
    torch.testing.assert_close(
        x_t.mean(), torch.tensor(mean).double(), rtol=0, atol=5 * (variance / N) ** 0.5
    )
    torch.testing.assert_close(x_t.var(), torch.tensor(variance).double(), rtol=0.02, atol=0)
    alpha, sigma = float(process.alpha(t[:1])), float(process.sigma(t[:1]))
    exact = (x_t - sigma**2 * (x_t - mean) / variance) / alpha  # the score of a Gaussian is linear
    # D - exact has mean 0 given x_t: uncorrelated with 1 and with x_t
    off = D - exact
    for g in (torch.ones_like(x_t), (x_t - mean) / variance**0.5):
        assert abs(float((off * g).mean())) < 5 * float((off * g).std()) / N**0.5


def test_in_a_flow_it_is_the_published_velocity() -> None:
    flow = diffrl.Flow()
    for s in (0.0, 0.5, 0.75):
        t = torch.full((5,), 0.8, dtype=torch.float64)
        x_s, eps, at = normal(5, 2), normal(5, 2, seed=1), torch.full_like(t, s)
        x_t, D = renoise(flow, x_s, at, t, eps), marginal_target(flow, x_s, at, t, eps)
        a = (1 - 0.8) / (1 - s)
        b = (0.8**2 - (a * s) ** 2) ** 0.5
        v = -x_s / (1 - s) + eps / b * (0.8 + s**2 * a / (1 - s))
        torch.testing.assert_close((x_t - D) / 0.8, v)
        c_skip = scalings(flow, t, "velocity", 0.5).c_skip
        expected = torch.full_like(t, (b / (0.8 + s**2 * a / (1 - s))) ** 2)
        torch.testing.assert_close(target_noise(flow, at, t, c_skip), expected)


def test_from_clean_data_the_target_is_the_data_and_the_weight_one() -> None:
    for process in PROCESSES:
        t = process.time_grid(10)[1:9]
        s, x = torch.zeros_like(t), normal(8, 3)
        assert torch.equal(marginal_target(process, x, s, t, normal(8, 3, seed=1)), x)
        c_skip = scalings(process, t, "edm", 0.5).c_skip
        torch.testing.assert_close(target_noise(process, s, t, c_skip), torch.ones_like(t))


def test_the_weight_makes_the_noise_of_every_target_the_same() -> None:
    """Given x_s, the noise of (D* - c_skip x_t)/c_out times √λ is that from clean data."""
    for process in PROCESSES:
        s, t = process.time_grid(10)[6].expand(N), process.time_grid(10)[3].expand(N)
        for kind in ("edm", "velocity"):
            c_skip, c_out, _ = scalings(process, t, kind, 0.5)
            eps, x_s = normal(N, 1), torch.ones(N, 1, dtype=torch.float64)
            x_t = renoise(process, x_s, s, t, eps)
            F = (marginal_target(process, x_s, s, t, eps) - c_skip[:, None] * x_t) / c_out[:, None]
            clean = c_skip * process.sigma(t) / c_out
            weighted = F.std() * target_noise(process, s, t, c_skip).sqrt()[0]
            torch.testing.assert_close(weighted, clean[0].abs(), rtol=0.01, atol=0)


def test_pure_noise_is_refused() -> None:
    one = torch.ones(2, dtype=torch.float64)
    with pytest.raises(ValueError, match="pure noise"):
        marginal_target(diffrl.Flow(), normal(2, 1), one, one, normal(2, 1))


@pytest.mark.parametrize("process", [*PROCESSES, diffrl.DDPM()], ids=repr)
def test_times_lie_between_the_two_and_keep_their_distance(process: Schedule) -> None:
    grid, u = process.time_grid(4), torch.linspace(0, 0.999, 50)
    for k in range(4):
        t, s = grid[k].expand(50), grid[k + 1].expand(50)
        times = between(process, t, s, u)
        sigma = process.sigma(times) / process.alpha(times).clamp(min=1e-12)
        assert (sigma.diff() <= 0).all() and torch.equal(times[0], t[0].double())
        if k + 1 < 4:
            assert (times > s).all()
        else:
            assert (times >= 0).all() and (process.sigma(times) > 0).all()


def test_a_gaussian_has_its_own_denoiser_whatever_it_started_from() -> None:
    """From exact samples of noised data the target's mean is the denoiser of the data."""
    flow, n = diffrl.Flow(), 50_000
    exact = GaussianDenoiser(flow, torch.tensor([0.3]), torch.tensor([[0.2]]))
    x0 = 0.3 + 0.2**0.5 * normal(n, 1)
    s, t = torch.full((n,), 0.4).double(), torch.full((n,), 0.7).double()
    x_s = 0.6 * x0 + 0.4 * normal(n, 1, seed=1)
    eps = normal(n, 1, seed=2)
    x_t = renoise(flow, x_s, s, t, eps)
    off = marginal_target(flow, x_s, s, t, eps) - exact(x_t, t)
    for g in (torch.ones_like(x_t), x_t):
        assert abs(float((off * g).mean())) < 5 * float((off * g).std()) / n**0.5
