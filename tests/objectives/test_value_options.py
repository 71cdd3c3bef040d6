"""What a value loss may be given: a target network, labels, estimators, weights, packed chains."""

import copy
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor
from torchrl.objectives import HardUpdate, SoftUpdate, ValueEstimators
from torchrl.objectives.value import TD0Estimator, TDLambdaEstimator

from diffrl.objectives import ValueLoss
from diffrl.objectives.weights import WEIGHTS, WeightTerms
from diffrl.rl.estimators import TDLambda
from tests.kit.value_loss import (
    SD,
    TARGETS,
    N,
    Target,
    check,
    data,
    denoised_by_hand,
    denoiser,
    distance,
    draw,
    gradient,
    loss_by_hand,
    number,
    perturb,
)

# What the target bootstraps from


@pytest.mark.parametrize("window", [None, 2])
@pytest.mark.parametrize("target", TARGETS)
def test_target_network_stays_until_it_is_moved(target: Target, window: int | None) -> None:
    D, chain = denoiser(), draw(x0=data(2), window=window)
    before = copy.deepcopy(D.network)
    loss = ValueLoss(D, bootstrap="target", **target)
    update = SoftUpdate(loss, eps=0.9)
    perturb(D)
    check(loss, chain, loss_by_hand(chain, D.network, before, target=target))
    update.step()
    moved = copy.deepcopy(before)
    with torch.no_grad():
        for new, old, p in zip(moved.parameters(), before.parameters(), D.parameters(), strict=True):
            new.copy_(0.9 * old + 0.1 * p)
    check(loss, chain, loss_by_hand(chain, D.network, moved, target=target))
    assert all(p.grad is None for p in loss.target_value_network_params.values(True, True))


def test_tau_and_hard_updates() -> None:
    D, chain, target = denoiser(), draw(), {"n_steps": 1}
    loss = ValueLoss(D, bootstrap="target", n_steps=1)
    soft = SoftUpdate(loss, tau=0.25)
    old = copy.deepcopy(D.network)
    perturb(D)
    soft.step()
    with torch.no_grad():
        for p, q in zip(old.parameters(), D.parameters(), strict=True):
            p.mul_(0.75).add_(q, alpha=0.25)
    check(loss, chain, loss_by_hand(chain, D.network, old, target=target))

    hard = HardUpdate(loss, value_network_update_interval=2)
    perturb(D)
    stale = number(loss(chain)["loss_value"])
    fresh = number(ValueLoss(D, n_steps=1)(chain)["loss_value"])
    assert stale != pytest.approx(fresh)
    values = []
    for _ in range(3):
        hard.step()
        values.append(number(loss(chain)["loss_value"]))
    assert values == [stale, stale, pytest.approx(fresh, rel=1e-12)]


def test_optimiser_moves_the_online_network_only() -> None:
    D, chain = denoiser(), draw()
    loss = ValueLoss(D, bootstrap="target")
    SoftUpdate(loss, eps=0.9)
    target = [p.clone() for p in loss.target_value_network_params.values(True, True)]
    online = [p.clone() for p in D.parameters()]
    optimiser = torch.optim.SGD(loss.parameters(), lr=0.1)
    loss(chain)["loss_value"].backward()
    optimiser.step()
    pairs = zip(online, D.network.first.parameters(), strict=False)
    assert not any(torch.equal(p, q) for p, q in pairs)
    assert all(map(torch.equal, target, loss.target_value_network_params.values(True, True)))


def test_network_evaluations() -> None:
    def evaluations(window: int | None = None, monte_carlo: bool = False, **options: Any) -> int:
        loss = ValueLoss(denoiser(), **options)
        if loss.bootstrap == "target":
            SoftUpdate(loss, eps=0.9)
        if monte_carlo:
            loss.make_value_estimator("monte_carlo")
        loss(draw(window=window))
        return loss.network_evaluations

    B = 3
    for target in TARGETS:
        assert evaluations(**target) == B * N
        assert evaluations(window=2, **target) == B * 2 + cut_rows(2)
        assert evaluations(bootstrap="residual", **target) == B * N
        bootstraps = target.get("lmbda", 0) < 1 and target.get("n_steps", 1) < N
        assert evaluations(bootstrap="target", **target) == B * N + bootstraps * B * (N - 1)
    assert evaluations(window=1) == B + cut_rows(1)
    for bootstrap, window in product(("own", "target", "residual"), (None, 1, 2)):
        assert evaluations(window, monte_carlo=True, bootstrap=bootstrap) == B * (window or N)


def cut_rows(window: int) -> int:
    """How many of the drawn windows end before the clean state."""
    return int((~draw(window=window)["next", "terminated"][:, -1]).sum())


def test_a_target_network_does_not_drop_units_and_the_online_one_does() -> None:
    D, chain = denoiser(dropout=0.5), draw(window=2)
    loss = ValueLoss(D, bootstrap="target", n_steps=1)
    SoftUpdate(loss, eps=0.9)
    assert D.training, "building a loss leaves the mode alone"
    seen = []
    D.register_forward_hook(lambda module, args, out: seen.append(module.training))
    still = copy.deepcopy(D.network).eval()
    torch.manual_seed(0)
    value = loss(chain)["loss_value"]
    assert seen == [True]
    torch.manual_seed(0)
    D_x = D(chain["x_t"].flatten(0, 1), chain["t"].flatten()).view_as(chain["x_t"])
    reached = chain["next"]
    alive = ~reached["terminated"]
    sigma = reached["t"].where(alive, 1.0).view(-1, 1)
    D_next = denoised_by_hand(still, reached["x_t"].flatten(0, 1), sigma).view_as(D_x)
    delta = chain["A"] * (chain["x0"] - D_x) - reached["A"] * (chain["x0"] - D_next)
    c_out = chain["t"] * SD / (chain["t"] ** 2 + SD**2).sqrt()
    torch.testing.assert_close(value, ((delta / (chain["A"] * c_out)) ** 2).mean(), rtol=1e-12, atol=0)

    loss.eval()
    assert not any(module.training for module in (D, D.network.dropout))
    assert number(loss(chain)["loss_value"]) == number(loss(chain)["loss_value"])
    assert loss.train().denoiser.training and not seen[-1]


def test_labels_reach_every_evaluation() -> None:
    cond = torch.tensor([0, 2])
    for window, target in product((None, 2), TARGETS):
        D, chain = denoiser(), draw(x0=data(2), window=window, cond=cond)
        by_hand = loss_by_hand(chain, D.network, D.network, target=target)
        check(ValueLoss(D, **target), chain, by_hand)
        loss = ValueLoss(D, bootstrap="target", **target)
        SoftUpdate(loss, eps=0.9)
        check(loss, chain, by_hand)
        with torch.no_grad():
            plain = loss_by_hand(chain.exclude("cond"), D.network, D.network, target=target)
        assert abs(number(by_hand / plain) - 1) > 1e-3


# TorchRL's estimators


@pytest.mark.parametrize("bootstrap", ["own", "target", "residual"])
@pytest.mark.parametrize("window", [None, 2])
@pytest.mark.parametrize("event_shape", [(2,), (1, 2, 3)])
def test_estimators_of_torchrl(bootstrap: Any, window: int | None, event_shape: tuple[int, ...]) -> None:
    D, cond = denoiser(event_shape=event_shape), torch.tensor([1, 0, 2])
    chain = draw(x0=data(event_shape=event_shape), window=window, cond=cond)

    def loss(gamma: float = 0.5, **options: Any) -> ValueLoss:
        made = ValueLoss(D, bootstrap=bootstrap, gamma=gamma, **options)
        if bootstrap == "target":
            SoftUpdate(made, eps=0.9)
        return made

    def agree(theirs: ValueLoss, ours: ValueLoss, tolerance: float = 1e-11) -> None:
        values = [made(chain)["loss_value"] for made in (theirs, ours)]
        torch.testing.assert_close(*values, rtol=tolerance, atol=0)
        assert distance(*(gradient(value, D) for value in values)) < 10 * tolerance

    agree(loss().make_value_estimator("td0"), loss(n_steps=1))
    agree(loss().make_value_estimator(ValueEstimators.TD0), loss(lmbda=0.0))
    agree(loss().make_value_estimator("td1"), loss(lmbda=1.0), 1e-6)
    for lmbda in (0.25, 1.0):
        loop = loss().make_value_estimator(ValueEstimators.TDLambda, lmbda=lmbda, vectorized=False)
        agree(loop, loss(lmbda=lmbda))
        agree(loss().make_value_estimator("tdlambda", lmbda=lmbda), loss(lmbda=lmbda), 2e-6)
    options = {"gamma": 0.5, "value_network": loss().value_network}
    agree(loss().make_value_estimator(TDLambda(lmbda=0.25, **options)), loss(lmbda=0.25))
    options["differentiable"] = bootstrap == "residual"
    agree(loss().make_value_estimator(TD0Estimator, **options), loss(n_steps=1))
    instance = TDLambdaEstimator(lmbda=0.25, vectorized=False, **options)
    agree(loss().make_value_estimator(instance), loss(lmbda=0.25))


def test_estimators_of_torchrl_evaluate_nothing_again() -> None:
    loss = ValueLoss(denoiser()).make_value_estimator("td0")
    loss(draw())
    assert loss.network_evaluations == 3 * N


def test_gamma_is_the_losss_unless_an_estimator_is_given_its_own() -> None:
    D, chain = denoiser(), draw()
    values = [
        number(loss(chain)["loss_value"])
        for loss in (
            ValueLoss(D, gamma=0.5, lmbda=0.5),
            ValueLoss(D, gamma=0.5).make_value_estimator("td_lambda", lmbda=0.5),
            ValueLoss(D).make_value_estimator("td_lambda", lmbda=0.5, gamma=0.5),
            ValueLoss(D, lmbda=0.5),
        )
    ]
    assert values[0] == values[1] == values[2] != values[3]
    longer = draw(num_steps=16)
    ways = [ValueLoss(D, lookahead=0.125), ValueLoss(D), ValueLoss(D, n_steps=1).make_value_estimator()]
    found = {number(loss(longer)["loss_value"]) for loss in ways}
    assert [*found] == [pytest.approx(number(ValueLoss(D, lmbda=0.5)(longer)["loss_value"]), rel=1e-12)]


# Weights, the added denoising loss

FORMULAS: dict[str, Callable[[float, float, float, float], float]] = {
    "pairwise": lambda A, B, c, d: 1 / (A * A * c * c + B * B * d * d),
    "edm": lambda A, B, c, d: 1 / max(A * A * c * c, 1e-8),
    "sum_sq": lambda A, B, c, d: 1 / max(A * A + B * B, 0.01),
    "sum": lambda A, B, c, d: 1 / max(A + B, 0.01),
    "none": lambda A, B, c, d: 1.0,
}


@pytest.mark.parametrize("weight", list(FORMULAS))
@pytest.mark.parametrize("window", [None, 1])
@pytest.mark.parametrize("stride", [1.0, 0.01])
def test_weights(weight: str, window: int | None, stride: float) -> None:
    D, chain = denoiser(), draw(window=window, stride=stride)
    by_hand = loss_by_hand(
        chain, D.network, D.network, target={"n_steps": 1}, stride=stride, weight=FORMULAS[weight]
    )
    value = ValueLoss(D, n_steps=1, weight=weight)(chain)["loss_value"]
    torch.testing.assert_close(value, by_hand, rtol=1e-11, atol=0)


@pytest.mark.parametrize("weight", list(FORMULAS))
def test_weight_functions(weight: str) -> None:
    generator = torch.Generator().manual_seed(0)
    A, B, c, d = (torch.rand(4, 100, 1, generator=generator, dtype=torch.float64) ** 6).unbind()

    def w(*terms: Tensor) -> Tensor:
        given = dict(zip(("A", "A_next", "c_out", "c_out_next"), terms, strict=True))
        rest = dict.fromkeys(WeightTerms._fields, torch.ones_like(A))
        return WEIGHTS[weight](WeightTerms(**{**rest, **given}))

    rows = torch.cat([A, B, c, d], 1).tolist()
    wanted = torch.tensor([FORMULAS[weight](*row) for row in rows], dtype=torch.float64)
    torch.testing.assert_close(w(A, B, c, d)[:, 0], wanted, rtol=1e-14, atol=0)
    if weight != "edm":  # both ends of a pair count alike
        assert torch.equal(w(A, B, c, d), w(B, A, d, c))
    floors = {"edm": 1e8, "sum_sq": 100.0, "sum": 100.0}
    if weight in floors:
        tiny = torch.full_like(A, 1e-5)
        assert number(w(tiny, tiny, tiny, tiny)[0]) == pytest.approx(floors[weight])


@pytest.mark.parametrize("bootstrap", ["own", "residual"])
def test_added_denoising_loss_and_validity(bootstrap: Any) -> None:
    D, chain, c = denoiser(), draw(), 0.7
    td = ValueLoss(D, lmbda=0.5, bootstrap=bootstrap)
    both = ValueLoss(D, lmbda=0.5, bootstrap=bootstrap, denoising_coef=c)
    x_t, sigma = chain["x_t"].flatten(0, 1), chain["t"].reshape(-1, 1)
    error = (denoised_by_hand(D.network, x_t, sigma) - chain["x0"].flatten(0, 1)) ** 2
    L_den = ((sigma**2 + SD**2) / (sigma * SD) ** 2 * error).mean(1)
    by_hand = td(chain)["loss_value"] + c * L_den.mean()
    value = both(chain)["loss_value"]
    torch.testing.assert_close(value, by_hand, rtol=1e-12, atol=0)
    assert distance(gradient(value, D), gradient(by_hand, D)) < 1e-12

    valid = torch.rand(3, N, 1, generator=torch.Generator().manual_seed(0)) < 0.5
    each = torch.stack([torch.stack([td_part(td, chain, b, k) for k in range(N)]) for b in range(3)])
    L_den = L_den.view(3, N)
    mixed = torch.where(valid[..., 0], each + c * L_den, (1 + c) * L_den).mean()
    chain["valid"] = valid
    torch.testing.assert_close(both(chain)["loss_value"], mixed, rtol=1e-11, atol=0)
    plain = torch.where(valid[..., 0], each, L_den).mean()
    torch.testing.assert_close(td(chain)["loss_value"], plain, rtol=1e-11, atol=0)
    chain["valid"] = torch.zeros_like(valid)
    torch.testing.assert_close(both(chain)["loss_value"], (1 + c) * L_den.mean(), rtol=1e-12, atol=0)


def td_part(loss: ValueLoss, chain: TensorDict, b: int, k: int) -> Tensor:
    """The loss of one state: that of the chain from there on, less that of the rest."""
    tails = [chain[b : b + 1, j:] for j in (k, k + 1)]
    sums = [loss(tail)["loss_value"] * tail.shape[1] if tail.shape[1] else 0.0 for tail in tails]
    return torch.as_tensor(sums[0] - sums[1])


# Layouts


@pytest.mark.parametrize("hidden", [False, True])
@pytest.mark.parametrize("bootstrap", ["own", "target", "residual"])
@pytest.mark.parametrize("target", TARGETS)
def test_chains_packed_in_a_row_are_chains_apart(target: Target, bootstrap: Any, hidden: bool) -> None:
    D, cond = denoiser(), torch.tensor([0, 1, 2])
    whole, short = draw(cond=cond), draw(num_steps=4, cond=cond.flip(0))
    cut = short[:, :2].clone()  # as a collector's time limit cuts it
    cut["next", "done"][:, -1] = cut["next", "truncated"][:, -1] = True
    parts = [cut, whole, short, whole[:, :3]]  # the last is cut by the end of the row, with no flag
    packed = torch.cat([part.exclude("x0") if hidden else part for part in parts], 1)
    loss = ValueLoss(D, bootstrap=bootstrap, **target)
    if bootstrap == "target":
        SoftUpdate(loss, eps=0.9)
        perturb(D)
    apart = sum(loss(part)["loss_value"] * part.shape[1] for part in parts) / packed.shape[1]
    value = loss(packed)["loss_value"]
    torch.testing.assert_close(value, apart, rtol=1e-10, atol=0)
    assert distance(gradient(value, D), gradient(apart, D)) < 1e-9


def test_monte_carlo_of_packed_and_cut_chains_is_still_denoising() -> None:
    D = denoiser()
    loss = ValueLoss(D).make_value_estimator("monte_carlo")
    chains = torch.cat([draw()[:, :3], draw(num_steps=4)], 1)
    states = torch.cat([draw()[:, :3].flatten(), draw(num_steps=4).flatten()])
    values = [loss(chains)["loss_value"], loss(states)["loss_value"]]
    torch.testing.assert_close(*values, rtol=1e-12, atol=0)
    assert loss.network_evaluations == 2 * 3 * 7
