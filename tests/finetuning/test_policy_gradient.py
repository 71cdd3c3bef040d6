"""The losses' gradients against autograd of the exact expected reward, on chains whose moments are known."""

import copy
import itertools
import math
from typing import Any, Literal

import numpy as np
import pytest
import torch
from tensordict import TensorDict
from torch import Tensor, nn

from diffrl import keys
from diffrl.diffusion.samplers.base import GaussianSampler
from diffrl.diffusion.samplers.ddim import Ancestral
from diffrl.diffusion.samplers.sde import CPS
from diffrl.diffusion.schedules.flow import Flow
from diffrl.finetuning.methods.ddpo import DDPOLoss
from diffrl.finetuning.methods.sdpo import SDPOLoss
from diffrl.finetuning.placement.dense import Dense
from diffrl.finetuning.placement.similarity import predict_dense
from diffrl.finetuning.placement.terminal import Terminal
from diffrl.finetuning.policy import DenoisingPolicy
from diffrl.finetuning.rollouts.chains import collect_rollout
from diffrl.rewards.black_box import BlackBox
from diffrl.rewards.weighted_sum import as_reward
from diffrl.rl.advantages import FifoStatistics, rewards_to_go
from tests.kit.oracles import Estimate, assert_within, generator, randn

MU = 1.5  # the reward is -(x - μ)²
AB = [[1.5, 0.5], [1.2, -0.4], [1.1, 0.7]]  # a_k and b_k of each level


class Linear(nn.Module):
    """D(x) = a_k x + b_k, with parameters of each level's own: a missing step is a missing gradient."""

    process = Flow()

    def __init__(self, sampler: GaussianSampler, K: int) -> None:
        super().__init__()
        self.grid = sampler.grid(self.process, K)[:-1]
        self.ab = nn.Parameter(torch.tensor(AB[:K]))

    def forward(self, x: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
        k = (t.double()[:, None] - self.grid).abs().argmin(1)
        a, b = self.ab[k].unbind(1)
        return a[:, None] * x + b[:, None]


def linear_policy(
    K: int,
    *,
    sampler: GaussianSampler | None = None,
    std_floor: float = 0.3,
    reduction: Literal["mean", "sum"] = "sum",
) -> DenoisingPolicy:
    sampler = Ancestral() if sampler is None else sampler
    return DenoisingPolicy(Linear(sampler, K), sampler, num_steps=K, reduction=reduction, std_floor=std_floor)


def parameters_of(policy: DenoisingPolicy) -> nn.Parameter:
    return policy.denoiser.ab  # type: ignore[return-value]


class Moments:
    """Mean and variance of each dim of the states, exact functions of the parameters in float64.

    x_{k+1} = A_k (a_k x_k + b_k) + κ_k x_k + s_k z,   x_0 ~ N(0, 1)
    """

    def __init__(self, policy: DenoisingPolicy) -> None:
        self.ab = parameters_of(policy).detach().double().requires_grad_()
        self.mean, self.variance = (
            [torch.zeros((), dtype=torch.float64)],
            [torch.ones((), dtype=torch.float64)],
        )
        zero, one = torch.zeros(1, 1, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64)
        for k, (a, b) in enumerate(self.ab):
            t, s = policy.grid[k], policy.grid[k + 1]
            A, std = policy.sampler.law(policy.process, zero, one, t, s)
            kappa, _ = policy.sampler.law(policy.process, one, zero, t, s)
            c = A.item() * a + kappa.item()
            self.mean.append(c * self.mean[k] + A.item() * b)
            self.variance.append(c**2 * self.variance[k] + max(float(std), policy.std_floor) ** 2)

    def reward(self) -> Tensor:
        """E R(x_K) of one dim."""
        return -((self.mean[-1] - MU) ** 2 + self.variance[-1])

    def dense_reward(self, k: int) -> Tensor:
        """E R(x̂_k), x̂_k = a_k x_k + b_k, of a reward whose own dependence on a_k and b_k is not counted."""
        a, b = self.ab[k].detach()
        return -((a * self.mean[k] + b - MU) ** 2 + a**2 * self.variance[k])

    def gradient(self, expected: Tensor) -> Tensor:
        zero = (0 * self.ab).sum()
        return torch.autograd.grad(expected + zero, self.ab, retain_graph=True)[0]


def reward(x0: Tensor, cond: Any = None) -> Tensor:
    return -(x0 - MU).square().flatten(1).sum(1)


def gradient_of(policy: DenoisingPolicy, loss: nn.Module, td: TensorDict) -> Tensor:
    (g,) = torch.autograd.grad(loss(td)["loss_policy"], [parameters_of(policy)])
    return g.double()


def ddpo(policy: DenoisingPolicy, surrogate: Literal["sf", "is"]) -> DDPOLoss:
    return DDPOLoss(policy, surrogate=surrogate, clip_range=0.2, advantage_clip=1e9)


# Enumerated: every chain whose noises are nodes of Gauss-Hermite quadrature, exact for polynomials


@torch.no_grad()
def enumerated(policy: DenoisingPolicy, *, pairs: bool = False, nodes: int = 4) -> tuple[TensorDict, Tensor]:
    """All chains (or pairs, which share the first noise) and N times their weights, [N]: a mean is an expectation."""
    K = policy.num_steps
    z, w = np.polynomial.hermite_e.hermegauss(nodes)
    w = w / w.sum()
    dims = 1 + K * (2 if pairs else 1)
    each = torch.tensor(list(itertools.product(z, repeat=dims)), dtype=torch.float32)
    weight = torch.tensor(list(itertools.product(w, repeat=dims)), dtype=torch.float64).prod(1)
    weight = weight * len(weight)
    if pairs:
        members = each[:, : 1 + K], torch.cat([each[:, :1], each[:, 1 + K :]], 1)
        each, weight = torch.stack(members, 1).flatten(0, 1), weight.repeat_interleave(2)
    x, steps = each[:, :1], []
    for k in range(K):
        at = torch.full((len(x),), k)
        x0_hat = policy.estimate(x, at)
        law = policy.law_of_estimate(x, at, x0_hat)
        action = law.mean + law.std[:, None] * each[:, k + 1 : k + 2]
        steps.append((x, action, policy.log_prob(law, action), x0_hat, law.std > 0))
        x = action
    x_t, action, log_p, x0_hat, trainable = (torch.stack(c, 1) for c in zip(*steps, strict=True))
    B = len(x)
    td = {
        keys.X_T: x_t,
        keys.INDEX: torch.arange(K).expand(B, K)[..., None],
        keys.GROUP: (torch.arange(B) // (2 if pairs else 1))[:, None, None].expand(B, K, 1),
        keys.ACTION: action,
        keys.ACTION_LOG_PROB: log_p,
        keys.X0_HAT: x0_hat,
        keys.TRAINABLE: trainable[..., None],
    }
    return TensorDict(td, [B, K]), weight


def weighted(td: TensorDict, A: Tensor, weight: Tensor) -> TensorDict:
    """With advantages A, [B] or [B, K], that make the loss's mean over rows an expectation."""
    A = A.double().reshape(len(A), -1).expand(td.shape) * weight[:, None]
    return td.set(keys.ADVANTAGE, A.float().unsqueeze(-1))


@pytest.mark.parametrize("surrogate", ["sf", "is"])
@pytest.mark.parametrize("sampler", [Ancestral(), CPS(0.6)], ids=str)
@pytest.mark.parametrize("K", [1, 2, 3])
def test_ddpo_s_gradient_is_that_of_the_expected_reward_enumerated(
    K: int, sampler: GaussianSampler, surrogate: Literal["sf", "is"]
) -> None:
    """-∇ E R, over the K steps that the loss averages."""
    policy = linear_policy(K, sampler=sampler)
    td, weight = enumerated(policy)
    exact = Moments(policy)
    R = reward(td[keys.ACTION][:, -1])
    assert float((R.double() * weight).mean()) == pytest.approx(float(exact.reward().detach()), rel=1e-5)
    expected = -exact.gradient(exact.reward()) / K
    assert bool((expected.abs() > 0.02).all())  # every step counts
    found = gradient_of(policy, ddpo(policy, surrogate), weighted(td, R, weight))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    # and of a reward with a baseline, which changes nothing in expectation
    found = gradient_of(policy, ddpo(policy, surrogate), weighted(td, R + 3, weight))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_deterministic_last_step_is_left_out_though_the_reward_depends_on_it() -> None:
    policy = linear_policy(3, std_floor=0.0)
    td, weight = enumerated(policy)
    exact = Moments(policy)
    true = exact.gradient(exact.reward())
    found = gradient_of(policy, ddpo(policy, "sf"), weighted(td, reward(td[keys.ACTION][:, -1]), weight))
    torch.testing.assert_close(found[:2], -true[:2] / 2, rtol=1e-4, atol=1e-5)  # two steps are stochastic
    assert not found[2].any() and bool((true[2].abs() > 0.1).all())


# Sampled: rollouts as fine-tuning collects them


@pytest.mark.parametrize("surrogate", ["sf", "is"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("K", [2, 3])
def test_ddpo_s_gradient_is_that_of_the_expected_reward_sampled(
    K: int, reduction: Literal["mean", "sum"], surrogate: Literal["sf", "is"]
) -> None:
    policy, D, batches = linear_policy(K, reduction=reduction), 2, 100
    exact, g = Moments(policy), generator(K)
    baseline = D * float(exact.reward().detach())
    found = []
    for _ in range(batches):
        td = collect_rollout(policy, (D,), batch_size=500, generator=g)
        A = Terminal()(td, as_reward(reward))[:, -1:].expand(500, K, 1) - baseline
        found.append(gradient_of(policy, ddpo(policy, surrogate), td.set(keys.ADVANTAGE, A)))
    each = torch.stack(found)
    error = each.std(0) / math.sqrt(batches)
    # "mean" is the gradient of the density's log over D
    expected = -D * exact.gradient(exact.reward()) / K / (D if reduction == "mean" else 1)
    assert_within(Estimate(each.mean(0), error), expected, errors=4.5)
    # so narrow that half or twice the gradient, or a step without one, would not pass
    assert bool((expected.abs() > 10 * error).all())


# Whose credit it is: rewards of clean estimates belong to states, not to actions


def dense(policy: DenoisingPolicy, td: TensorDict, timing: str) -> Tensor:
    """Rewards of the steps [B, K, 1]: of the estimate that a step starts from, or of what it leads to."""
    of_states = reward(td[keys.X0_HAT].flatten(0, 1)).view(td.shape)
    if timing == "next":
        of_states = torch.cat([of_states[:, 1:], reward(td[keys.ACTION][:, -1])[:, None]], 1)
    return of_states.unsqueeze(-1)


def dense_gradient(policy: DenoisingPolicy, timing: str, gamma: float) -> Tensor:
    td, weight = enumerated(policy)
    A = rewards_to_go(dense(policy, td, timing), gamma=gamma).squeeze(-1)
    return gradient_of(policy, ddpo(policy, "sf"), weighted(td, A, weight))


def exact_dense_gradient(policy: DenoisingPolicy, timing: str, gamma: float) -> Tensor:
    """Row i: -∇_i E Σ_{j≥i} γ^{j-i} r_j / K, by the parameters of step i alone."""
    exact, K = Moments(policy), policy.num_steps
    r = [exact.dense_reward(k) for k in range(K)]
    if timing == "next":
        r = [*r[1:], exact.reward()]
    to_go = [sum((gamma ** (j - i) * r[j] for j in range(i, K)), torch.zeros(())) for i in range(K)]
    return torch.stack([-exact.gradient(to_go[i].double())[i] / K for i in range(K)])


@pytest.mark.parametrize("gamma", [0.0, 0.5, 0.99, 1.0])
@pytest.mark.parametrize("timing", ["state", "next"])
def test_gradient_of_dense_rewards_enumerated(timing: str, gamma: float) -> None:
    policy = linear_policy(3)
    expected = exact_dense_gradient(policy, timing, gamma)
    found = dense_gradient(policy, timing, gamma)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("timing", ["state", "next"])
def test_fine_tuning_places_rewards_so(timing: Any) -> None:
    policy = linear_policy(3)
    td = collect_rollout(policy, (1,), batch_size=8, generator=generator(0))
    torch.testing.assert_close(Dense(mode="all", timing=timing)(td, reward), dense(policy, td, timing))


def test_a_reward_of_the_state_teaches_nothing_by_itself() -> None:
    """With γ = 0 no step learns, and the last one never does; later rewards, or the next state's, teach."""
    policy = linear_policy(3)
    assert float(dense_gradient(policy, "state", 0.0).abs().max()) < 2e-5
    discounted = dense_gradient(policy, "state", 0.99)
    assert float(discounted[:-1].abs().min()) > 0.02 and float(discounted[-1].abs().max()) < 2e-5
    assert float(dense_gradient(policy, "next", 0.0).abs().min()) > 0.01


def test_a_reward_of_the_state_is_noise_in_samples() -> None:
    """Mean zero, but not small: the last step's own reward adds variance alone."""
    policy, g, batches = linear_policy(2), generator(0), 100
    found = []
    for _ in range(batches):
        td = collect_rollout(policy, (1,), batch_size=500, generator=g)
        A = rewards_to_go(dense(policy, td, "state"), gamma=0.0)
        found.append(gradient_of(policy, ddpo(policy, "sf"), td.set(keys.ADVANTAGE, A)))
    each = torch.stack(found)
    assert_within(Estimate(each.mean(0), each.std(0) / math.sqrt(batches)), 0.0, errors=4.5)
    assert float(each.std(0).min()) > 0.01


# SDPO


def test_sdpo_is_a_policy_gradient_whose_baseline_is_the_other_member() -> None:
    """At ρ = 0, E[-2 ΔA (∇ log π_a - ∇ log π_b)] = -4 E[A ∇ log π]: the other member shares the noise alone."""
    policy = linear_policy(2)
    td, weight = enumerated(policy, pairs=True)
    G = rewards_to_go(dense(policy, td, "state"), gamma=0.9).squeeze(-1)
    loss = SDPOLoss(policy, temporal_weight=1.0, clip_range=0.1, advantage_clip=1e9)
    found = gradient_of(policy, loss, weighted(td, G, weight))
    torch.testing.assert_close(found, 4 * exact_dense_gradient(policy, "state", 0.9), rtol=2e-4, atol=5e-5)


@pytest.mark.parametrize("clip_range", [0.0, 1e-2])
def test_sdpo_s_gradient_by_finite_differences(clip_range: float) -> None:
    """-2 w ΔA (∇ log π_a - ∇ log π_b) of each pair and step, log π being quadratic in the parameters."""
    policy, h = linear_policy(3, reduction="mean"), 0.05
    td = collect_rollout(policy, (2,), batch_size=6, pairs=True, generator=generator(3))
    A = randn(6, 3, 1, seed=1, dtype=torch.float32)
    loss = SDPOLoss(policy, temporal_weight=0.9, log_scale=0.5, clip_range=clip_range)
    found = gradient_of(policy, loss, td.set(keys.ADVANTAGE, A))
    dA = (A[0::2] - A[1::2]).squeeze(-1).double()
    w = 0.9 ** torch.arange(3.0).double() / 0.5
    ab = parameters_of(policy)
    expected = torch.zeros_like(found)
    for where in itertools.product(range(3), range(2)):
        shifted = []
        for sign in (1, -1):
            with torch.no_grad():
                ab[where] += sign * h
                shifted.append(policy.get_dist(td).log_prob(td[keys.ACTION]).double())
                ab[where] -= sign * h
        slope = (shifted[0] - shifted[1]) / (2 * h)
        expected[where] = (-2 * w * dA * (slope[0::2] - slope[1::2])).mean()
    assert bool((expected.abs() > 1e-2).all())
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=2e-4)


def advantage_difference(
    x0_hat: Tensor, R: Any, mode: Any = "anchor", *, prompts: Tensor | None = None
) -> Tensor:
    """ΔA of pairs [P, K], as SDPO takes credit: dense rewards, to go, standardised by prompt and step."""
    statistics = FifoStatistics(buffer=64, min_count=8)
    A = statistics(rewards_to_go(predict_dense(x0_hat, R, mode=mode)[..., None], gamma=0.99)[..., 0], prompts)
    return A[0::2] - A[1::2]


@pytest.mark.parametrize("prompts", [None, torch.arange(32) // 2 % 2], ids=["one", "two"])
@pytest.mark.parametrize("mode", ["all", "anchor", "linear", "last"])
def test_credit_ignores_a_reward_s_offset_and_scale(mode: Any, prompts: Tensor | None) -> None:
    policy = linear_policy(3)
    td = collect_rollout(policy, (2,), batch_size=32, pairs=True, generator=generator(0))
    x0_hat = td[keys.X0_HAT]

    def bent(x: Tensor, cond: Any = None) -> Tensor:
        return (2 * x).sin().sum(1)

    dA = advantage_difference(x0_hat, bent, mode, prompts=prompts)
    assert float(dA.abs().mean()) > 0.1
    for k, c in ((1.0, 10.0), (50.0, 0.0), (0.02, -3.0)):
        other = advantage_difference(x0_hat, lambda x, cond, k=k, c=c: k * bent(x) + c, mode, prompts=prompts)
        torch.testing.assert_close(other, dA, rtol=2e-3, atol=2e-3)
    turned = advantage_difference(x0_hat, lambda x, cond: -bent(x), mode, prompts=prompts)
    torch.testing.assert_close(turned, -dA, rtol=1e-4, atol=1e-4)


def test_an_offset_of_the_pair_drops_out_of_the_difference() -> None:
    """A reward that knows the prompt: without statistics, ΔA is that of the reward alone."""
    x0_hat = randn(8, 4, 2)
    offset = randn(4, seed=1).repeat_interleave(2)

    def bent(x: Tensor, cond: Any) -> Tensor:
        return x.square().sum(1) + (0 if cond is None else offset[cond])

    plain, prompted = (
        rewards_to_go(predict_dense(x0_hat, bent, cond, mode="all")[..., None], gamma=0.9)
        for cond in (None, torch.arange(8))
    )
    assert not torch.allclose(plain, prompted)
    torch.testing.assert_close(
        prompted[0::2] - prompted[1::2], plain[0::2] - plain[1::2], rtol=1e-5, atol=1e-5
    )


def test_pairs_share_the_first_noise_and_estimate_and_nothing_more() -> None:
    policy = linear_policy(3)
    td = collect_rollout(policy, (2,), batch_size=8, pairs=True, generator=generator(0))
    a, b = td[0::2], td[1::2]
    assert torch.equal(a[keys.X_T][:, 0], b[keys.X_T][:, 0])
    assert torch.equal(a[keys.X0_HAT][:, 0], b[keys.X0_HAT][:, 0])
    assert bool((a[keys.ACTION] != b[keys.ACTION]).all())


def test_a_rollout_asks_once_a_trajectory() -> None:
    box = BlackBox(reward)
    td = collect_rollout(linear_policy(3), (2,), batch_size=8, generator=generator(0))
    paid = Terminal()(td, box)
    assert box.queries == 8
    torch.testing.assert_close(paid[:, -1, 0], reward(td[keys.ACTION][:, -1]))
    assert not paid[:, :-1].any()


def test_one_update_by_the_gradient_raises_the_expected_reward() -> None:
    policy = linear_policy(3)
    before = float(Moments(policy).reward().detach())
    better = copy.deepcopy(policy)
    td, weight = enumerated(better)
    g = gradient_of(better, ddpo(better, "is"), weighted(td, reward(td[keys.ACTION][:, -1]), weight))
    with torch.no_grad():
        parameters_of(better).sub_(0.01 * g.float())
    gain = float(Moments(better).reward().detach()) - before
    assert gain == pytest.approx(3 * 0.01 * float(g.square().sum()), rel=0.1)  # K lr |g|²
