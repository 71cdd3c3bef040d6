"""PriorGrad: the loss by hand, the change of coordinates, the exact denoiser as fixed point, its samples."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import diffrl
from diffrl.diffusion.guidance import GuidedDenoiser
from diffrl.diffusion.networks.mlp import MLP
from diffrl.metrics import denoising_error
from diffrl.objectives import PriorGradLoss, PriorStates
from diffrl.objectives.denoising import sample_log_normal_states
from diffrl.objectives.monte_carlo import monte_carlo_loss
from tests.kit.value_loss import gradient, number, perturb

PROCESS = diffrl.VP(kind="cosine")
M, S = torch.tensor([3.0, -1.0], dtype=torch.float64), torch.tensor([4.0, 0.25], dtype=torch.float64)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normals(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64)


def learner(
    process: Any = PROCESS, kind: Any = "data", num_classes: int = 0, **options: Any
) -> diffrl.Denoiser:
    torch.manual_seed(0)
    network = MLP((2,), num_classes, hidden=16, depth=1, x_features=8, noise_features=8)
    denoiser = diffrl.Denoiser(network, process, 1.0, prior=kind, **options).double()
    perturb(denoiser.network)
    return denoiser


def set_prior(denoiser: diffrl.Denoiser) -> diffrl.Denoiser:
    assert denoiser.prior is not None
    denoiser.prior.mean[0], denoiser.prior.std[0] = M, S.sqrt()
    return denoiser


def test_the_loss_is_the_published_one() -> None:
    """‖ε - ε̂‖² in the norm of S⁻¹, ε ~ N(0, S), with the published state α (x0 - m) + σ ε, in a plain loop."""
    denoiser = set_prior(learner(prediction_type="eps", scale_input=False, time_input="t"))
    x0 = M + S.sqrt() * normals(5, 2)
    states = PriorStates(PROCESS, denoiser)(x0, cond=None, generator=generator(1))
    total = torch.zeros((), dtype=torch.float64)
    for i in range(5):
        t = states["t"][i, 0]
        a, sigma = PROCESS.alpha(t), PROCESS.sigma(t)
        eps = (states["x_t"][i, 0] - a * x0[i]) / sigma
        y = a * (x0[i] - M) + sigma * eps
        eps_hat = S.sqrt() * denoiser.network((y / S.sqrt())[None], t)[0]
        total = total + (eps - eps_hat) @ torch.diag(1 / S) @ (eps - eps_hat) / 2 / 5
    loss = PriorGradLoss(denoiser, weight="eps")(states)["loss_value"]
    torch.testing.assert_close(loss, total, rtol=1e-9, atol=0)
    torch.testing.assert_close(gradient(loss, denoiser), gradient(total, denoiser), rtol=1e-7, atol=1e-12)


def test_the_noise_has_the_priors_scale() -> None:
    denoiser = set_prior(learner())
    x0 = torch.zeros(20_000, 2, dtype=torch.float64)
    states = PriorStates(PROCESS, denoiser)(x0, cond=None, generator=generator())
    eps = states["x_t"][:, 0] / PROCESS.sigma(states["t"][:, 0])
    torch.testing.assert_close(eps.var(0), S, rtol=0.05, atol=0)


def test_it_is_denoising_of_standardised_data() -> None:
    """The loss of x is Monte Carlo's of u = S^-½ (x - m), with the same z; a standard prior gives `edm`."""
    denoiser, x0 = set_prior(learner()), normals(6, 2)
    plain = diffrl.Denoiser(denoiser.network, PROCESS, 1.0)
    states = PriorStates(PROCESS, denoiser)(x0, cond=None, generator=generator())
    g = generator()
    z = torch.randn(6, 2, generator=g, dtype=torch.float64)
    same = sample_log_normal_states(PROCESS, (x0 - M) / S.sqrt(), noise=z, generator=g)
    torch.testing.assert_close(states["t"], same["t"])
    a, b = PriorGradLoss(denoiser)(states)["loss_value"], monte_carlo_loss(plain)(same)["loss_value"]
    torch.testing.assert_close(a, b, rtol=1e-9, atol=0)
    torch.testing.assert_close(gradient(a, plain), gradient(b, plain), rtol=1e-7, atol=1e-12)


class Linear(nn.Module):
    """F = w x, a number for each coordinate."""

    event_shape = (2,)

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(2, dtype=torch.float64))

    def forward(self, x: Tensor, c_noise: Tensor, cond: Tensor | None = None) -> Tensor:
        return self.w * x


def test_the_exact_denoiser_is_its_fixed_point() -> None:
    """x0 ~ N(m, c S'), noise of S: D = m + α c/(α² c + σ² S) (x_t - α m), c by coordinate; moments by ±1."""
    c = torch.tensor([9.0, 0.1], dtype=torch.float64)
    signs = torch.tensor([[-1.0, -1.0], [-1.0, 1.0], [1.0, -1.0], [1.0, 1.0]], dtype=torch.float64)
    x0, z = M + c.sqrt() * signs[:, :1], signs[:, 1:].expand(4, 2)
    denoiser = set_prior(
        diffrl.Denoiser(Linear(), PROCESS, 1.0, "x0", scale_input=False, prior="data").double()
    )
    t = torch.tensor(0.4, dtype=torch.float64)
    a, sigma = PROCESS.alpha(t), PROCESS.sigma(t)
    states = sample_log_normal_states(
        PROCESS, x0, P_mean=float((sigma / a).log()), P_std=0, noise=S.sqrt() * z
    )
    with torch.no_grad():
        denoiser.network.w.copy_(a * c / (a**2 * c + sigma**2 * S))
    (slope,) = torch.autograd.grad(PriorGradLoss(denoiser)(states)["loss_value"], [denoiser.network.w])
    assert float(slope.abs().max()) < 1e-9
    D = denoiser(states["x_t"][:, 0], states["t"].flatten())
    exact = M + a * c / (a**2 * c + sigma**2 * S) * (states["x_t"][:, 0] - a * M)
    torch.testing.assert_close(D, exact)


def test_a_fitted_prior_and_its_classes() -> None:
    denoiser = learner(kind="class", num_classes=2)
    x0, labels = normals(4000, 2), torch.arange(4000) % 2
    x0 = torch.where(labels[:, None] == 0, x0, M + 1e-9 * x0)
    prior = denoiser.prior
    assert prior is not None
    prior.fit(x0, labels)
    torch.testing.assert_close(prior.mean[1], M, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(prior.std[0], torch.ones(2, dtype=torch.float64), rtol=0.05, atol=0)
    least = 0.1 * float(x0.var(0, correction=0).mean().sqrt())
    torch.testing.assert_close(prior.std[1], torch.full((2,), least, dtype=torch.float64))
    torch.testing.assert_close(prior.mean[2], x0.mean(0))
    cond = torch.tensor([0, 1, 2])
    mean, _ = prior.of(cond, x0[:3])
    assert torch.equal(mean, prior.mean) and torch.equal(prior.of(None, x0)[0], prior.mean[2:])
    states = PriorStates(PROCESS, denoiser)(x0[:3], cond=cond, generator=generator())
    assert number(PriorGradLoss(denoiser)(states)["loss_value"]) > 0
    with pytest.raises(ValueError, match="these data have no labels"):
        prior.fit(x0)
    with pytest.raises(ValueError, match="class 1 has 1 data"):
        prior.fit(x0[:3], torch.tensor([0, 1, 0]))
    assert GuidedDenoiser(denoiser, 2, 1.0).prior is prior
    with pytest.raises(ValueError, match="guidance_scale is 2"):
        GuidedDenoiser(denoiser, 2, 2.0)


class ExactPrior(nn.Module):
    """The exact denoiser of N(m, c), diagonal, under noise of S."""

    def __init__(self, c: Tensor) -> None:
        super().__init__()
        self.process, self.c = PROCESS, c
        self.prior = set_prior(learner()).prior

    def forward(self, x: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
        a, sigma = PROCESS.alpha(t)[:, None], PROCESS.sigma(t)[:, None]
        return M + a * self.c / (a**2 * self.c + sigma**2 * S) * (x - a * M)


@pytest.mark.parametrize("sampler", [diffrl.Ancestral(), diffrl.Heun()])
def test_samples_are_of_the_data(sampler: Any) -> None:
    c = torch.tensor([6.0, 0.1], dtype=torch.float64)
    x = diffrl.sample(ExactPrior(c), (3000, 2), sampler=sampler, num_steps=60, seed=0, dtype=torch.float64)
    torch.testing.assert_close(x.mean(0), M, rtol=0, atol=0.15)
    torch.testing.assert_close(x.var(0), c, rtol=0.1, atol=0)


def test_errors_are_taken_with_its_noise() -> None:
    """Of the exact denoiser the denoising error is its posterior variance, over c_out²."""
    c = torch.tensor([6.0, 0.1], dtype=torch.float64)
    x0 = M + c.sqrt() * normals(4000, 2)
    found = denoising_error(ExactPrior(c), x0, PROCESS, [0.5], sigma_data=1.0)["0.5"]
    expected = float((c * 0.25 * S / (c + 0.25 * S)).sum()) / (0.25 / 1.25)
    assert found == pytest.approx(expected, rel=0.1)


def test_what_does_not_go_with_it() -> None:
    plain = diffrl.Denoiser(MLP((2,), hidden=4), PROCESS)
    with pytest.raises(ValueError, match=r"set denoiser\.prior=data"):
        PriorGradLoss(plain)
    with pytest.raises(ValueError, match="takes no labels"):
        learner(kind="class")
    with pytest.raises(ValueError, match="prior is 'normal'"):
        learner(kind="normal")
    with pytest.raises(ValueError, match="no attribute event_shape"):
        _bare()
    with pytest.raises(ValueError, match="a policy draws"):
        diffrl.DenoisingPolicy(learner(), diffrl.Ancestral(), num_steps=3, reduction="mean")


def _bare() -> None:
    class Bare(nn.Module):
        def forward(self, x: Tensor, c_noise: Tensor, cond: Tensor | None = None) -> Tensor:
            return x

    diffrl.Denoiser(Bare(), PROCESS, prior="data")


def test_a_model_file_keeps_the_prior(tmp_path: Any) -> None:
    denoiser = set_prior(learner())
    model = diffrl.load(diffrl.save(denoiser, tmp_path / "model.safetensors"))
    assert model.denoiser.prior is not None and torch.equal(model.denoiser.prior.std[0], S.sqrt())
    x, t = normals(3, 2), torch.full((3,), 0.5, dtype=torch.float64)
    assert torch.equal(model.denoiser(x, t), denoiser(x, t))


@pytest.mark.soak
def test_training_lowers_the_held_out_error() -> None:
    """Two coordinates of very different scale, whose mixture has four modes: the error in units of S falls to 0.6."""
    g = generator()
    scale = torch.tensor([10.0, 0.1])
    x0 = scale * (torch.randint(2, (4000, 2), generator=g) * 2 - 1 + 0.1 * torch.randn(4000, 2, generator=g))
    torch.manual_seed(0)
    denoiser = diffrl.Denoiser(MLP((2,)), diffrl.EDM(), 1.0, prior="data")
    assert denoiser.prior is not None
    denoiser.prior.fit(x0[:3000])
    draw, loss = PriorStates(denoiser.process, denoiser), PriorGradLoss(denoiser)
    optimiser = torch.optim.Adam(denoiser.parameters(), lr=2e-3)

    def held_out() -> float:
        with torch.no_grad():
            return number(loss(draw(x0[3000:], cond=None, generator=generator(5)))["loss_value"])

    before = held_out()
    for _ in range(300):
        i = torch.randint(3000, (64,), generator=g)
        optimiser.zero_grad()
        loss(draw(x0[i], cond=None, generator=g))["loss_value"].backward()
        optimiser.step()
    print(f"held-out loss {before:.3g} -> {held_out():.3g}")
    assert held_out() < 0.6 * before
