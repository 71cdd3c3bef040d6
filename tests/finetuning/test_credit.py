"""Where rewards stand and what credit makes of them: plain loops as witnesses, what survives a checkpoint."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor

import diffrl
from diffrl.finetuning.credit.critic import LearnedCritic
from diffrl.finetuning.credit.group import GroupRelative
from diffrl.finetuning.credit.standardised import RewardsToGo, Standardised
from diffrl.finetuning.piece import Setting
from diffrl.finetuning.placement.dense import Dense
from diffrl.finetuning.placement.similarity import predict_dense
from diffrl.finetuning.placement.terminal import Terminal
from diffrl.finetuning.rollouts.chains import collect_rollout
from diffrl.rewards.black_box import BlackBox
from diffrl.training.optim import FinetuningOptim

PROCESS = diffrl.EDM()


def rollout(
    B: int = 8, K: int = 5, cond: Tensor | None = None, pairs: bool = False, seed: int = 0
) -> TensorDict:
    exact = diffrl.MixtureDenoiser(
        PROCESS, torch.tensor([[1.0, 0.5], [-1.0, 0.2]]), torch.full((2,), 0.3), torch.ones(2)
    )
    policy = diffrl.DenoisingPolicy(exact, diffrl.Ancestral(), num_steps=K, reduction="mean")
    generator = torch.Generator().manual_seed(seed)
    return collect_rollout(policy, (2,), batch_size=B, pairs=pairs, cond=cond, generator=generator)


def height(x0: Tensor, cond: Any) -> Tensor:
    return x0[:, 0] if cond is None else x0[:, 0] + cond


def test_terminal_pays_the_sample_once() -> None:
    labels = torch.tensor([0, 1, 2, 3])
    steps = rollout(B=4, cond=labels)
    box = BlackBox(height)
    r = Terminal()(steps, box)
    assert r.shape == (4, 5, 1) and (r[:, :-1] == 0).all() and box.queries == 4 == 4 * Terminal().queries(5)
    torch.testing.assert_close(r[:, -1, 0], steps["next", "x_t"][:, -1, 0] + labels)


@pytest.mark.parametrize("mode", ["anchor", "all", "linear", "last"])
def test_dense_by_state_is_the_prediction_and_by_next_is_one_step_later(mode: Any) -> None:
    steps, box = rollout(), BlackBox(height, cache=False)
    r = Dense(mode, guarded=False)(steps, box)
    assert box.queries == 8 * Dense(mode).queries(5)
    torch.testing.assert_close(r[..., 0], predict_dense(steps["x0_hat"], height, mode=mode, guarded=False))
    later = Dense(mode, timing="next", guarded=False)(steps, height)
    led_to = torch.cat([steps["x0_hat"][:, 1:], steps["next", "x_t"][:, -1:]], 1)
    torch.testing.assert_close(later[..., 0], predict_dense(led_to, height, mode=mode, guarded=False))
    if mode == "all":  # r_i = R(what step i leads to)
        torch.testing.assert_close(later[:, :-1], r[:, 1:])
        torch.testing.assert_close(later[:, -1, 0], steps["next", "x_t"][:, -1, 0])


@pytest.mark.parametrize("per", ["prompt", "batch"])
def test_standardised_is_a_z_score_of_the_return_for_all_steps(per: Any) -> None:
    labels = torch.tensor([0, 0, 0, 1, 1, 1, 1, 0])
    steps, r = rollout(cond=labels), torch.randn(8, 5, 1)
    A = Standardised(min_count=2, per=per)(steps, r)
    R = r.sum((1, 2)).double()
    for b in range(8):
        own = R[labels == labels[b]] if per == "prompt" else R
        expected = (R[b] - own.mean()) / (own.std(correction=0) + 1e-6)
        torch.testing.assert_close(A[b, :, 0], expected.float().expand(5))


@pytest.mark.parametrize("gamma", [0.0, 0.9, 1.0])
def test_rewards_to_go_are_standardised_step_by_step(gamma: float) -> None:
    steps, r = rollout(), torch.randn(8, 5, 1)
    A = RewardsToGo(gamma=gamma, min_count=2)(steps, r)
    for i in range(5):
        G = sum(gamma ** (j - i) * r[:, j, 0].double() for j in range(i, 5))
        assert isinstance(G, Tensor)
        torch.testing.assert_close(A[:, i, 0], ((G - G.mean()) / (G.std(correction=0) + 1e-6)).float())


def test_without_prompts_a_buffer_holds_four_rollouts_and_with_them_the_published_32() -> None:
    for cond, size in ((None, 32), (torch.zeros(8, dtype=torch.long), 32), (None, 400)):
        B = 100 if size == 400 else 8
        credit = Standardised()
        credit(rollout(B=B, cond=cond), torch.randn(B, 5, 1))
        assert credit.statistics is not None and credit.statistics.buffer == size


def test_statistics_continue_from_a_checkpoint() -> None:
    first, second = torch.randn(2, 8, 5, 1)
    steps = rollout()
    one = RewardsToGo(gamma=0.9)
    one(steps, first)
    other = RewardsToGo(gamma=0.9)
    other.load_state_dict(one.state_dict())
    assert torch.equal(one(steps, second), other(steps, second))
    fresh = Standardised()
    fresh.load_state_dict(Standardised().state_dict())  # of a run that has not begun
    assert fresh.statistics is None


def test_groups_are_centred() -> None:
    steps, r = rollout(pairs=True), torch.randn(8, 5, 1)
    A = GroupRelative("none")(steps, r)
    R = r.sum((1, 2))
    torch.testing.assert_close(A[:, 0, 0], R - R.view(4, 2).mean(1).repeat_interleave(2))
    assert GroupRelative().state_dict() == {}


def setting(conditions: torch.Tensor | None = None) -> Setting:
    """Of a run whose denoiser has sigma_data 0.5; a critic looks at nothing else of the policy."""
    policy: Any = SimpleNamespace(process=PROCESS, denoiser=SimpleNamespace(sigma_data=0.5))
    nothing: Any = None
    return Setting(
        policy, (2,), conditions, FinetuningOptim(), 0.0, None, nothing, nothing, 0, torch.device("cpu")
    )


def critic_of(**options: Any) -> LearnedCritic:
    credit = LearnedCritic(**options)
    credit.prepare(setting())
    return credit


@pytest.mark.parametrize("lmbda", [0.0, 0.5, 1.0])
def test_before_it_has_learnt_the_critics_advantage_is_the_lambda_return_of_zeros(lmbda: float) -> None:
    steps, r = rollout(), torch.zeros(8, 5, 1)
    r[:, -1, 0] = torch.randn(8)
    A = critic_of(lmbda=lmbda, gamma=1.0)(steps, r)
    R = r[:, -1, 0]
    z = (R - R.mean()) / R.std(correction=0)
    raw = torch.stack([z * lmbda ** (4 - i) for i in range(5)], 1)  # G_i = λ G_{i+1}, as V = 0; 0⁰ = 1
    torch.testing.assert_close(A[..., 0], raw / (raw.std(correction=0) + 1e-6), rtol=1e-4, atol=1e-5)


def test_the_critic_learns_the_reward_that_the_state_foretells() -> None:
    credit = critic_of(lmbda=1.0, passes=50)
    for seed in range(20):
        steps = rollout(B=64, seed=seed)
        r = Terminal()(steps, height)
        A = credit(steps, r)
        if seed == 0:
            first = credit.raw_std
    # near the data, the sign of the state tells the mode, and so most of the reward's variance
    V, R = r[:, -1, 0] - A[:, -1, 0] * credit.raw_std, r[:, -1, 0]
    assert float(((R - R.mean()) * (V - V.mean())).mean() / (R.std() * V.std())) > 0.9
    assert credit.raw_std < 0.75 * first


def test_a_first_rollout_of_equal_rewards_does_not_set_the_critics_scale() -> None:
    credit = critic_of(lmbda=1.0)
    A = credit(rollout(), torch.zeros(8, 5, 1))
    assert not A.any()
    r = torch.zeros(8, 5, 1)
    r[:, -1, 0] = torch.tensor([0.0, 1.0] * 4)
    assert credit(rollout(), r).abs().max() < 5 and credit.raw_std < 1


def test_a_critic_continues_from_a_checkpoint() -> None:
    one, other, r = critic_of(), critic_of(), torch.randn(8, 5, 1)
    one(rollout(), r)
    other.load_state_dict(one.state_dict())
    assert torch.equal(one(rollout(seed=1), r), other(rollout(seed=1), r))


def test_a_critic_of_labels_tells_them_apart() -> None:
    credit = LearnedCritic(passes=100)
    credit.prepare(setting(torch.tensor([0, 1])))
    labels = torch.tensor([0, 1] * 16)
    r = torch.zeros(32, 5, 1)
    r[:, -1, 0] = labels.float()
    for seed in range(5):
        credit(rollout(B=32, cond=labels, seed=seed), r)
    assert credit.raw_std < 0.2  # of a reward whose standard deviation is ½


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Dense(mode="some"), "mode"),
        (lambda: Dense(timing="now"), "placement.timing is 'now'"),
        (lambda: Standardised(per="group"), "credit.per is 'group'"),
        (lambda: Standardised(buffer=8), "credit.buffer is 8: it must hold credit.min_count, 16"),
        (lambda: RewardsToGo(gamma=1.5), "credit.gamma is 1.5"),
        (lambda: GroupRelative("all"), "credit.std is 'all'"),
        (lambda: LearnedCritic(lmbda=math.nan), "credit.lmbda is nan"),
        (lambda: LearnedCritic(passes=0), "credit.passes is 0"),
        (
            lambda: Standardised()(rollout(B=2, cond=torch.randn(2, 3)), torch.ones(2, 5, 1)),
            "statistics are kept by integers",
        ),
        (
            lambda: critic_of()(rollout(B=2, cond=torch.randn(2, 3)), torch.ones(2, 5, 1)),
            "the critic takes integer",
        ),
    ],
)
def test_what_is_refused(make: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        make()


def test_a_critic_that_was_not_prepared() -> None:
    with pytest.raises(RuntimeError, match="call prepare first"):
        LearnedCritic()(rollout(B=2), torch.ones(2, 5, 1))
