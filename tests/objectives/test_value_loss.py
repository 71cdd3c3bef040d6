"""The value loss as a module: batch sizes, entries, copies, casts, its state, what is refused."""

import copy
import math
import pickle
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor, nn
from torchrl.objectives import SoftUpdate

from diffrl.diffusion.denoisers import Denoiser
from diffrl.diffusion.exact import MixtureDenoiser
from diffrl.diffusion.schedules.edm import EDM
from diffrl.diffusion.trajectories import sample_chain
from diffrl.objectives import ValueLoss
from tests.kit.networks import Net
from tests.kit.value_loss import (
    PROCESS,
    SD,
    TARGETS,
    N,
    Target,
    data,
    denoiser,
    draw,
    loss_by_hand,
    number,
    perturb,
)

# Layouts


@pytest.mark.parametrize("target", TARGETS)
def test_batch_sizes(target: Target) -> None:
    D = denoiser()
    loss, transitions = ValueLoss(D, **target), draw(window=1)
    flat = loss(transitions[:, 0])
    assert flat.batch_size == torch.Size([])
    assert number(flat["loss_value"]) == number(loss(transitions)["loss_value"])
    chain = draw(x0=data(6), window=3)
    wanted = pytest.approx(number(loss(chain)["loss_value"]), rel=1e-12)
    chain["next", "done"] = chain["next", "terminated"].clone()  # a rollout that just stops has no flag there
    assert number(loss(chain)["loss_value"]) == wanted
    assert number(loss(chain.reshape(2, 3, 3))["loss_value"]) == wanted


def test_entries_as_keywords() -> None:
    D, chain = denoiser(), draw()
    loss = ValueLoss(D, lmbda=0.5)
    names = ["_".join(key) if isinstance(key, tuple) else key for key in loss.in_keys]
    value, td_error = loss(**{name: chain[key] for name, key in zip(names, loss.in_keys, strict=True)})
    wanted = loss(chain)
    torch.testing.assert_close(value, wanted["loss_value"], rtol=1e-11, atol=0)
    torch.testing.assert_close(td_error, wanted["td_error"], rtol=1e-11, atol=0)


def test_renamed_entries() -> None:
    D, chain = denoiser(), draw().exclude("x0")
    chain.rename_key_(("next", "reward"), ("next", "cumulant"))
    for kind in ("td_lambda", "tdlambda"):
        loss = ValueLoss(D).make_value_estimator(kind, lmbda=0.5)
        loss.set_keys(reward="cumulant")
        assert ("next", "cumulant") in loss.in_keys
        wanted = ValueLoss(D, lmbda=0.5)(draw())["loss_value"]
        torch.testing.assert_close(loss(chain)["loss_value"], wanted, rtol=2e-6, atol=0)


# Copies, casts, checkpoints


def trained(loss: ValueLoss, chain: TensorDict) -> float:
    """The value after steps of an optimiser of the loss's parameters and of its target."""
    optimiser = torch.optim.SGD(loss.parameters(), lr=0.01)
    update = SoftUpdate(loss, eps=0.9) if loss.bootstrap == "target" else None
    for _ in range(3):
        optimiser.zero_grad()
        loss(chain)["loss_value"].backward()
        optimiser.step()
        if update is not None:
            update.step()
    return number(loss(chain)["loss_value"])


@pytest.mark.parametrize("bootstrap", ["own", "target", "residual"])
@pytest.mark.parametrize("clone", [copy.deepcopy, lambda loss: pickle.loads(pickle.dumps(loss))])
def test_a_copy_trains_its_own_denoiser(bootstrap: Any, clone: Callable[[ValueLoss], ValueLoss]) -> None:
    loss, chain = ValueLoss(denoiser(), bootstrap=bootstrap, lmbda=0.5), draw()
    twin = clone(loss)
    assert [id(p) for p in twin.parameters()] == [id(p) for p in twin.denoiser.parameters()]
    assert not {id(p) for p in twin.parameters()} & {id(p) for p in loss.parameters()}
    before = [p.clone() for p in loss.parameters()]
    value = trained(twin, chain)
    assert all(map(torch.equal, before, loss.parameters()))
    assert value == trained(loss, chain)


@pytest.mark.parametrize("bootstrap", ["own", "target", "residual"])
def test_a_cast_reaches_the_denoiser_and_its_target(bootstrap: Any) -> None:
    D = denoiser(dtype=torch.float32)
    loss, chain = ValueLoss(D, bootstrap=bootstrap, lmbda=0.5), draw()
    if bootstrap == "target":
        SoftUpdate(loss, eps=0.9)
    D.network.get_buffer("shift").add_(0.1)
    loss.double()
    assert {x.dtype for x in [*D.parameters(), *D.buffers()]} == {torch.float64}
    value = loss(chain)["loss_value"]
    shift = torch.tensor(0.1).double()
    torch.testing.assert_close(D.network.shift, shift.expand(2), rtol=0, atol=0)
    if bootstrap != "target":
        semi = bootstrap == "own"
        by_hand = loss_by_hand(chain, D.network, D.network, target={"lmbda": 0.5}, semi_gradient=semi)
        torch.testing.assert_close(value, by_hand, rtol=1e-12, atol=0)
    assert trained(loss, chain) < number(value)


def test_state_dict() -> None:
    chain = draw()
    loss = ValueLoss(denoiser(), bootstrap="target", lmbda=0.5)
    value = trained(loss, chain)
    torch.manual_seed(7)
    other = ValueLoss(Denoiser(Net().double(), PROCESS, SD), bootstrap="target", lmbda=0.5)
    perturb(other.denoiser)
    SoftUpdate(other, eps=0.9)
    assert number(other(chain)["loss_value"]) != pytest.approx(value)
    other.load_state_dict(loss.state_dict())
    assert number(other(chain)["loss_value"]) == value
    assert [id(p) for p in other.parameters()] == [id(p) for p in other.denoiser.parameters()]


# Errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lmbda": 0.5, "n_steps": 1}, "give one of lmbda, n_steps, lookahead"),
        ({"lmbda": 1.5}, r"lmbda is 1.5, but must lie in \[0, 1\]"),
        ({"lmbda": -0.1}, r"lmbda is -0.1, but must lie in \[0, 1\]"),
        ({"lmbda": math.nan}, "lmbda is nan"),
        ({"n_steps": 0}, "n_steps is 0"),
        ({"n_steps": 1.5}, "n_steps is 1.5"),
        ({"gamma": 1.1}, r"gamma is 1.1, but must lie in \[0, 1\]"),
        ({"weight": "edm2"}, "weight is 'edm2': give one of pairwise, edm"),
        ({"bootstrap": "ema"}, "bootstrap is 'ema': give 'own', 'target' or 'residual'"),
        ({"denoising_coef": -0.5}, "denoising_coef is -0.5"),
        ({"denoising_coef": math.nan}, "denoising_coef is nan"),
    ],
)
def test_wrong_arguments_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        ValueLoss(denoiser(), **options)
    assert "\n" not in str(error.value)


def test_wrong_chains_are_named() -> None:
    D, chain = denoiser(), draw()
    loss = ValueLoss(D)
    integers = chain.clone()
    integers["x_t"] = integers["x_t"].long()
    with pytest.raises(TypeError, match="x_t has dtype torch.int64"):
        loss(integers)
    for key in ("x_t", "t", "A", "kappa", ("next", "A"), ("next", "reward"), ("next", "done")):
        with pytest.raises(KeyError, match=key if isinstance(key, str) else key[1]):
            loss(chain.exclude("x0", key))
    hidden = chain.exclude("x0")
    for added, states in ((0.5, hidden), (0.0, hidden.set("valid", torch.ones(3, N, 1, dtype=torch.bool)))):
        with pytest.raises(KeyError, match="denoising loss needs x0"):
            ValueLoss(D, denoising_coef=added)(states)
    with pytest.raises(NotImplementedError, match="GAE"):
        loss.make_value_estimator("gae")


def test_monte_carlo_guesses_no_tail() -> None:
    D, cut = denoiser(), draw(window=2)
    for gamma, states in ((1.0, cut.exclude("x0")), (0.9, cut)):
        with pytest.raises(ValueError, match="Monte Carlo return of a chain that is cut"):
            ValueLoss(D, gamma=gamma).make_value_estimator("monte_carlo")(states)
    whole = draw()
    for gamma, states in product((1.0, 0.9), (whole, whole.exclude("x0"))):
        value = ValueLoss(D, gamma=gamma).make_value_estimator("monte_carlo")(states)["loss_value"]
        wanted = ValueLoss(D, gamma=gamma, lmbda=1.0)(whole)["loss_value"]
        torch.testing.assert_close(value, wanted, rtol=1e-11, atol=0)


# Training


@pytest.mark.parametrize(("coupling", "shrinks"), [("markov", True), ("shared", False)])
def test_td0_from_own_predictions_finds_the_posterior_mean(coupling: str, shrinks: bool) -> None:
    """Where the coupling is Markov; where states share their noise TD(0) has another fixed point."""
    torch.manual_seed(0)
    means, std = torch.tensor([[-1.0, 0.0], [0.8, 0.6], [0.4, -0.9]]), 0.05
    process, weights = EDM(0.02, 20.0), torch.tensor([0.5, 0.3, 0.2])
    generator = torch.Generator().manual_seed(1)
    exact = MixtureDenoiser(process, means, torch.full((3,), std), weights)

    class Layers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            hidden = [nn.Linear(3, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU()]
            self.layers = nn.Sequential(*hidden, nn.Linear(64, 2))

        def forward(self, x: Tensor, c_noise: Tensor, cond: Tensor | None = None) -> Tensor:
            return self.layers(torch.cat([x, c_noise[:, None]], 1))

    D = Denoiser(Layers(), process, sigma_data=0.8)
    loss = ValueLoss(D)

    def draw(B: int) -> TensorDict:
        x0 = means[torch.multinomial(weights, B, replacement=True, generator=generator)]
        x0 = x0 + std * torch.randn(B, 2, generator=generator)
        return sample_chain(process, x0, num_steps=12, coupling=coupling, generator=generator)

    test = draw(500)
    x_t, t = test["x_t"].flatten(0, 1), test["t"].flatten()

    @torch.no_grad()
    def value_error() -> float:
        """Mean square of D - D* in units of network output, over all noise levels alike."""
        return number(((D(x_t, t) - exact(x_t, t)) / D.scalings(t).c_out[:, None]).square().mean())

    before = value_error()
    optimiser = torch.optim.Adam(D.parameters(), lr=1e-2)
    for _ in range(300):
        optimiser.zero_grad()
        loss(draw(32))["loss_value"].backward()
        optimiser.step()
    assert (value_error() < 0.25 * before) == shrinks


def test_a_locked_chain_is_read_only() -> None:
    D, chain = denoiser(), draw()
    free = ValueLoss(D)(chain.clone())["loss_value"]
    locked = chain.exclude("loss").lock_()
    assert number(ValueLoss(D)(locked)["loss_value"]) == number(free) and "loss" not in locked.keys()
