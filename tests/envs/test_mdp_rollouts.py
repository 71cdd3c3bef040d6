"""Rollouts of the decision process: the pretrained sampler reproduced, pairs, groups, rewards."""

from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from tensordict.nn import TensorDictModule
from torch import Tensor, nn

from diffrl import keys
from diffrl.diffusion.samplers.base import GaussianSampler, Noise
from diffrl.diffusion.samplers.consistency import Multistep
from diffrl.diffusion.samplers.ddim import DDIM, Ancestral
from diffrl.diffusion.samplers.loop import sample
from diffrl.diffusion.samplers.sde import CPS, FlowSDE
from diffrl.diffusion.schedules.base import Schedule
from diffrl.diffusion.schedules.ddpm import DDPM
from diffrl.diffusion.schedules.edm import EDM
from diffrl.diffusion.schedules.flow import Flow
from diffrl.diffusion.schedules.vp import VP
from diffrl.finetuning.methods.ddpo import DDPOLoss
from diffrl.finetuning.methods.sdpo import SDPOLoss
from diffrl.finetuning.placement.terminal import Terminal
from diffrl.finetuning.rollouts.chains import collect_rollout
from diffrl.rewards.black_box import BlackBox
from diffrl.rewards.calls import RewardError
from diffrl.rl.advantages import group_advantages
from tests.kit.decision_process import ID, env_of, exact, labelled, policy_of, squares
from tests.kit.networks import random_denoiser
from tests.kit.oracles import generator, randn

# The pretrained sampler

SAMPLERS: list[tuple[Schedule, GaussianSampler]] = [
    (EDM(), Ancestral()),
    (VP("cosine"), DDIM(0.5)),
    (DDPM(), DDIM(0.0)),
    (Flow(), FlowSDE(0.7)),
    (Flow(3.0), CPS(0.7)),
    (EDM(), Multistep()),
]
samplers = pytest.mark.parametrize(
    ("process", "sampler"), SAMPLERS, ids=lambda p: type(p).__name__ + str(getattr(p, "eta", ""))
)


@samplers
def test_a_policy_reproduces_its_samplers_samples(process: Schedule, sampler: GaussianSampler) -> None:
    """Bit for bit, given the same seeds: stepped by TorchRL, or collected without."""
    expected = sample(exact(process), (5, 2), sampler=sampler, num_steps=6, seed=3)
    noise = Noise.per_sample(range(3, 8))
    policy = policy_of(process, sampler)
    policy.generator = noise.generators
    env = env_of(process, num_steps=6, sampler=sampler, batch_size=[5], noise=noise)
    rollout = env.rollout(99, policy)
    assert rollout.shape == (5, 6)
    assert torch.equal(rollout["next", keys.X_T][:, -1], expected)
    collected = collect_rollout(
        policy, (2,), batch_size=5, generator=Noise.per_sample(range(3, 8)).generators
    )
    assert torch.equal(collected[keys.ACTION][:, -1], expected)


@samplers
def test_the_environment_applies_the_kernel_to_clean_estimates(
    process: Schedule, sampler: GaussianSampler
) -> None:
    """With action "x0_hat" the agent is the denoiser alone, and the samples are the same again."""
    expected = sample(exact(process), (5, 2), sampler=sampler, num_steps=6, noise=Noise(generator(3)))
    denoise = TensorDictModule(
        lambda x, t: exact(process)(x, t.squeeze(-1)), in_keys=[keys.X_T, keys.T], out_keys=[keys.ACTION]
    )
    env = env_of(process, sampler=sampler, action="x0_hat", batch_size=[5], noise=Noise(generator(3)))
    assert torch.equal(env.rollout(6, denoise)["next", keys.X_T][:, -1], expected)


@pytest.mark.parametrize("action", ["next_latent", "x0_hat"])
@pytest.mark.parametrize("seed", [0, 5])
def test_gymnasium_reproduces_the_pretrained_sampler(action: str, seed: int) -> None:
    """By the action that the environment recommends; a power of two as scale rounds nothing."""
    noise = Noise.per_sample(range(seed, seed + 4))
    expected = sample(exact(Flow()), (4, 2), sampler=Ancestral(), num_steps=5, seed=seed)
    env: Any = gymnasium.make_vec(ID, num_envs=4, num_steps=5, action=action, noise=noise)
    observation, _ = env.reset()
    for _ in range(5):
        observation, _, terminated, _, _ = env.step(env.unwrapped.pretrained_action())
    assert terminated.all()
    np.testing.assert_array_equal(observation["x_t"], expected.numpy())


COLLECTED: list[dict[str, Any]] = [
    {},
    {"pairs": True},
    {"group_size": 4},
    {"conditions": torch.arange(3)},
    {"conditions": torch.arange(3), "pairs": True},
    {"conditions": randn(5, 3, dtype=torch.float32), "group_size": 2},
]


@pytest.mark.parametrize("options", COLLECTED, ids=lambda o: ", ".join(o) or "plain")
def test_a_collected_rollout_equals_that_of_the_environment(options: dict[str, Any]) -> None:
    """The same keys, numbers and types, in float32 and in chain order."""
    has_labels = options.get("conditions") is not None and options["conditions"].ndim == 1
    denoiser = random_denoiser(Flow(), 2, num_classes=3) if has_labels else Zero()
    reward = labelled if has_labels else squares
    g = generator(3)
    env = env_of(reward=reward, batch_size=[8], noise=Noise(g), **options)
    policy = policy_of(Flow(), CPS(0.7), denoiser=denoiser)
    policy.generator = g
    with torch.no_grad():
        stepped = env.rollout(9, policy)
    groups = {k: v for k, v in options.items() if k != "conditions"}
    cond = stepped[keys.COND][:: env.group_size, 0] if "conditions" in options else None
    collected = collect_rollout(policy, (2,), batch_size=8, cond=cond, generator=generator(3), **groups)
    assert keys.REWARD not in collected["next"].keys()
    collected["next", keys.REWARD] = Terminal()(collected, reward)
    assert collected.shape == stepped.shape == (8, 6)
    assert collected.names == stepped.names
    assert set(collected.keys(True, True)) == set(stepped.keys(True, True))
    for key in stepped.keys(True, True):
        assert torch.equal(collected[key], stepped[key]), key
        assert collected[key].dtype == stepped[key].dtype
    assert not collected.requires_grad


def test_collecting_on_images_and_devices() -> None:
    rollout = collect_rollout(
        policy_of(Flow(), CPS(0.7), denoiser=Zero()),
        (1, 4, 4),
        batch_size=6,
        pairs=True,
        generator=generator(),
    )
    assert rollout[keys.X_T].shape == (6, 6, 1, 4, 4)
    for key in (keys.X_T, keys.ACTION):
        assert torch.isfinite(rollout[key]).all()
    env = env_of(event_shape=(1, 4, 4), batch_size=[6], pairs=True, noise=Noise(generator()))
    policy = policy_of(Flow(), CPS(0.7), denoiser=Zero())
    policy.generator = env.noise.generators
    assert torch.equal(env.rollout(6, policy)[keys.ACTION], rollout[keys.ACTION])


class Zero(nn.Module):
    process = Flow()

    def forward(self, x: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
        return 0 * x


# Groups, pairs and conditions


def test_pairs_share_their_first_latent() -> None:
    """Rows 2p and 2p+1; so the first clean estimate is the same too, and only the noise of steps differs."""
    env = env_of(batch_size=[8], pairs=True)
    td = env.rollout(6, policy_of(Flow(), CPS(0.7)))
    a, b = td[0::2], td[1::2]
    assert torch.equal(a[keys.X_T][:, 0], b[keys.X_T][:, 0])
    assert torch.equal(a[keys.X0_HAT][:, 0], b[keys.X0_HAT][:, 0])
    assert not torch.isclose(a[keys.X_T][:, 1:], b[keys.X_T][:, 1:]).all(-1).any()
    assert td[keys.GROUP][:, :, 0].tolist() == [[p] * 6 for p in (0, 0, 1, 1, 2, 2, 3, 3)]
    first = a[keys.X_T][:, 0]
    assert len({tuple(row) for row in first.tolist()}) == 4


@pytest.mark.parametrize("options", [{"pairs": True}, {"group_size": 4}, {}], ids=str)
def test_groups_share_their_condition(options: dict[str, Any]) -> None:
    env = env_of(reward=labelled, batch_size=[400], conditions=torch.tensor([1, 4, 6]), **options)
    td = env.reset()
    G = env.group_size
    cond, group = td[keys.COND].view(-1, G), td[keys.GROUP].view(-1, G)
    assert torch.equal(cond, cond[:, :1].expand_as(cond))
    assert torch.equal(group, torch.arange(400 // G)[:, None].expand(-1, G))
    shares = torch.bincount(cond[:, 0], minlength=8) / len(cond)
    assert set(cond.unique().tolist()) == {1, 4, 6}
    assert bool((shares[[1, 4, 6]] > 0.2).all())
    distinct = td[keys.X_T].unique(dim=0)
    assert len(distinct) == (200 if env.pairs else 400)


def test_the_reward_knows_the_condition() -> None:
    env = env_of(reward=labelled, batch_size=[6], conditions=torch.arange(5), group_size=3)
    td = env.rollout(6, policy_of(Flow(), CPS(0.7), denoiser=random_denoiser(Flow(), 2, num_classes=5)))
    expected = td[keys.COND][:, -1].float() + 0.01 * td[keys.ACTION][:, -1].sum(-1)
    torch.testing.assert_close(td["next", keys.REWARD][:, -1, 0], expected)
    A = group_advantages(td["next", keys.REWARD][:, -1, 0], td[keys.GROUP][:, 0], std="none")
    torch.testing.assert_close(A.view(2, 3).sum(1), torch.zeros(2), rtol=0, atol=1e-5)


def test_losses_take_a_rollout() -> None:
    """Of pairs: DDPO and SDPO, whose ratio is 1 before the first update."""
    policy = policy_of(Flow(), CPS(0.7), denoiser=random_denoiser(Flow(), 2))
    with torch.no_grad():
        td = env_of(batch_size=[8], pairs=True).rollout(6, policy)
    td[keys.ADVANTAGE] = randn(8, 6, 1, dtype=torch.float32)
    for loss in (DDPOLoss(policy), SDPOLoss(policy)):
        out = loss(td)
        assert float(out["ratio"]) == pytest.approx(1, abs=1e-6)
        out["loss_policy"].backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in policy.parameters())


# Rewards


def test_a_black_box_is_asked_once_for_each_sample() -> None:
    reward = BlackBox(squares)
    env = env_of(reward=reward, batch_size=[8])
    env.rollout(6, policy_of(Flow(), CPS(0.7)))
    assert env.reward is reward and reward.queries == 8
    dense = BlackBox(squares)
    td = env_of(reward=dense, batch_size=[8], reward_placement="dense").rollout(
        6, policy_of(Flow(), CPS(0.7))
    )
    assert dense.queries == 41  # of 48: from pure noise all eight estimates are the mean of the data
    assert dense.cache_hits == 7
    torch.testing.assert_close(td["next", keys.REWARD].squeeze(-1), -td[keys.X0_HAT].square().sum(-1))


def test_a_reward_that_fails_is_never_a_silent_zero() -> None:
    for broken in (lambda x0, c: torch.full((len(x0),), torch.nan), lambda x0, c: [[0.0]] * len(x0)):
        with pytest.raises(RewardError):
            env_of(reward=broken).rollout(6, policy_of(Flow(), CPS(0.7)))


def test_dense_rewards_need_the_clean_estimate() -> None:
    env = env_of(reward_placement="dense")
    with pytest.raises(ValueError, match="x0_hat, which the step lacks"):
        env.step(env.reset().set(keys.ACTION, torch.zeros(4, 2)))
