"""Steps of their own from every state: by a row of the reference batch, or by its mean."""

from typing import Any

import pytest
import torch
from torchrl.objectives import SoftUpdate

from diffrl.diffusion.chains import Chain
from diffrl.diffusion.exact import MixtureDenoiser
from diffrl.objectives import ValueLoss, reference_mean, single_transitions
from tests.kit.oracles import Estimate, assert_within, generator
from tests.kit.stand_ins import DATA, chains
from tests.kit.value_loss import PROCESS, denoiser, draw


def test_redrawn_steps_have_the_law_of_plain_single_transitions() -> None:
    """E[δ φ(x_t)] = 0 at the oracle, and the variance is that of TD(0), at each level; x0 is a row of the batch."""
    m, M, n = DATA.mixture, 800, 4
    assert m is not None
    exact = MixtureDenoiser(PROCESS, m.means, m.stds, m.weights)
    drawer, g = chains("redrawn", jitter=False), generator(4)
    x0 = [DATA.batch(n, g)[0].double() for _ in range(M)]
    steps = torch.stack([drawer(x, cond=None, generator=g).view(n, 6) for x in x0])
    plain = torch.stack([drawer.sampler(x, cond=None, generator=g) for x in x0])
    assert bool((steps["x0"][0, 0, 2] == x0[0]).all(-1).any())
    found = []
    for part in (steps, plain):
        reached = part["next"]
        D = exact(part["x_t"].reshape(-1, 2), part["t"].flatten()).view_as(part["x_t"])
        last = reached["terminated"]
        t_next = torch.where(last, 1.0, reached["t"])
        D_next = exact(reached["x_t"].reshape(-1, 2), t_next.flatten()).view_as(D)
        found.append(part["A"] * (part["x0"] - D) - reached["A"] * (part["x0"] - D_next))
    delta, of_chains = found
    for phi in (torch.ones_like(delta), steps["x_t"]):
        mean = (delta * phi).mean(1)
        assert_within(Estimate(mean.mean(0), mean.std(0) / M**0.5), 0.0)
    extra = (delta.square() - of_chains.square()).mean(1)
    assert_within(Estimate(extra.mean(0), extra.std(0) / M**0.5), 0.0)


@pytest.mark.parametrize("coupling", ["markov", "shared", 0.5])
def test_single_transitions_of_the_own_datum_are_steps_of_the_chain(coupling: Any) -> None:
    chain = draw(coupling=coupling)
    steps = single_transitions(
        chain, chain["x0"].flatten(0, 1), PROCESS, Chain(PROCESS, 7, coupling).eta, generator(5)
    )
    assert steps.batch_size == (21, 1) and bool(steps["next", "done"].all())
    levels = Chain(PROCESS, 7, coupling)
    z = torch.randn(21, 1, 2, generator=generator(5), dtype=torch.float64)
    index = chain["index"].flatten()
    wanted = levels.step(index, chain["x0"].flatten(0, 1), chain["x_t"].flatten(0, 1), z[:, 0])
    torch.testing.assert_close(steps["next", "x_t"][:, 0], wanted, rtol=1e-9, atol=1e-12)
    last = index == 6
    assert torch.equal(steps["next", "terminated"].flatten(), last)
    torch.testing.assert_close(steps["next", "x_t"][last], steps["x0"][last], rtol=0, atol=0)


@pytest.mark.parametrize("bootstrap", ["own", "target"])
@pytest.mark.parametrize("x0", ["redrawn", "plug_in"])
def test_a_loss_takes_marginal_transitions(x0: str, bootstrap: Any) -> None:
    """The target is (A - A') x_j + A' D⁻(x')."""
    data, _ = DATA.batch(4, generator(1))
    steps = chains(x0)(data.double(), cond=None, generator=generator(2))
    model = denoiser()
    loss = ValueLoss(model, lmbda=0.0, bootstrap=bootstrap, weight="none")
    if bootstrap == "target":
        SoftUpdate(loss, eps=0.9)
    reached, last = steps["next"], steps["next", "terminated"]
    D, D_next = (
        model(part["x_t"][:, 0], torch.where(last, 1.0, part["t"])[:, 0, 0]).unsqueeze(1)
        for part in (steps, reached)
    )
    D = model(steps["x_t"][:, 0], steps["t"][:, 0, 0]).unsqueeze(1)
    target = (steps["A"] - reached["A"]) * steps["x0"] + reached["A"] * D_next
    wanted = (target - steps["A"] * D).square().mean()
    torch.testing.assert_close(loss(steps)["loss_value"], wanted, rtol=1e-10, atol=0)
    if x0 == "plug_in":
        S = reference_mean(PROCESS, steps["x_t"][:, 0], steps["t"][:, 0, 0], data.double())
        assert torch.equal(steps["x0"][:, 0], S)
