"""The value loss against a plain denoising step, and against the returns written out one state at a time."""

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
from torchrl.objectives import HardUpdate, SoftUpdate, ValueEstimators
from torchrl.objectives.value import TD0Estimator, TDLambdaEstimator

from diffrl.diffusion.denoisers import Denoiser
from diffrl.diffusion.exact import MixtureDenoiser
from diffrl.diffusion.schedules.base import Schedule
from diffrl.diffusion.schedules.ddpm import DDPM
from diffrl.diffusion.schedules.edm import EDM
from diffrl.diffusion.schedules.flow import Flow
from diffrl.diffusion.schedules.vp import VP
from diffrl.diffusion.trajectories import sample_chain
from diffrl.objectives import ValueLoss
from diffrl.objectives.weights import WEIGHTS, WeightTerms
from diffrl.rl.estimators import TDLambda

N, SD = 7, 0.6
SIGMA_MIN, SIGMA_MAX, RHO = 0.01, 20.0, 5.0
PROCESS = EDM(SIGMA_MIN, SIGMA_MAX, RHO)
Target = dict[str, float | int]
TARGETS: list[Target] = [
    *(Target(lmbda=lmbda) for lmbda in (0.0, 0.5, 1.0)),
    *(Target(n_steps=n) for n in (1, 3, N, N + 5)),
]


class Net(nn.Module):
    """A small network of flattened events, with labels 0..2 where it is told one."""

    def __init__(self, event_shape: tuple[int, ...] = (2,), dropout: float = 0.0) -> None:
        super().__init__()
        D = math.prod(event_shape)
        self.first, self.last = nn.Linear(D + 1, 16), nn.Linear(16, D)
        self.labels, self.dropout = nn.Embedding(3, 16), nn.Dropout(dropout)
        self.register_buffer("shift", torch.zeros(D))

    def forward(self, x: Tensor, c_noise: Tensor, cond: Tensor | None = None) -> Tensor:
        h = self.first(torch.cat([x.flatten(1), c_noise[:, None]], 1))
        if cond is not None:
            h = h + self.labels(cond)
        return (self.last(self.dropout(h).tanh()) + self.shift).view_as(x)


def denoiser(
    process: Schedule = PROCESS,
    prediction_type: Any = "edm",
    event_shape: tuple[int, ...] = (2,),
    dtype: torch.dtype = torch.float64,
    dropout: float = 0.0,
) -> Denoiser:
    torch.manual_seed(0)
    return Denoiser(Net(event_shape, dropout), process, SD, prediction_type).to(dtype)


def data(B: int = 3, event_shape: tuple[int, ...] = (2,), dtype: torch.dtype = torch.float64) -> Tensor:
    return SD * torch.randn(B, *event_shape, generator=torch.Generator().manual_seed(1), dtype=dtype)


def draw(process: Schedule = PROCESS, x0: Tensor | None = None, **options: Any) -> TensorDict:
    x0 = data() if x0 is None else x0
    generator = torch.Generator().manual_seed(2)
    return sample_chain(process, x0, **{"num_steps": N, "generator": generator, **options})


def gradient(loss: Tensor, network: nn.Module) -> Tensor:
    grads = torch.autograd.grad(loss, list(network.parameters()), allow_unused=True, retain_graph=True)
    pairs = zip(grads, network.parameters(), strict=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in pairs])


def number(x: Tensor) -> float:
    return x.detach().item()


def distance(a: Tensor, b: Tensor) -> float:
    """Norm of the difference over the norm."""
    return number((a - b).norm() / b.norm())


def perturb(network: nn.Module) -> None:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in network.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=generator, dtype=p.dtype))


def denoised_by_hand(
    network: nn.Module, x: Tensor, sigma: Tensor | float, cond: Tensor | None = None
) -> Tensor:
    """EDM's preconditioning: x [M, *E], σ a number or [M, 1...]."""
    sigma = torch.as_tensor(sigma, dtype=x.dtype).expand(len(x), *[1] * (x.ndim - 1))
    total = sigma**2 + SD**2
    F_x = network(x / total.sqrt(), sigma.flatten().log() / 4, cond)
    return SD**2 / total * x + sigma * SD / total.sqrt() * F_x


# Monte Carlo is the plain denoising step


@pytest.mark.parametrize("event_shape", [(2,), (1, 3, 4)])
@pytest.mark.parametrize("target", ["lambda", "n_steps", "monte_carlo"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
@pytest.mark.parametrize("coupling", ["markov", "shared", 0.5])
def test_monte_carlo_is_the_edm_step(
    event_shape: tuple[int, ...], target: str, dtype: torch.dtype, tolerance: float, coupling: str | float
) -> None:
    D = denoiser(process=EDM(), event_shape=event_shape, dtype=dtype)
    chain = draw(EDM(), data(8, event_shape, dtype), num_steps=18, coupling=coupling)
    if target == "monte_carlo":
        loss = ValueLoss(D).make_value_estimator("monte_carlo")
    else:
        loss = ValueLoss(D, lmbda=1.0) if target == "lambda" else ValueLoss(D, n_steps=18)
    value = loss(chain)["loss_value"]

    x_t, x0 = chain["x_t"].flatten(0, 1), chain["x0"].flatten(0, 1)
    sigma = chain["t"].flatten().view(-1, *[1] * len(event_shape))
    weight = (sigma**2 + SD**2) / (sigma * SD) ** 2
    plain = (weight * (denoised_by_hand(D.network, x_t, sigma) - x0) ** 2).mean()
    assert abs(number(value) / number(plain) - 1) < tolerance
    assert distance(gradient(value, D), gradient(plain, D)) < tolerance
    assert loss.network_evaluations == 8 * 18


def test_without_a_weight_monte_carlo_has_the_square_of_the_coefficient() -> None:
    D, chain = denoiser(), draw()
    value = ValueLoss(D, lmbda=1.0, weight="none")(chain)["loss_value"]
    sigma = chain["t"]
    A = 1 - (chain["next", "t"] / sigma) ** 2
    x_t, x0 = chain["x_t"].flatten(0, 1), chain["x0"].flatten(0, 1)
    error = (denoised_by_hand(D.network, x_t, sigma.reshape(-1, 1)) - x0).view_as(chain["x0"])
    plain = (A**2 * error**2).mean()
    assert distance(gradient(value, D), gradient(plain, D)) < 1e-12


@pytest.mark.parametrize(
    ("process", "prediction_type"),
    [
        (DDPM(), "eps"),
        (DDPM(kind="cosine"), "v"),
        (DDPM(), "x0"),
        (VP(), "v"),
        (VP(), "velocity"),
        (Flow(), "velocity"),
        (EDM(sigma_min=0.05), "score"),
    ],
)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.float64, 1e-12)])
def test_monte_carlo_is_the_plain_loss_of_what_the_network_predicts(
    process: Schedule, prediction_type: str, dtype: torch.dtype, tolerance: float
) -> None:
    D = denoiser(process, prediction_type, dtype=dtype)
    noise = torch.randn(8, 12, 2, generator=torch.Generator().manual_seed(5), dtype=dtype)
    chain = draw(process, data(8, dtype=dtype), num_steps=12, coupling="shared", noise=noise)
    value = ValueLoss(D, lmbda=1.0)(chain)["loss_value"]

    t, x0, x_t = chain["t"].double(), chain["x0"], chain["x_t"]
    eps = noise[:, :1].expand_as(x_t)
    if isinstance(process, DDPM):
        table = process.alphas_cumprod[t.long()]
        alpha, sigma = table.sqrt(), (1 - table).sqrt()
    elif isinstance(process, VP):
        alpha = (-0.5 * (0.1 * t + 0.5 * 19.9 * t**2)).exp()
        sigma = (1 - alpha**2).sqrt()
    else:
        alpha, sigma = (1 - t, t) if isinstance(process, Flow) else (torch.ones_like(t), t)
    c_noise = t if isinstance(process, Flow) else (sigma / alpha).log() / 4
    c_in = 1 / (sigma**2 + alpha**2 * SD**2).sqrt()
    if isinstance(process, VP):
        alpha_dot = -0.5 * (0.1 + 19.9 * t) * alpha
        velocity = alpha_dot * x0 - alpha * alpha_dot / sigma * eps
    else:
        velocity = eps - x0
    wanted = {
        "eps": eps,
        "x0": x0,
        "score": -eps / sigma,
        "v": alpha * eps - sigma * x0,
        "velocity": velocity,
    }[prediction_type]
    F_x = D.network((c_in.to(dtype) * x_t).flatten(0, 1), c_noise.to(dtype).flatten()).view_as(x_t)
    plain = ((F_x - wanted.to(dtype)) ** 2).mean()
    assert distance(gradient(value, D), gradient(plain, D)) < tolerance


# Every target, one state at a time


def level(index: float) -> float:
    """σ of the ρ-grid, 0 past its end."""
    if index > N - 1:
        return 0.0
    high, low = SIGMA_MAX ** (1 / RHO), SIGMA_MIN ** (1 / RHO)
    return (high + index / (N - 1) * (low - high)) ** RHO


def value_coefficients(index: float, stride: float, eta: float, value: str) -> tuple[float, float]:
    """A and κ by the textbook form of the posterior."""
    t, s = level(index), level(index + stride)
    if t == 0:
        return 0.0, 0.0
    if value == "clean" or s == 0:
        return 1.0, 0.0
    posterior_variance = (t**2 - s**2) * s**2 / t**2
    kappa = math.sqrt(s**2 - eta**2 * posterior_variance) / t
    return 1 - kappa, kappa


def loss_by_hand(
    chain: TensorDict,
    online: nn.Module,
    bootstrap: nn.Module,
    *,
    target: Target,
    gamma: float = 1.0,
    eta: float = 1.0,
    span: int = 1,
    stride: float = 1.0,
    value: str = "posterior_mean",
    semi_gradient: bool = True,
    weight: Callable[[float, float, float, float], float] | None = None,
) -> Tensor:
    """Closed forms where γ = 1, the recursion elsewhere; reads x0, the states and their index."""
    B, T = chain.shape
    total = torch.zeros((), dtype=torch.float64)
    for b in range(B):
        x0 = chain["x0"][b, 0]
        cond = chain["cond"][b, :1] if "cond" in chain.keys() else None
        states = [*chain["x_t"][b], chain["next", "x_t"][b, -1]]
        first = int(chain["index"][b, 0])
        places = [span * (first + j) for j in range(T + 1)]
        sigmas = [level(i) for i in places]
        AK = [value_coefficients(i, stride, eta, value) for i in places]
        mu = [A * x0 + k * x for (A, k), x in zip(AK, states, strict=True)]
        D_next, e, V = [], [], []
        for x, sigma, (A, k) in zip(states, sigmas, AK, strict=True):
            D = torch.zeros_like(x0) if sigma == 0 else denoised_by_hand(bootstrap, x[None], sigma, cond)[0]
            D = D.detach() if semi_gradient else D
            D_next.append(D)
            e.append(A * (x0 - D))
            V.append(A * D + k * x)
        for j in range(T):
            rest = T - j
            if gamma == 1 and "n_steps" in target:
                G = mu[j] - e[min(j + int(target["n_steps"]), T)]
            elif gamma == 1:
                lmbda = target["lmbda"]
                G = mu[j] - lmbda ** (rest - 1) * e[T]
                for n in range(1, rest):
                    G = G - (1 - lmbda) * lmbda ** (n - 1) * e[j + n]
            elif "n_steps" in target:
                n = min(int(target["n_steps"]), rest)
                G = gamma**n * V[j + n]
                for m in range(n):
                    G = G + gamma**m * (mu[j + m] - mu[j + m + 1])
            else:
                lmbda, G = target["lmbda"], V[T]
                for m in reversed(range(j, T)):
                    G = mu[m] - mu[m + 1] + gamma * ((1 - lmbda) * V[m + 1] + lmbda * G)
            (A, k), (A_next, _) = AK[j], AK[j + 1]
            sigma, sigma_next = sigmas[j], sigmas[j + 1]
            delta = G - A * denoised_by_hand(online, states[j][None], sigma, cond)[0] - k * states[j]
            c_out, c_next = (s * SD / math.sqrt(s**2 + SD**2) for s in (sigma, sigma_next))
            w = 1 / max(A**2 * c_out**2, 1e-8) if weight is None else weight(A, A_next, c_out, c_next)
            total = total + w * (delta**2).mean() / (B * T)
    return total


def check(loss: ValueLoss, chain: TensorDict, by_hand: Tensor) -> None:
    value = loss(chain)["loss_value"]
    torch.testing.assert_close(value, by_hand, rtol=1e-12, atol=0)
    assert distance(gradient(value, loss.denoiser), gradient(by_hand, loss.denoiser)) < 1e-11


@pytest.mark.parametrize("window", [None, 1, 2])
@pytest.mark.parametrize(("span", "stride"), [(1, 1.0), (1, 0.5), (3, 1.25)])
@pytest.mark.parametrize("value", ["posterior_mean", "clean"])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_targets_are_the_closed_forms(
    eta: float, value: str, span: int, stride: float, window: int | None
) -> None:
    spec: dict[str, Any] = {"span": span, "stride": stride, "value": value}
    D = denoiser()
    chain = draw(x0=data(2), coupling=eta, window=window, **spec)
    hidden = chain.exclude("x0")
    for target, gamma in product(TARGETS, (0.0, 0.9, 1.0)):
        loss = ValueLoss(D, gamma=gamma, **target)
        options = {"target": target, "gamma": gamma, "eta": eta, **spec}
        check(loss, chain, loss_by_hand(chain, D.network, D.network, **options))
        seen, unseen = (loss(c) for c in (chain, hidden))
        for name in ("loss_value", "td_error"):
            torch.testing.assert_close(seen[name], unseen[name], rtol=1e-11, atol=0)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("num_steps", "B"), [(1, 3), (N, 1), (1, 1)])
def test_short_chains_and_single_data(target: Target, num_steps: int, B: int) -> None:
    D = denoiser()
    whole = draw(x0=data(B))
    chain = whole[:, -num_steps:]
    check(ValueLoss(D, **target), chain, loss_by_hand(chain, D.network, D.network, target=target))


def test_one_level_is_standard_denoising() -> None:
    D, chain = denoiser(), draw(num_steps=1)
    values = [ValueLoss(D, **target)(chain)["loss_value"] for target in TARGETS]
    for value in values[1:]:
        torch.testing.assert_close(value, values[0])


def test_lambda_may_depend_on_the_step() -> None:
    D, chain = denoiser(), draw(x0=data(2), num_steps=4)
    lmbda = torch.tensor([0.3, 0.0, 1.0, 0.7], dtype=torch.float64).view(1, 4, 1)
    value = ValueLoss(D).make_value_estimator("td_lambda", lmbda=lmbda)(chain)["loss_value"]
    A = torch.cat([chain["A"], chain["next", "A"][:, -1:]], 1)
    x = torch.cat([chain["x_t"], chain["next", "x_t"][:, -1:]], 1)
    D_x = D(x[:, :-1].flatten(0, 1), chain["t"].flatten()).view_as(chain["x_t"])
    e = A[:, :-1] * (chain["x0"] - D_x)
    ahead = torch.zeros_like(e[:, 0])
    deltas = []
    for k in reversed(range(4)):
        if k < 3:
            ahead = (1 - lmbda[0, k]) * e[:, k + 1].detach() + lmbda[0, k] * ahead
        deltas.append(e[:, k] - ahead)
    c_out = chain["t"] * SD / (chain["t"] ** 2 + SD**2).sqrt()
    delta = torch.stack(deltas[::-1], 1)
    torch.testing.assert_close(value, ((delta / (chain["A"] * c_out)) ** 2).mean(), rtol=1e-12, atol=0)


def test_td_error_is_the_root_mean_square() -> None:
    D, chain = denoiser(), draw()
    result = ValueLoss(D, weight="none", lmbda=0.5)(chain)
    assert number(result["td_error"]) == pytest.approx(math.sqrt(number(result["loss_value"])), rel=1e-12)
    assert not result["td_error"].requires_grad


# What the target bootstraps from


@pytest.mark.parametrize("window", [None, 2])
@pytest.mark.parametrize("gamma", [1.0, 0.9])
@pytest.mark.parametrize("target", TARGETS)
def test_residual_gradient_passes_both_ends(target: Target, gamma: float, window: int | None) -> None:
    D, chain = denoiser(), draw(x0=data(2), window=window)
    by_hand = loss_by_hand(chain, D.network, D.network, target=target, gamma=gamma, semi_gradient=False)
    for states in (chain, chain.exclude("x0")):
        loss = ValueLoss(D, bootstrap="residual", gamma=gamma, **target)
        value = loss(states)["loss_value"]
        torch.testing.assert_close(value, by_hand, rtol=1e-11, atol=0)
        assert distance(gradient(value, D), gradient(by_hand, D)) < 1e-10


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
    ways = [ValueLoss(D, lmbda=0.9), ValueLoss(D), ValueLoss(D, n_steps=1).make_value_estimator()]
    assert len({number(loss(chain)["loss_value"]) for loss in ways}) == 1, "the default is λ = 0.9"


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
        ({"lmbda": 0.5, "n_steps": 1}, "give lmbda or n_steps, not both"),
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
