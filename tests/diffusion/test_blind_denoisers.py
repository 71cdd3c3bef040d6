"""Denoisers whose network is not told the noise level: what it sees, what it learns at best, what that costs."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import diffrl
from diffrl.diffusion.networks.mlp import MLP
from diffrl.metrics import value_error
from diffrl.objectives.monte_carlo import monte_carlo_loss


class Listener(nn.Module):
    """Keeps what it is given; its output is one number times its input."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.seen = nn.Parameter(torch.zeros((), dtype=torch.float64)), torch.empty(0)

    def forward(self, x: Tensor, c_noise: Tensor, cond: Tensor | None = None) -> Tensor:
        self.seen = c_noise
        return self.w * x


@pytest.mark.parametrize("process", [diffrl.EDM(), diffrl.DDPM(), diffrl.Flow()])
@pytest.mark.parametrize("kind", ["edm", "v"])
def test_the_network_sees_its_input_alone(process: Any, kind: Any) -> None:
    """The coefficients around it are those of a denoiser that is told t."""
    network, x = Listener(), torch.randn(3, 2, dtype=torch.float64)
    with torch.no_grad():
        network.w.fill_(0.7)
    t = process.time_grid(5)[1:4]
    blind = diffrl.Denoiser(network, process, 0.6, kind, time_input="none")
    found = blind(x, t)
    assert network.seen.shape == (3,) and not bool(network.seen.any())
    told = diffrl.Denoiser(network, process, 0.6, kind)
    assert torch.equal(found, told(x, t)) and bool(network.seen.any())


@pytest.mark.parametrize("process", [diffrl.VP(), diffrl.DDPM(50)])
def test_the_fixed_point_is_the_mean_over_the_levels(process: Any) -> None:
    """x0, ε in {-1, 1}: moments of N(0, 1), α² + σ² = 1. Least squares is ε̂ = E[σ_t] x_t, and told t σ_t x_t."""
    x0 = torch.tensor([[-1.0], [-1.0], [1.0], [1.0]], dtype=torch.float64)
    eps = torch.tensor([[-1.0], [1.0], [-1.0], [1.0]], dtype=torch.float64)
    network = Listener()
    blind = diffrl.Denoiser(network, process, 1.0, "eps", time_input="none", scale_input=False)
    noise = eps[:, None].expand(
        4, 10, 1
    )  # one ε for the whole chain: its states have the marginals of that ε
    chain = diffrl.sample_chain(process, x0, num_steps=10, coupling="shared", noise=noise)
    sigma = process.sigma(process.time_grid(10)[:-1])
    for w, best in (
        (float(sigma.mean()), True),
        (float(sigma.mean()) + 0.1, False),
        (float(sigma[0]), False),
    ):
        with torch.no_grad():
            network.w.fill_(w)
        loss = monte_carlo_loss(blind, weight="eps")(chain.clone())["loss_value"]
        (slope,) = torch.autograd.grad(loss, [network.w])
        assert (abs(float(slope)) < 1e-9) == best


@pytest.mark.soak
def test_in_16_dims_it_costs_little() -> None:
    """Trained alike, without and with the level: it learns, and its value error is at most 3 times as large."""
    set_, process = diffrl.data.gmm(dim=16), diffrl.EDM()
    m = set_.mixture
    assert m is not None
    exact = diffrl.MixtureDenoiser(process, m.means, m.stds, m.weights)

    def error(denoiser: diffrl.Denoiser) -> float:
        levels = [0.1, 0.3, 1.0]
        return (
            sum(value_error(denoiser, exact, set_.test[:1000], process, levels, sigma_data=0.5).values()) / 3
        )

    errors, begun = {}, 0.0
    for kind in ("none", "c_noise"):
        torch.manual_seed(0)
        denoiser = diffrl.Denoiser(MLP((16,)), process, set_.sigma_data, time_input=kind)
        begun = error(denoiser)
        optimiser, loss = torch.optim.Adam(denoiser.parameters(), lr=2e-3), monte_carlo_loss(denoiser)
        g = torch.Generator().manual_seed(0)
        for _ in range(300):
            chain = diffrl.sample_chain(process, set_.batch(32, g)[0], num_steps=18, generator=g)
            optimiser.zero_grad()
            loss(chain)["loss_value"].backward()
            optimiser.step()
        errors[kind] = error(denoiser)
    print(f"value error at the start {begun:.3g}, then", {kind: f"{e:.3g}" for kind, e in errors.items()})
    assert errors["none"] < 0.8 * begun and errors["none"] < 3 * errors["c_noise"]
