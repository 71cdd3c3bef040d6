"""The losses of DDPO and SDPO, and credit: published numbers, plain loops, and finite differences as witnesses."""

import math
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor, nn

from diffrl.diffusion.laws import Gaussian
from diffrl.finetuning.methods.ddpo import DDPOLoss
from diffrl.finetuning.methods.sdpo import SDPOLoss
from diffrl.rl.advantages import FifoStatistics, critic_advantages, group_advantages, rewards_to_go

OLD = torch.tensor([-1.0, -2.0], dtype=torch.float64)


class Given(nn.Module):
    """A policy whose log-ratios are parameters; the losses ask for nothing else."""

    reduction = "mean"

    def __init__(self, *rho: float) -> None:
        super().__init__()
        self.rho = nn.Parameter(torch.tensor(rho, dtype=torch.float64))

    def law(self, x_t: Tensor, index: Tensor, cond: Tensor | None = None) -> Gaussian:
        return Gaussian(x_t, torch.ones(len(x_t), dtype=x_t.dtype))

    def log_prob(self, law: Gaussian, action: Tensor) -> Tensor:
        return self.rho + action.flatten()  # the action carries the old log-probability


def steps(advantage: list[float], index: int = 0, old: Tensor = OLD) -> TensorDict:
    n = len(advantage)
    return TensorDict(
        {
            "x_t": torch.zeros(n, 1, dtype=torch.float64),
            "index": torch.full((n, 1), index),
            "group": (torch.arange(n) // 2)[:, None],
            "action": old[:n, None],
            "action_log_prob": old[:n],
            "trainable": torch.ones(n, 1, dtype=torch.bool),
            "advantage": torch.tensor(advantage, dtype=torch.float64)[:, None],
        },
        [n],
    )


@pytest.mark.parametrize(
    ("rho", "loss", "gradient"),
    [
        ((2e-4, -3e-4), 3.9992160, (0.0, 0.0)),
        ((-2e-4, 3e-4), 4.0019604, (-3.92136, 3.92136)),
        ((2e-4, 0.5e-4), 3.9998040, (0.0, 3.92030)),
    ],
)
def test_sdpo_golden_numbers(rho: tuple[float, float], loss: float, gradient: tuple[float, float]) -> None:
    """λ = 0.99, i = 2, η = 1, ε = 1e-4, A = (1.5, -0.5)."""
    policy: Any = Given(*rho)
    value = SDPOLoss(policy)(steps([1.5, -0.5], index=2))["loss_policy"]
    value.backward()
    assert float(value.detach()) == pytest.approx(loss, abs=5e-7)
    assert policy.rho.grad.tolist() == pytest.approx(gradient, abs=5e-5)


def test_sdpo_gradient_before_the_first_update() -> None:
    """-2 w ΔA (∇ log π_a - ∇ log π_b), at ρ = 0."""
    policy: Any = Given(0.0, 0.0)
    SDPOLoss(policy, clip_range=0, log_scale=2.0)(steps([1.0, -0.5], index=3))["loss_policy"].backward()
    w = 0.99**3 / 2
    assert policy.rho.grad.tolist() == pytest.approx([-2 * w * 1.5, 2 * w * 1.5])


def test_sdpo_does_not_care_which_member_is_first() -> None:
    values = []
    for rho, A in (((3e-4, -1e-4), [1.0, 0.2]), ((-1e-4, 3e-4), [0.2, 1.0])):
        policy: Any = Given(*rho)
        values.append(float(SDPOLoss(policy)(steps(A))["loss_policy"].detach()))
    assert values[0] == pytest.approx(values[1])


def test_sdpo_refuses_pairs_that_were_parted() -> None:
    policy: Any = Given(0.0, 0.0)
    parted = steps([1.0, 0.0])
    parted["group"] = torch.tensor([[0], [1]])
    with pytest.raises(ValueError, match="never shuffle them apart"):
        SDPOLoss(policy)(parted)


@pytest.mark.parametrize("rho", [0.0, 0.3, -0.3])
@pytest.mark.parametrize("A", [2.0, -2.0])
def test_ddpo_is_ppo_step_by_step(rho: float, A: float) -> None:
    eps, r = 0.2, math.exp(rho)
    policy: Any = Given(rho, rho)
    out = DDPOLoss(policy, surrogate="is", clip_range=eps)(steps([A, A]))
    assert float(out["loss_policy"].detach()) == pytest.approx(
        max(-A * r, -A * min(max(r, 1 - eps), 1 + eps))
    )
    assert float(out["clip_fraction"]) == float(abs(r - 1) > eps)
    assert float(out["approx_kl"]) == pytest.approx(0.5 * rho**2)


def test_ddpo_by_score_function_and_by_ratio_agree_before_the_first_update() -> None:
    gradients = []
    for surrogate in ("sf", "is"):
        policy: Any = Given(0.0, 0.0)
        DDPOLoss(policy, surrogate=surrogate, clip_range=0.1)(steps([1.0, -3.0]))["loss_policy"].backward()
        gradients.append(policy.rho.grad.tolist())
    assert gradients[0] == pytest.approx([-0.5, 1.5]) and gradients[1] == pytest.approx([-0.5, 1.5])


def test_advantages_are_clipped() -> None:
    policy: Any = Given(0.0, 0.0)
    loss = DDPOLoss(policy, surrogate="sf", advantage_clip=5.0)(steps([9.0, 0.0]))["loss_policy"]
    assert float(loss.detach()) == pytest.approx(-5.0 * float(OLD[0]) / 2)


@pytest.mark.parametrize("loss", [DDPOLoss, SDPOLoss])
def test_a_batch_without_a_stochastic_step_is_refused(loss: Any) -> None:
    policy: Any = Given()
    last = steps([1.0, 0.0])
    last["trainable"] = torch.zeros(2, 1, dtype=torch.bool)
    with pytest.raises(ValueError, match="no step of this batch is stochastic"):
        loss(policy)(last)


def test_kl_of_two_laws_is_torchs() -> None:
    mean, other = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0))
    std = torch.tensor([0.5, 1.0, 2.0, 0.1])
    law, reference = Gaussian(mean, std), Gaussian(other, std)
    normal = torch.distributions.Normal
    witness = torch.distributions.kl_divergence(normal(mean, std[:, None]), normal(other, std[:, None]))
    torch.testing.assert_close(law.kl(reference, "sum"), witness.sum(1))
    torch.testing.assert_close(law.kl(reference, "mean"), witness.mean(1))
    assert float(law.kl(law, "sum").abs().max()) == 0


@pytest.mark.parametrize(
    "options",
    [{"surrogate": "ppo"}, {"clip_range": 0.0}, {"kl_coef": 0.1}, {"kl_coef": -1.0}, {"advantage_clip": 0.0}],
)
def test_ddpo_refuses(options: dict[str, Any]) -> None:
    policy: Any = Given(0.0)
    with pytest.raises(ValueError, match="|".join(options)):
        DDPOLoss(policy, **options)


# Credit


def test_rewards_to_go_golden_numbers() -> None:
    R = torch.tensor([1.0, 3.0, 1.0, 2.0], dtype=torch.float64).view(1, 4, 1)
    expected = torch.tensor([6.890698, 5.9502, 2.98, 2.0], dtype=torch.float64)
    torch.testing.assert_close(rewards_to_go(R, gamma=0.99).flatten(), expected, rtol=0, atol=1e-9)
    torch.testing.assert_close(rewards_to_go(R, gamma=0.0), R)


def test_statistics_of_a_key_by_a_plain_loop() -> None:
    statistics = FifoStatistics(buffer=4, min_count=3)
    kept: dict[int, list[float]] = {0: [], 1: []}
    for values, key in (
        ([1.0, 2.0, 3.0], [0, 0, 1]),
        ([4.0, 6.0, 5.0], [0, 0, 0]),
        ([0.0, 9.0, 1.0], [1, 1, 0]),
    ):
        for v, k in zip(values, key, strict=True):
            kept[k] = [*kept[k], v][-4:]
        expected = []
        for v, k in zip(values, key, strict=True):
            own = kept[k] if len(kept[k]) >= 3 else values
            mean = sum(own) / len(own)
            std = math.sqrt(sum((o - mean) ** 2 for o in own) / len(own))
            expected.append((v - mean) / (std + 1e-6))
        result = statistics(torch.tensor(values, dtype=torch.float64), torch.tensor(key))
        assert result.tolist() == pytest.approx(expected)


def test_statistics_by_step_survive_a_checkpoint() -> None:
    g = torch.Generator().manual_seed(0)
    one, key = FifoStatistics(buffer=8, min_count=2), torch.tensor([0, 1, 0, 1])
    one(torch.randn(4, 3, generator=g), key)
    two = FifoStatistics(buffer=8, min_count=2)
    two.load_state_dict(one.state_dict())
    values = torch.randn(4, 3, generator=g)
    torch.testing.assert_close(one(values, key), two(values, key), rtol=0, atol=0)
    shifted = FifoStatistics(buffer=8, min_count=2)(values + torch.tensor([0.0, 10.0, -5.0]), key)
    torch.testing.assert_close(
        shifted, FifoStatistics(buffer=8, min_count=2)(values, key), atol=1e-5, rtol=1e-5
    )


def test_group_advantages_are_centred_and_scaled() -> None:
    values, group = torch.tensor([1.0, 3.0, 10.0, 14.0]), torch.tensor([5, 5, 2, 2])
    assert group_advantages(values, group, std="none").tolist() == [-1.0, 1.0, -2.0, 2.0]
    assert group_advantages(values, group, tol=0).tolist() == pytest.approx([-1, 1, -1, 1])
    spread = float(values.std(correction=0))
    expected = [-1 / spread, 1 / spread, -2 / spread, 2 / spread]
    assert group_advantages(values, group, std="global", tol=0).tolist() == pytest.approx(expected)


def test_critic_at_lambda_one_is_reward_to_go_over_a_baseline() -> None:
    g = torch.Generator().manual_seed(0)
    R, V = torch.randn(2, 3, 5, 1, dtype=torch.float64, generator=g)
    A, G = critic_advantages(R, V, lmbda=1.0, gamma=0.9)
    torch.testing.assert_close(G, rewards_to_go(R, gamma=0.9))
    torch.testing.assert_close(A, G - V)
    A, _ = critic_advantages(R, V, lmbda=0.0, gamma=0.9)
    following = torch.cat([V[:, 1:], torch.zeros(3, 1, 1, dtype=torch.float64)], 1)
    torch.testing.assert_close(A, R + 0.9 * following - V)
