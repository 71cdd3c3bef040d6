"""Scheduled sampling: the rollback in a plain loop, its law, m at both ends, its bias, a training."""

from typing import Any

import pytest
import torch
from torch import Tensor

import diffrl
from diffrl.diffusion.networks.mlp import MLP
from diffrl.metrics import value_error
from diffrl.objectives import RollbackStates
from diffrl.objectives.denoising import sample_uniform_states
from diffrl.objectives.monte_carlo import monte_carlo_loss
from diffrl.objectives.scheduled_sampling import roll_back
from diffrl.objectives.scheme import Progressive
from tests.kit.value_loss import PROCESS, data, denoiser, number

DDPM = diffrl.DDPM(12, beta_start=0.02, beta_end=0.3)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("process", [PROCESS, DDPM])
def test_a_rollback_is_that_of_a_plain_loop(process: Any) -> None:
    """Rows go down 0, 1 and 3 levels; each takes the noise of its turn."""
    network, x = denoiser(process, "v"), data()
    index, steps = torch.tensor([2.0, 5.0, 1.0], dtype=torch.float64), torch.tensor([0, 1, 3])
    network.train()
    found = roll_back(network, process, x, index, steps, 12, generator=generator())
    assert network.training and not found.requires_grad
    g, expected = generator(), x.clone()
    for j in range(3):
        noise = torch.randn(int((steps > j).sum()), 2, generator=g, dtype=torch.float64)
        for place, row in enumerate((steps > j).nonzero().flatten().tolist()):
            t, s = (process.time(index[row] + k, 12) for k in (j, j + 1))
            D = network(expected[row : row + 1], t[None])[0].detach()
            expected[row] = process.alpha(s) * D + process.sigma(s) * noise[place]
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("process", [PROCESS, DDPM])
def test_without_rollback_it_is_denoising_at_uniform_levels(process: Any) -> None:
    network, x0 = denoiser(process, "v"), data(8)
    draw = RollbackStates(process, network, num_steps=12, probs_start=(0.0,), probs_end=(0.0,))
    g = generator()
    found = draw(x0, cond=None, generator=g)
    g = generator()
    torch.multinomial(torch.tensor([1.0, 0.0]), 1, generator=g)
    plain = sample_uniform_states(process, x0, num_steps=12, generator=g)
    for key in ("x_t", "t", "x0", "A", "kappa", ("next", "t")):
        assert torch.equal(found[key], plain[key])
    assert int(found["evaluations"].sum()) == 0


def test_evaluations_are_counted_and_the_noisiest_level_has_no_earlier_one() -> None:
    network = denoiser(DDPM, "v")
    draw = RollbackStates(DDPM, network, num_steps=12, probs_start=(0.0, 1.0), probs_end=(0.0, 1.0))
    states = draw(data(200), cond=None, generator=generator())
    i = DDPM.index(states["t"].flatten(), 12)
    assert torch.equal(states["evaluations"].flatten(), i.clamp(max=2).long())
    assert 0 in i and 11 in i
    loss = monte_carlo_loss(network)
    loss(states)
    assert loss.network_evaluations == 200 + int(states["evaluations"].sum())


def test_the_probabilities_move_along_the_training() -> None:
    draw = RollbackStates(PROCESS, denoiser(), probs_end=(0.2, 0.4))
    assert isinstance(draw, Progressive) and draw.probs == [0, 0]
    draw.set_progress(5, 10)
    assert draw.probs == pytest.approx([0.1, 0.2])
    g = generator()
    counts = torch.tensor([draw._draw_m(g) for _ in range(4000)]).bincount(minlength=3) / 4000
    torch.testing.assert_close(counts, torch.tensor([0.7, 0.1, 0.2]), rtol=0, atol=0.03)


def test_the_bias_of_its_fixed_point() -> None:
    """x0 ~ N(0, c), m = 1, D exact: E[x0 x_i]/E[x_i²] has V = Var(D) in place of c, so D is no fixed point."""
    c, i = 0.5, 6
    exact: Any = diffrl.GaussianDenoiser(DDPM, torch.zeros(1), c * torch.eye(1))
    x0 = c**0.5 * torch.randn(400_000, 1, generator=generator(), dtype=torch.float64)
    t, s = (DDPM.time(torch.tensor(float(k), dtype=torch.float64), 12) for k in (i - 1, i))
    a, v = DDPM.alpha(t), DDPM.sigma(t) ** 2
    noise = torch.randn(x0.shape, generator=generator(1), dtype=torch.float64)
    before = torch.full((len(x0),), float(i - 1), dtype=torch.float64)
    one = torch.ones(len(x0), dtype=torch.int64)
    x = roll_back(exact, DDPM, a * x0 + v.sqrt() * noise, before, one, 12, generator=generator(2))
    V = (a * c) ** 2 / (a**2 * c + v)
    a, v = DDPM.alpha(s), DDPM.sigma(s) ** 2
    slope = float((x0 * x).mean() / x.square().mean())
    assert slope == pytest.approx(float(a * V / (a**2 * V + v)), abs=0.01)
    assert float(a * c / (a**2 * c + v)) - slope > 0.1


def test_labels_go_along() -> None:
    torch.manual_seed(0)
    network = diffrl.Denoiser(MLP((2,), 2, hidden=8), PROCESS).double()
    draw = RollbackStates(PROCESS, network, num_steps=12, probs_start=(1.0,), probs_end=(1.0,))
    cond = torch.tensor([0, 1, 2])
    states = draw(data(), cond=cond, generator=generator())
    assert torch.equal(states["cond"].flatten(), cond)
    assert number(monte_carlo_loss(network)(states)["loss_value"]) > 0


@pytest.mark.parametrize(
    "options",
    [
        {"probs_end": (0.7, 0.5)},
        {"probs_end": (0.1,)},
        {"probs_start": (-0.1, 0.0)},
        {"probs_end": (0.1, float("nan"))},
    ],
)
def test_probabilities_that_are_none_are_named(options: Any) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        RollbackStates(PROCESS, denoiser(), **options)


@pytest.mark.soak
def test_training_lowers_the_value_error() -> None:
    """16-D mixture, 18 levels: it learns, and how far from denoising it ends is printed."""
    set_, process = diffrl.data.gmm(dim=16), diffrl.EDM()
    m = set_.mixture
    assert m is not None
    exact = diffrl.MixtureDenoiser(process, m.means, m.stds, m.weights)

    def error(network: Any) -> float:
        found: dict[str, float] = value_error(
            network, exact, set_.test[:500], process, [0.3, 1.0], sigma_data=0.5
        )
        return sum(found.values()) / 2

    errors = {}
    for name, probs in (("denoising", (0.0, 0.0)), ("scheduled sampling", (0.2, 0.3))):
        torch.manual_seed(0)
        network = diffrl.Denoiser(MLP((16,)), process, set_.sigma_data)
        begun, g = error(network), generator()
        draw, loss = RollbackStates(process, network, 18, probs_end=probs), monte_carlo_loss(network)
        optimiser = torch.optim.Adam(network.parameters(), lr=2e-3)
        for step in range(300):
            draw.set_progress(step, 300)
            x0: Tensor = set_.batch(256, g)[0]
            optimiser.zero_grad()
            loss(draw(x0, cond=None, generator=g))["loss_value"].backward()
            optimiser.step()
        errors[name] = error(network)
    print(f"value error {begun:.3g} ->", {name: f"{e:.3g}" for name, e in errors.items()})
    assert errors["scheduled sampling"] < begun / 2
