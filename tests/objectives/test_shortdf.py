"""ShortDF: the published relaxation in a plain loop, its end points, its pairs, the bias that it has, a training."""

import math
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor, nn
from torchrl.objectives import HardUpdate

import diffrl
from diffrl.diffusion.networks.mlp import MLP
from diffrl.metrics import denoising_error
from diffrl.objectives import ShortDFLoss, SoftUpdate, sample_shortdf_pairs
from diffrl.objectives.monte_carlo import monte_carlo_loss
from tests.kit.value_loss import PROCESS, data, denoiser, gradient, number, perturb

DDPM = diffrl.DDPM(12, beta_start=0.02, beta_end=0.3)


def pairs_of(process: Any, B: int = 6, N: int = 12, seed: int = 0) -> TensorDict:
    g = torch.Generator().manual_seed(seed)
    return sample_shortdf_pairs(process, data(B), num_steps=N, generator=g)


def updated(loss: ShortDFLoss) -> ShortDFLoss:
    """With an updater, whose lack TorchRL warns of; it is never stepped, so the target is the network of before."""
    HardUpdate(loss, value_network_update_interval=1)
    return loss


@pytest.mark.parametrize("process", [PROCESS, DDPM])
@pytest.mark.parametrize("N", [1, 2, 12])
def test_the_loss_is_the_published_relaxation(process: Any, N: int) -> None:
    """With x_s, edge and bound as published, one network for both, which the target is; N = 1 has clean s alone."""
    network = denoiser(process, "v")
    loss = ShortDFLoss(network, weight="eps", relax_coef=0.7, margin=1e-3)
    updated(loss)
    target = denoiser(process, "v")
    perturb(network)
    pairs = pairs_of(process, N=N)
    total, relaxed = torch.zeros((), dtype=torch.float64), 0
    for b in range(6):
        x, t, x0, s = (pairs[k][b] for k in ("x_t", "t", "x0", ("next", "t")))
        t, s = t[0], s[0]
        a_t, v_t, a_s, v_s = process.alpha(t), process.sigma(t), process.alpha(s), process.sigma(s)
        with torch.no_grad():
            D_t = target(x, t)
            eps = (x - a_t * D_t) / v_t
            clean = float(s) == process.t_clean

            def look(y: Tensor, s: Tensor = s, clean: bool = clean) -> Tensor:
                return y if clean else target(y, s)

            d_s = (look(a_s * x0 + v_s * eps) - x0).abs()
            edge = (look(a_s * D_t + v_s * eps) - x0).abs() - d_s
            bound = torch.relu(d_s + edge) + 1e-3
        D = network(x, t)
        d = (D - x0).abs()
        relaxed += int((d > bound).sum())
        total = total + (((D - x0) * a_t / v_t) ** 2).mean() / 6
        total = total + 0.7 * ((d > bound) * (d - bound)).mean() / 6
    out = loss(pairs)
    torch.testing.assert_close(out["loss_value"], total, rtol=1e-9, atol=0)
    torch.testing.assert_close(
        gradient(out["loss_value"], network), gradient(total, network), rtol=1e-7, atol=1e-10
    )
    assert number(out["relaxed"]) == pytest.approx(relaxed / 12) and loss.network_evaluations == 18


def test_without_the_hinge_it_is_denoising() -> None:
    network, pairs = denoiser(), pairs_of(PROCESS)
    mine = updated(ShortDFLoss(network, relax_coef=0))(pairs.clone())["loss_value"]
    theirs = monte_carlo_loss(network)(pairs)["loss_value"]
    torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=0)


def test_the_pairs() -> None:
    pairs = pairs_of(DDPM, B=3000)
    i, j = (DDPM.index(pairs[k].flatten(), 12) for k in ("t", ("next", "t")))
    assert set(i.tolist()) == set(range(12)) and bool((j > i).all()) and set(j.tolist()) == set(range(1, 13))
    last = torch.tensor([(j[i == 10] == n).double().mean() for n in (11, 12)])
    torch.testing.assert_close(last, torch.full((2,), 0.5, dtype=last.dtype), rtol=0, atol=0.15)
    x, x0, t = pairs["x_t"], pairs["x0"], pairs["t"]
    eps = (x - DDPM.alpha(t) * x0) / DDPM.sigma(t)
    reached = pairs["next", "x_t"] - DDPM.alpha(pairs["next", "t"]) * x0
    torch.testing.assert_close(reached, DDPM.sigma(pairs["next", "t"]) * eps, rtol=1e-9, atol=1e-9)


class Slope(nn.Module):
    """D = g_t x + shift: exact of N(0, c) where the shift is 0."""

    def __init__(self, c: float) -> None:
        super().__init__()
        self.process, self.c, self.sigma_data = DDPM, c, c**0.5
        self.shift = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def scalings(self, t: Tensor) -> Any:
        return diffrl.Denoiser(MLP((1,)), DDPM).scalings(t)

    def gain(self, t: Tensor) -> Tensor:
        a, v = DDPM.alpha(t), DDPM.sigma(t) ** 2
        return a * self.c / (a**2 * self.c + v)

    def forward(self, x: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
        return self.gain(t)[:, None] * x + self.shift


def test_the_bias_at_the_exact_denoiser() -> None:
    """Given x_t, the hinge's gradient is sign(D - D') P(x0 beyond the midpoint of D and D'), which is not 0."""
    network: Any = Slope(0.5)
    n, t, s = 400_000, torch.tensor([10.0], dtype=torch.float64), torch.tensor([4.0], dtype=torch.float64)
    a, v, a_s, v_s = DDPM.alpha(t), DDPM.sigma(t), DDPM.alpha(s), DDPM.sigma(s)
    x = torch.tensor(1.3, dtype=torch.float64)
    D, spread = network.gain(t) * x, 0.5 * v**2 / (a**2 * 0.5 + v**2)
    D2 = network.gain(s) * (a_s * D + v_s * (x - a * D) / v)
    z = torch.randn(n, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    pairs = sample_shortdf_pairs(DDPM, D + spread.sqrt() * z, num_steps=12, generator=torch.Generator())
    pairs["x_t"], pairs["t"] = x.expand(n, 1, 1), t.expand(n, 1, 1)
    pairs["next", "t"] = s.expand(n, 1, 1)
    loss = updated(ShortDFLoss(network, weight="none", margin=0.0))(pairs)["loss_value"]
    (slope,) = torch.autograd.grad(loss, [network.shift])
    half = float((D2 - D).abs()) / 2 / float(spread.sqrt())
    expected = float((D - D2).sign()) * 0.5 * math.erfc(half / math.sqrt(2))
    assert abs(expected) > 0.1 and float(slope) == pytest.approx(expected, abs=0.01)


@pytest.mark.parametrize("option", ["relax_coef", "margin"])
def test_a_number_outside_its_range_is_named(option: Any) -> None:
    with pytest.raises(ValueError, match=f"{option} is -1"):
        ShortDFLoss(denoiser(), **{option: -1})


@pytest.mark.soak
def test_training_from_a_denoiser_improves_samples_of_two_steps() -> None:
    """The rings: 300 steps of denoising, then 300 of each; held-out denoising error and samples of 2 steps, printed."""
    from diffrl.metrics import sliced_w2

    set_, process = diffrl.data.rings(), diffrl.VP(kind="cosine")
    found: dict[str, tuple[float, float]] = {}
    for c in (0.0, 1.0):
        torch.manual_seed(0)
        network = diffrl.Denoiser(MLP((2,)), process, set_.sigma_data)
        begun = sum(denoising_error(network, set_.test[:1000], process, [0.3, 1.0], sigma_data=0.5).values())
        g = torch.Generator().manual_seed(0)
        optimiser = torch.optim.Adam(network.parameters(), lr=2e-3)
        for relax in (0.0, c):
            loss = ShortDFLoss(network, relax_coef=relax)
            target = SoftUpdate(loss, eps=0.98)
            for _ in range(300):
                pairs = sample_shortdf_pairs(process, set_.batch(256, g)[0], num_steps=100, generator=g)
                optimiser.zero_grad()
                loss(pairs)["loss_value"].backward()
                optimiser.step()
                target.step()
        error = sum(denoising_error(network, set_.test[:1000], process, [0.3, 1.0], sigma_data=0.5).values())
        x = diffrl.sample(network, (2000, 2), sampler=diffrl.DDIM(), num_steps=2, seed=0)
        found[f"c = {c:g}"] = error, sliced_w2(x, set_.test[:2000])
        assert error < begun
    assert found["c = 1"][1] < 0.95 * found["c = 0"][1]
    print({name: f"denoising error {e:.4g}, 2 steps {w:.4g}" for name, (e, w) in found.items()})
