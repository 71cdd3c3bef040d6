"""Who of the steps earned the reward: gains of the clean estimate, and one return shared out by cosine similarity."""

import math
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor

import diffrl
from diffrl.errors import InputError
from diffrl.finetuning import recipes
from diffrl.finetuning.credit.coca import CosineGains, cosine_shares
from diffrl.finetuning.credit.group import GroupRelative
from diffrl.finetuning.credit.standardised import RewardsToGo, Standardised
from diffrl.finetuning.placement.dense import Dense
from diffrl.finetuning.placement.gains import Gains
from diffrl.finetuning.placement.terminal import Terminal
from diffrl.finetuning.rollouts.chains import Rollouts, collect_rollout
from diffrl.rewards.black_box import BlackBox
from diffrl.rl.advantages import critic_advantages


def policy_of(K: int) -> diffrl.DenoisingPolicy:
    exact = diffrl.MixtureDenoiser(
        diffrl.EDM(), torch.tensor([[1.0, 0.5], [-1.0, 0.2]]), torch.full((2,), 0.3), torch.ones(2)
    )
    return diffrl.DenoisingPolicy(exact, diffrl.Ancestral(), num_steps=K, reduction="mean", std_floor=0.05)


def trainable(K: int) -> diffrl.DenoisingPolicy:
    denoiser = diffrl.Denoiser(diffrl.networks.MLP((2,), hidden=32, depth=1), diffrl.EDM())
    return diffrl.DenoisingPolicy(denoiser, diffrl.Ancestral(), num_steps=K, reduction="mean", std_floor=0.05)


def rollout(B: int = 8, K: int = 5, group: int = 8, cond: Tensor | None = None, seed: int = 0) -> TensorDict:
    generator = torch.Generator().manual_seed(seed)
    return collect_rollout(policy_of(K), (2,), batch_size=B, group_size=group, cond=cond, generator=generator)


def height(x0: Tensor, cond: Any) -> Tensor:
    return x0[:, 0].sin() if cond is None else x0[:, 0].sin() + cond


def constant(x0: Tensor, cond: Any) -> Tensor:
    return torch.full((len(x0),), 0.3)


def estimates(steps: TensorDict) -> Tensor:
    return torch.cat([steps["x0_hat"], steps["next", "x_t"][:, -1:]], 1)


@pytest.mark.parametrize("K", [1, 2, 5])
def test_gains_are_differences_of_rewards_by_a_plain_loop_and_sum_to_the_last_minus_the_first(K: int) -> None:
    labels = torch.tensor([2, 3])
    steps, box = rollout(K=K, group=4, cond=labels), BlackBox(height, cache=False)
    r = Gains()(steps, box)
    assert r.shape == (8, K, 1) and box.queries == 8 * (K + 1) == 8 * Gains().queries(K)
    x, c = estimates(steps), labels.repeat_interleave(4)
    for b in range(8):
        for i in range(K):
            expected = height(x[b, i + 1][None], c[b]) - height(x[b, i][None], c[b])
            torch.testing.assert_close(r[b, i], expected)
    torch.testing.assert_close(r.sum((1, 2)), height(x[:, -1], None) - height(x[:, 0], None))


def test_gains_are_what_a_step_leads_to_minus_what_it_starts_from() -> None:
    steps = rollout()
    led_to, state = (Dense("all", timing=timing)(steps, height) for timing in ("next", "state"))
    torch.testing.assert_close(Gains()(steps, height), led_to - state)


@pytest.mark.parametrize("lmbda", [0.0, 0.7, 1.0])
def test_gains_to_go_are_td_lambda_with_the_reward_of_the_estimate_as_critic(lmbda: float) -> None:
    steps = rollout()
    V = torch.stack([height(x, None) for x in steps["x0_hat"].unbind(1)], 1)[..., None]
    adv, _ = critic_advantages(Terminal()(steps, height), V, lmbda=lmbda)
    r = Gains()(steps, height)
    ours = RewardsToGo(gamma=lmbda, per="rollout")(steps, r)[..., 0]
    torch.testing.assert_close(
        ours, (adv - adv.mean(0))[..., 0] / (adv.std(0, correction=0)[..., 0] + 1e-6), atol=1e-5, rtol=1e-4
    )
    if lmbda == 0:
        torch.testing.assert_close(r, adv)


def test_a_group_of_the_whole_rollout_compared_by_step_is_reward_to_go_without_a_future() -> None:
    steps = rollout()
    r = Gains()(steps, height)
    by_step = GroupRelative(of="step")(steps, r)
    alone = RewardsToGo(gamma=0.0, per="rollout")(steps, r)
    torch.testing.assert_close(
        by_step, alone, rtol=1e-2, atol=1e-3
    )  # 1e-4 is added to std by one, 1e-6 by the other
    torch.testing.assert_close(by_step.mean(0), torch.zeros(5, 1), atol=1e-6, rtol=0)


@pytest.mark.parametrize("std", ["group", "global", "none"])
def test_pooled_steps_have_one_mean_and_one_scale_a_group(std: Any) -> None:
    steps, r = rollout(group=4), torch.randn(8, 5, 1, generator=torch.Generator().manual_seed(1))
    r[:, 0] += 3
    credit = GroupRelative(std, "pooled")
    A = credit(steps, r)
    assert A.shape == r.shape and credit.takes_dense and credit.centred_over(one_condition=True) is None
    for rows in (slice(0, 4), slice(4, 8)):
        own = {
            "group": float(r[rows].std(correction=0)),
            "global": float(r.std(correction=0)),
            "none": 1 - 1e-4,
        }
        torch.testing.assert_close(A[rows], (r[rows] - r[rows].mean()) / (own[std] + 1e-4))
    assert float(A[:, 0].mean()) > 1  # a step that mostly gains is favoured, which by step it is not
    torch.testing.assert_close(
        GroupRelative(std, "step")(steps, r)[:, 0].mean(), torch.tensor(0.0), atol=1e-6, rtol=0
    )


@pytest.mark.parametrize("K", [1, 5])
@pytest.mark.parametrize(
    ("placement", "credit"),
    [
        (Gains(), GroupRelative(of="pooled")),
        (Gains(), GroupRelative(of="step")),
        (Gains(), RewardsToGo(gamma=1.0)),
        (Terminal(), CosineGains()),
    ],
)
def test_a_constant_reward_gives_no_advantage(K: int, placement: Any, credit: Any) -> None:
    steps = rollout(K=K)
    A = credit(steps, placement(steps, constant))
    assert A.shape == (8, K, 1) and bool((A == 0).all()) and credit.raw_std == 0


def shares_by_loop(x: Tensor, window: int) -> Tensor:
    """Of x̂_0 .. x̂_{K-1}, x_K, shape [B, K+1, 2]."""
    B, K = len(x), x.shape[1] - 1
    w = torch.zeros(B, K)
    for b in range(B):
        c = [float(x[b, i] @ x[b, K]) / math.hypot(*x[b, i]) / math.hypot(*x[b, K]) for i in range(K + 1)]
        means = [c[0]] + [sum(c[1 + m : 1 + m + window]) / window for m in range(0, K, window)]
        for i in range(K):
            m = i // window
            w[b, i] = (means[m + 1] - means[m]) / (means[-1] - means[0]) / window
    return w


@pytest.mark.parametrize(("K", "window"), [(1, 1), (6, 1), (6, 2), (6, 3), (6, 6)])
def test_shares_are_gains_of_cosine_similarity_and_sum_to_one(K: int, window: int) -> None:
    steps = rollout(K=K)
    w = cosine_shares(steps["x0_hat"], steps["next", "x_t"][:, -1], window=window)
    torch.testing.assert_close(w.sum(1), torch.ones(8))
    torch.testing.assert_close(w, shares_by_loop(estimates(steps).double(), window), rtol=1e-3, atol=1e-4)


def test_what_is_still_to_be_earned_is_never_negative_and_ends_where_the_estimate_is_the_sample() -> None:
    x_K = torch.tensor([[1.0, 0.0]])
    x_hat = torch.tensor([[[0.0, 1.0], [-1.0, 0.0], [2.0, 0.0]]])  # cosines 0, -1, 1, and 1 of the sample
    w = cosine_shares(x_hat, x_K)
    torch.testing.assert_close(w, torch.tensor([[-1.0, 2.0, 0.0]]))
    still = cosine_shares(rollout()["x0_hat"], rollout()["next", "x_t"][:, -1]).flip(1).cumsum(1)
    assert float(still.min()) > -1e-6
    torch.testing.assert_close(cosine_shares(x_K[:, None].expand(1, 4, 2), x_K), torch.full((1, 4), 0.25))


@pytest.mark.parametrize("alpha", [0.0, 0.25, 1.0])
def test_cosine_gains_share_out_the_standardised_return(alpha: float) -> None:
    steps, box = rollout(), BlackBox(height)
    r = Terminal()(steps, box)
    A = CosineGains(alpha=alpha, clip=1.0)(steps, r)
    assert box.queries == 8  # one a trajectory
    z = Standardised()(steps, r)[:, 0, 0].clamp(-1, 1)
    w = shares_by_loop(estimates(steps).double(), 1)
    expected = torch.stack([z * (alpha + (1 - alpha) * w[:, i:].sum(1)) for i in range(5)], 1)
    expected = (expected - expected.mean()) / (expected.std(correction=0) + 1e-6)
    torch.testing.assert_close(A[..., 0], expected, rtol=1e-3, atol=1e-4)
    if alpha == 1:  # all steps alike: plain DDPO's, but for the second scale
        torch.testing.assert_close(A[..., 0], ((z - z.mean()) / z.std(correction=0))[:, None].expand(8, 5))


def test_with_one_step_the_whole_return_is_its_own() -> None:
    steps = rollout(K=1)
    r = Terminal()(steps, height)
    torch.testing.assert_close(CosineGains()(steps, r), Standardised()(steps, r), rtol=1e-4, atol=1e-5)


def test_what_does_not_go_together_is_refused() -> None:
    with pytest.raises(InputError, match=r"credit\.window is 3: give a divisor of the policy's 8 steps"):
        recipe = recipes.ddpo_is(rollouts=Rollouts(8), credit=CosineGains(window=3))
        diffrl.finetune(trainable(8), height, recipe, event_shape=(2,))
    with pytest.raises(InputError, match=r"credit\.window is 2, but these chains have 3 steps"):
        cosine_shares(torch.randn(4, 3, 2), torch.randn(4, 2), window=2)
    with pytest.raises(InputError, match=r"credit\.of is 'steps'"):
        GroupRelative(of="steps")
    for wrong in ({"alpha": 1.5}, {"window": 0}, {"clip": 0.0}):
        with pytest.raises(ValueError, match=rf"credit\.{next(iter(wrong))}"):
            CosineGains(**wrong)
    with pytest.raises(ValueError, match="takes? credit rewards_to_go"):
        recipes.ddpo_is(placement=Gains(), credit=CosineGains())
    with pytest.raises(ValueError, match=r"set rollouts\.group_size"):
        recipes.ddpo_is(placement=Gains(), credit=GroupRelative(of="pooled"))


@pytest.mark.parametrize("credit", ["gains", "cosine"])
def test_the_reward_rises(credit: str) -> None:
    pieces = {
        "gains": {"placement": Gains(), "credit": GroupRelative(of="pooled")},
        "cosine": {"credit": CosineGains()},
    }[credit]
    recipe = recipes.ddpo_is(rollouts=Rollouts(64, group_size=64), **pieces)
    torch.manual_seed(0)
    policy = trainable(5)

    def drawn() -> float:
        noise = torch.Generator().manual_seed(3)
        with torch.no_grad():
            steps = collect_rollout(policy, (2,), batch_size=512, generator=noise)
        return float(height(steps["next", "x_t"][:, -1], None).mean())

    before = drawn()
    rows = diffrl.finetune(policy, height, recipe, event_shape=(2,), iterations=20, lr=1e-2, progress=False)
    assert rows[-1]["queries"] == 20 * 64 * (6 if credit == "gains" else 1)
    assert drawn() > before + 0.1
