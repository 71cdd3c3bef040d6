"""TD(λ) for maps against a plain loop, the one-time value at r = 0, and closed forms of normal data."""

from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor, nn

from diffrl.diffusion.chains import Chain
from diffrl.diffusion.denoisers import Denoiser
from diffrl.diffusion.schedules.base import Schedule
from diffrl.diffusion.schedules.edm import EDM
from diffrl.diffusion.schedules.flow import Flow
from diffrl.diffusion.schedules.vp import VP
from diffrl.diffusion.trajectories import ChainSampler, sample_chain
from diffrl.errors import InputError
from diffrl.objectives.maps.shortcut import ShortcutLoss
from diffrl.objectives.maps.td_map import MapChains, TDMapLoss
from diffrl.objectives.soft_update import SoftUpdate
from diffrl.objectives.value import ValueLoss
from tests.kit.maps import PROCESSES, average_velocity, gradient, two_times

every_straight = pytest.mark.parametrize("process", PROCESSES, ids=["flow", "edm"])
every_coupling = pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
STEPS = 6


def chains(process: Schedule, m: list[int], eta: float = 0.5, num_steps: int = STEPS) -> TensorDict:
    """One chain for each m, with r the time of its state m, or r = t where m is 0."""
    x0 = torch.randn(len(m), 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    noise = torch.Generator().manual_seed(2)
    chain = sample_chain(process, x0, num_steps=num_steps, coupling=eta, generator=noise)
    return with_ends(chain, m)


def with_ends(chain: TensorDict, m: list[int]) -> TensorDict:
    r, valid = chain["t"].clone(), torch.ones_like(chain["t"], dtype=torch.bool)
    for k, end in enumerate(m):
        if end > 0:
            r[k, :end] = chain["next", "t"][k, end - 1]
            valid[k, end:] = False
    chain["r"], chain["valid"] = r, valid
    return chain


def td_map(denoiser: Any, **options: Any) -> TDMapLoss:
    """The loss, with what moves its target network, where it has one."""
    loss = TDMapLoss(denoiser, **options)
    if loss.bootstrap == "target":
        SoftUpdate(loss, eps=loss.target_decay)
    return loss


def plain_loss(denoiser: Denoiser, chain: TensorDict, lmbda: float) -> Tensor:
    """By the formulas, with the sum of the λ-return written out and every state evaluated alone."""

    def u(k: int, i: int, r: Tensor) -> Tensor:
        return average_velocity(denoiser, chain["x_t"][k, i][None], chain["t"][k, i], r)[0]

    total = torch.zeros((), dtype=torch.float64)
    B, K = chain.batch_size
    for k in range(B):
        for i in range(K):
            x, t, r = (chain[key][k, i] for key in ("x_t", "t", "r"))
            if not chain["valid"][k, i]:
                continue
            if r == t:
                y = (x - chain["x0"][k, i]) / t
            else:
                times = [*chain["t"][k, :, 0].tolist(), 0.0]
                m = times.index(float(r))
                G = lmbda ** (m - i - 1) * chain["next", "x_t"][k, m - 1]
                for n in range(1, m - i):
                    x_n, t_n = chain["x_t"][k, i + n], chain["t"][k, i + n]
                    X = x_n - (t_n - r) * u(k, i + n, r).detach()
                    G = G + (1 - lmbda) * lmbda ** (n - 1) * X
                y = (x - G) / (t - r)
            w = (t / denoiser.scalings(t).c_out) ** 2
            total = total + (w * (u(k, i, r) - y) ** 2).mean()
    return total / (B * K)


@every_straight
@pytest.mark.parametrize("lmbda", [0.0, 0.3, 1.0])
def test_the_loss_by_a_plain_loop(process: Schedule, lmbda: float) -> None:
    """r at both ends, the next level and clean data, and r = t."""
    denoiser, chain = two_times(process), chains(process, [1, 3, STEPS, 0])
    expected = plain_loss(denoiser, chain, lmbda)
    assert chain["r"].min() == 0
    for bootstrap in ("own", "target"):
        loss = td_map(denoiser, lmbda=lmbda, bootstrap=bootstrap)(chain)["loss_value"]
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(gradient(loss, denoiser), gradient(expected, denoiser))
        expected = plain_loss(denoiser, chain, lmbda)


@every_straight
def test_a_chain_of_one_step_is_regression_on_its_datum(process: Schedule) -> None:
    denoiser, chain = two_times(process), chains(process, [1, 1], num_steps=1)
    x, t, x0 = chain["x_t"][:, 0], chain["t"][:, 0, 0], chain["x0"][:, 0]
    D_x = denoiser(x, t, None, torch.zeros_like(t))
    expected = ((D_x - x0) / denoiser.scalings(t).c_out[:, None]).square().mean()
    for lmbda in (0.0, 1.0):
        loss = td_map(denoiser, lmbda=lmbda)(chain)["loss_value"]
        torch.testing.assert_close(loss, expected)


@every_straight
def test_at_r_of_t_it_is_flow_matching(process: Schedule) -> None:
    denoiser, chain = two_times(process), chains(process, [0, 0])
    rows = chain.flatten(0, 1).unsqueeze(1)
    rows["v"] = (rows["x_t"] - rows["x0"]) / rows["t"]
    expected = ShortcutLoss(denoiser, bootstrap="own")(rows)["loss_value"]
    found = td_map(denoiser, map_weight="u")(chain.exclude("valid"))["loss_value"]
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradient(found, denoiser), gradient(expected, denoiser))


class ToClean(nn.Module):
    """D(x, t, 0): a denoiser of one time."""

    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__()
        self.denoiser, self.process, self.scalings = denoiser, denoiser.process, denoiser.scalings

    def forward(self, x: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
        D_x: Tensor = self.denoiser(x, t, cond, torch.zeros_like(t))
        return D_x


@every_straight
@every_coupling
@pytest.mark.parametrize("lmbda", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("bootstrap", ["own", "target"])
def test_at_clean_r_it_is_td_on_the_clean_value(
    process: Schedule, eta: float, lmbda: float, bootstrap: Any
) -> None:
    denoiser = two_times(process)
    chain = chains(process, [STEPS] * 4, eta)
    value = chain.exclude("r", "valid")
    for part in (value, value["next"]):  # as value="clean" has it: A = 1, κ = 0, which pays nothing
        part["A"], part["kappa"] = torch.ones_like(part["A"]), torch.zeros_like(part["A"])
    value["next", "A"][:, -1] = 0
    value["next", "reward"] = torch.zeros_like(value["x_t"])
    one_time: Any = ToClean(denoiser)
    for map_weight, weight in [("edm", "edm")] + ([("u", "eps")] if isinstance(process, EDM) else []):
        one = ValueLoss(one_time, lmbda=lmbda, bootstrap=bootstrap, weight=weight)
        two = td_map(denoiser, lmbda=lmbda, bootstrap=bootstrap, map_weight=map_weight)
        if bootstrap == "target":
            SoftUpdate(one, eps=0.5)
        expected, found = (loss(chain)["loss_value"] for loss, chain in ((one, value), (two, chain)))
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(gradient(found, denoiser), gradient(expected, denoiser))


# N(0, 1) data: maps are X = c x, and the solution for c follows level by level


def covariances(chain: Chain) -> Tensor:
    """Cov(x_i, x_j) of the states of N(0, 1) data, the clean one last, by the posterior's steps."""
    (A, kappa, _), (alpha, sigma) = chain.step_coefficients, chain.scales
    S = (alpha**2 + sigma**2).diag()
    for j in range(1, len(alpha)):
        S[:j, j] = S[j, :j] = A[j - 1] * alpha[:j] + kappa[j - 1] * S[:j, j - 1]
    return S


def solution(chain: Chain, m: int, lmbda: float) -> Tensor:
    """c of X_{t_i→t_m}(x_i) = c_i x_i at which the mean of x_i (G_i - c_i x_i) is 0, for i < m; 1 at m."""
    S, c = covariances(chain), torch.ones(m + 1, dtype=torch.float64)
    for i in reversed(range(m)):
        weights = (1 - lmbda) * lmbda ** torch.arange(m - i - 1)  # of n = 1, ..., m-i-1
        bootstrapped = (weights * c[i + 1 : m] * S[i, i + 1 : m]).sum()
        c[i] = (bootstrapped + lmbda ** (m - i - 1) * S[i, m]) / S[i, i]
    return c


class Table(nn.Module):
    """The denoiser of two times of maps X = c x, with a number c for each pair of levels."""

    second_time = True

    def __init__(self, chain: Chain, c: Tensor) -> None:
        super().__init__()
        self.process, self.levels, self.c = chain.process, chain.t.flip(0), nn.Parameter(c)

    def _place(self, t: Tensor) -> Tensor:
        return len(self.levels) - 1 - torch.searchsorted(self.levels, t - 1e-12)

    def forward(self, x: Tensor, t: Tensor, cond: Tensor | None, r: Tensor) -> Tensor:
        u = (1 - self.c[self._place(t), self._place(r)]) / (t - r)
        return x * (1 - t * u)[:, None]


def balanced(chain: Chain) -> TensorDict:
    """Chains of 1-D data whose second moments are those of their law exactly, with every m for each of them."""
    K = chain.num_transitions
    z = torch.randn(2 * K, K + 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    z = torch.linalg.qr(z).Q * (2 * K) ** 0.5
    drawn = sample_chain(
        chain.process, z[:, :1], num_steps=K, coupling=chain.coupling, noise=z[:, 1:].unsqueeze(-1)
    )
    return torch.cat([with_ends(drawn.clone(), [m] * 2 * K) for m in range(1, K + 1)])


@every_straight
@every_coupling
@pytest.mark.parametrize("lmbda", [0.0, 0.5, 1.0])
def test_the_fixed_point_of_normal_data_is_the_recursion(process: Schedule, eta: float, lmbda: float) -> None:
    chain = Chain(process, 5, eta)
    c = torch.ones(6, 6, dtype=torch.float64)
    for m in range(1, 6):
        c[: m + 1, m] = solution(chain, m, lmbda)
    states = balanced(chain)

    def slope(c: Tensor) -> float:
        denoiser: Any = Table(chain, c)
        loss = td_map(denoiser, lmbda=lmbda, bootstrap="own", map_weight="u")(states)["loss_value"]
        return float(gradient(loss, denoiser).abs().max())

    assert slope(c) < 1e-9 * slope(c + 0.1)
    if eta == 1:
        alpha, sigma = chain.scales
        ratio = (alpha[:-1] / alpha[-1]) / (
            alpha[:-1] ** 2 + sigma[:-1] ** 2
        )  # Cov(x_r, x_t)/Var(x_t) at r = 0
        torch.testing.assert_close(c[:-1, -1], ratio)


@every_straight
@pytest.mark.parametrize("m", [1, 3, 5])
def test_of_a_markov_chain_every_lambda_learns_the_conditional_mean(process: Schedule, m: int) -> None:
    chain = Chain(process, 5, 1.0)
    (alpha, sigma), S = chain.scales, covariances(chain)
    expected = alpha / alpha[m] * (alpha[m] ** 2 + sigma[m] ** 2) / (alpha**2 + sigma**2)
    for lmbda in (0.0, 0.5, 1.0):
        c = solution(chain, m, lmbda)
        torch.testing.assert_close(c, expected[: m + 1])
        torch.testing.assert_close(c, S[: m + 1, m] / S.diag()[: m + 1])


def std(process: Schedule, t: Tensor) -> Tensor:
    return torch.hypot(process.alpha(t), process.sigma(t))


@every_straight
def test_of_one_noise_td0_learns_the_map_of_the_ode_as_the_chain_gets_finer(process: Schedule) -> None:
    errors = []
    for N in (32, 64, 128):
        chain = Chain(process, N, 0.0)
        n = std(process, chain.t)
        per_end = [(solution(chain, m, 0.0) - n[m] / n[: m + 1]).abs().max() for m in (N // 2, N)]
        errors.append(float(torch.stack(per_end).max()))
        assert float((solution(chain, N, 1.0) - n[-1] / n).abs().max()) > 0.1
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.15)
    assert errors[1] / errors[2] == pytest.approx(2, rel=0.15)
    assert errors[2] < 0.05


@every_coupling
@pytest.mark.parametrize("lmbda", [0.0, 0.5])
def test_between_the_couplings_it_is_the_mean_of_a_diffusion(eta: float, lmbda: float) -> None:
    errors = []
    for N in (64, 128):
        chain = Chain(EDM(0.01, 20.0), N, eta)
        limit = ((1 + chain.t[-1] ** 2) / (1 + chain.t**2)) ** ((1 + eta**2) / 2)
        errors.append(float((solution(chain, N, lmbda) - limit).abs().max()))
    if eta == 1:
        assert max(errors) < 1e-12
    else:
        assert errors[0] / errors[1] == pytest.approx(2, rel=0.2)
        assert errors[1] < 0.1


# Bootstrapping, annealing and states


def test_the_target_network_is_what_a_jump_learns_from() -> None:
    denoiser, chain = two_times(Flow()), chains(Flow(), [STEPS] * 3)
    target, own = (td_map(denoiser, lmbda=0.5, bootstrap=kind) for kind in ("target", "own"))
    with torch.no_grad():
        torch.testing.assert_close(target(chain)["loss_value"], own(chain)["loss_value"])
        denoiser.network.last.weight.mul_(2)
        assert abs(float(target(chain)["loss_value"] - own(chain)["loss_value"])) > 1e-3
    B = 3
    assert own.network_evaluations == 2 * B * STEPS
    assert target.network_evaluations == 2 * B * (2 * STEPS - 1)  # the first state is never bootstrapped from


def test_lambda_is_annealed() -> None:
    denoiser, chain = two_times(Flow()), chains(Flow(), [4, STEPS])
    loss = td_map(denoiser, anneal={"lmbda": [1, 0]})
    for step, lmbda in enumerate([1.0, 0.5, 0.0]):
        loss.set_progress(step, 3)
        expected = td_map(denoiser, lmbda=lmbda)(chain)["loss_value"]
        torch.testing.assert_close(loss(chain)["loss_value"], expected)


@every_straight
@pytest.mark.parametrize("window", [None, 3])
def test_the_states(process: Schedule, window: int | None) -> None:
    B, K = 600, window or 5
    sampler = ChainSampler(Chain(process, 5, 0.0), window=window, jitter=False)
    draw = MapChains(process, sampler=sampler, different=0.75)
    generator = torch.Generator().manual_seed(0)
    chain = draw(torch.randn(B, 2, generator=generator, dtype=torch.float64), generator=generator)
    t, r, valid = (chain[key].squeeze(-1) for key in ("t", "r", "valid"))
    jumps = r < t
    m = jumps.sum(1)
    assert 0.7 < float((m > 0).double().mean()) < 0.8
    shares = m[m > 0].bincount(minlength=K + 1)[1:] / (m > 0).sum()
    assert float((shares - 1 / K).abs().max()) < 4 * (1 / K * (1 - 1 / K) / 400) ** 0.5
    for k in range(B):
        assert torch.equal(valid[k], torch.arange(K) < (m[k] if m[k] > 0 else K))
        if m[k] > 0:
            assert bool((r[k, : m[k]] == chain["next", "t"][k, m[k] - 1]).all()) and bool(
                jumps[k, : m[k]].all()
            )
        else:
            assert torch.equal(r[k], t[k])
    with torch.no_grad():
        assert torch.isfinite(td_map(two_times(process), lmbda=0.5)(chain)["loss_value"])


def test_states_that_are_left_out_have_no_say() -> None:
    denoiser, chain = two_times(EDM(0.01, 20.0)), chains(EDM(0.01, 20.0), [2, 3])
    loss = td_map(denoiser, lmbda=0.5)
    expected = loss(chain)["loss_value"]
    assert bool((chain["loss"][~chain["valid"]] == 0).all()) and bool(
        (chain["loss"][chain["valid"]] > 0).all()
    )
    chain["x_t"] = chain["x_t"] + (~chain["valid"]).double()  # as left; as reached it stays
    torch.testing.assert_close(loss(chain)["loss_value"], expected, rtol=0, atol=0)


def test_what_is_refused() -> None:
    denoiser, chain = two_times(Flow()), chains(Flow(), [3, 2])
    with pytest.raises(InputError, match="map_weight is 'snr': give one of edm, u"):
        TDMapLoss(denoiser, map_weight="snr")
    with pytest.raises(InputError, match="'own' or 'target'"):
        TDMapLoss(denoiser, bootstrap="residual")
    with pytest.raises(InputError, match="lmbda is 1.5"):
        TDMapLoss(denoiser, lmbda=1.5)
    with pytest.raises(InputError, match="straight paths"):
        MapChains(VP(), sampler=ChainSampler(Chain(VP(), 4, 0.0)))
    for changed in (chain["r"] + 0.01, torch.full_like(chain["r"], 0.01), chain["r"].flip(1)):
        wrong = chain.clone()
        wrong["r"] = changed
        with pytest.raises(InputError, match="r is no level that the chain reaches"):
            td_map(denoiser)(wrong)
    with pytest.raises(KeyError, match="r missing"):
        td_map(denoiser)(chain.exclude("r"))
