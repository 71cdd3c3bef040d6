"""Physics residual: the loss by torch's densities, its fixed point and its bias, a training."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Normal

import diffrl
from diffrl.diffusion.networks.mlp import MLP
from diffrl.diffusion.posterior import posterior
from diffrl.objectives import PhysicsResidualLoss
from diffrl.objectives.monte_carlo import monte_carlo_loss
from diffrl.objectives.physics_residual import RESIDUALS
from tests.kit.value_loss import PROCESS, data, denoiser, draw, gradient, number, perturb


@pytest.mark.parametrize("estimate", ["mean", "sample"])
@pytest.mark.parametrize("num_steps", [1, 7])
def test_the_loss_is_denoising_and_a_likelihood(estimate: Any, num_steps: int) -> None:
    """-c (log N(0; R, β̃) - log N(0; 0, β̃)), step by step; "sample" by DDIM and a second look."""
    network, chain = denoiser(), draw(num_steps=num_steps)
    perturb(network)
    expected = monte_carlo_loss(network)(chain.clone())["loss_value"]
    t_end = chain["t"][0, -1]
    for b in range(3):
        for k in range(num_steps):
            x, t, s = chain["x_t"][b, k][None], chain["t"][b, k], chain["next", "t"][b, k]
            x_hat = network(x, t)
            if estimate == "sample":
                end = x_hat + t_end / t * (x - x_hat)  # of one noise: x = D + t ε
                x_hat = network(end, t_end)
            R = x_hat.square().sum() - 0.64
            variance = posterior(PROCESS, t, s, 1.0).std ** 2 if float(s) > 0 else t**2 / 2
            likelihood = Normal(R, variance.sqrt()).log_prob(torch.zeros(()).double())
            best = Normal(0.0, variance.sqrt()).log_prob(torch.zeros(()).double())
            expected = expected - 0.3 * (likelihood - best).mean() / (3 * num_steps)
    loss = PhysicsResidualLoss(
        network, residual_options={"radius": 0.8}, residual_coef=0.3, estimate=estimate
    )
    found = loss(chain)["loss_value"]
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)
    torch.testing.assert_close(gradient(found, network), gradient(expected, network), rtol=1e-7, atol=1e-9)
    assert loss.network_evaluations == 3 * num_steps * (1 if estimate == "mean" else 2)


def test_residuals() -> None:
    x = torch.tensor([[3.0, 4.0], [0.0, 0.5]])
    assert RESIDUALS["sphere"](x, 5.0).flatten().tolist() == [0, -24.75]
    assert RESIDUALS["ball"](x, 1.0).flatten().tolist() == [24, 0]
    assert RESIDUALS["total"](x.view(2, 1, 2), 7.0).flatten().tolist() == [0, -6.5]


class Shifted(nn.Module):
    """An exact denoiser and a shift of it, the same for every state."""

    def __init__(self, exact: Any) -> None:
        super().__init__()
        self.exact, self.process, self.sigma_data = exact, exact.process, 0.5
        self.shift = nn.Parameter(torch.zeros(2, dtype=torch.float64))

    def scalings(self, t: Tensor) -> Any:
        return diffrl.Denoiser(MLP((2,)), self.process).scalings(t)

    def forward(self, x: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
        return self.exact(x, t) + self.shift


def slope_at_exact(points: Tensor, residual: str, options: dict[str, float]) -> Tensor:
    """Gradient of the residual's part for the shift, at the exact denoiser of these points."""
    network: Any = Shifted(diffrl.EmpiricalDenoiser(PROCESS, points))
    x0 = points[torch.randint(len(points), (200,), generator=torch.Generator().manual_seed(0))]
    chain = draw(x0=x0)
    slopes = []
    for c in (0.0, 1.0):
        loss = PhysicsResidualLoss(network, residual=residual, residual_options=options, residual_coef=c)
        slopes.append(torch.autograd.grad(loss(chain.clone())["loss_value"], [network.shift])[0])
    return slopes[1] - slopes[0]


def test_of_a_linear_equation_the_exact_denoiser_has_no_residual() -> None:
    points = torch.tensor([[0.2, 0.3], [-0.4, 0.9], [0.5, 0.0]], dtype=torch.float64)
    assert float(slope_at_exact(points, "total", {"total": 0.5}).abs().max()) < 1e-8


def test_of_another_equation_it_has() -> None:
    """Two points of a circle, seen in noise, have a mean within it: a step against the gradient goes outwards."""
    points = torch.tensor([[0.8, 0.0], [0.0, 0.8]], dtype=torch.float64)
    slope = slope_at_exact(points, "sphere", {"radius": 0.8})
    assert bool((slope < -0.1).all())


def test_labels_windows_and_importance() -> None:
    torch.manual_seed(0)
    network = diffrl.Denoiser(MLP((2,), 2, hidden=8), PROCESS).double()
    chain = draw(x0=data(), cond=torch.tensor([0, 1, 2]), window=2)
    chain["importance"] = torch.full((3, 2, 1), 2.0, dtype=torch.float64)
    loss = PhysicsResidualLoss(network, estimate="sample")
    double, single = loss(chain)["loss_value"], loss(chain.exclude("importance"))["loss_value"]
    assert number(double) == pytest.approx(2 * number(single)) and chain["loss"].shape == (3, 2, 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"residual": "navier"}, "residual is 'navier': give one of sphere, ball, total"),
        ({"residual_options": {"r": 1}}, "residual 'sphere' has no number 'r': it has radius"),
        ({"residual_options": {"radius": -1}}, "residual_options.radius is -1"),
        ({"residual_coef": -1}, "residual_coef is -1"),
        ({"estimate": "mode"}, "estimate is 'mode'"),
    ],
)
def test_what_is_refused(options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PhysicsResidualLoss(denoiser(), **options)


@pytest.mark.soak
def test_training_lowers_the_residual_of_samples() -> None:
    """Points on a circle of radius 0.8: after 300 steps samples are nearer to it than those of Monte Carlo."""
    set_ = diffrl.data.rings(modes=64, std=0.0)
    found = {}
    for c in (0.0, 0.1):
        torch.manual_seed(0)
        network = diffrl.Denoiser(MLP((2,)), diffrl.EDM(), set_.sigma_data)
        loss = PhysicsResidualLoss(network, residual_options={"radius": 0.8}, residual_coef=c)
        optimiser, g = torch.optim.Adam(network.parameters(), lr=2e-3), torch.Generator().manual_seed(0)
        for _ in range(300):
            chain = diffrl.sample_chain(network.process, set_.batch(32, g)[0], num_steps=18, generator=g)
            optimiser.zero_grad()
            loss(chain)["loss_value"].backward()
            optimiser.step()
        x = diffrl.sample(network.eval(), (1000, 2), sampler=diffrl.Heun(), num_steps=18, seed=0)
        found[c] = number(RESIDUALS["sphere"](x, 0.8).abs().mean())
    print(f"mean |R| of samples: {found[0.0]:.4f} without the residual, {found[0.1]:.4f} with c = 0.1")
    assert found[0.1] < 0.8 * found[0.0]
