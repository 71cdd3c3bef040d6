"""The decision process: chains solved by hand, the pretrained sampler reproduced, what the two frameworks expect."""

import copy
import math
import pickle
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.error import ResetNeeded
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule
from torch import Tensor, nn
from torchrl.collectors import Collector
from torchrl.envs import Compose, GymEnv, GymWrapper, RewardSum, StepCounter, TransformedEnv
from torchrl.envs.utils import check_env_specs, step_mdp
from torchrl.objectives import ClipPPOLoss

import diffrl
from diffrl import keys
from diffrl.data.files import digits
from diffrl.data.image_files import DataError
from diffrl.data.synthetic import rings
from diffrl.diffusion.denoisers import Denoiser
from diffrl.diffusion.exact import MixtureDenoiser
from diffrl.diffusion.networks.mlp import MLP
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
from diffrl.envs import DiffusionMDP, DiffusionMDPEnv, DiffusionMDPVectorEnv
from diffrl.finetuning.methods.ddpo import DDPOLoss
from diffrl.finetuning.methods.sdpo import SDPOLoss
from diffrl.finetuning.placement.terminal import Terminal
from diffrl.finetuning.policy import DenoisingPolicy
from diffrl.finetuning.rollouts.chains import collect_rollout
from diffrl.rewards.black_box import BlackBox
from diffrl.rewards.calls import RewardError
from diffrl.rewards.mode_distance import ModeDistance
from diffrl.rl.advantages import group_advantages
from tests.kit.oracles import generator, randn
from tests.kit.paths import ROOT

ID = "DiffusionMDP-v0"
FLAGS = (keys.TERMINATED, keys.TRUNCATED, keys.DONE)


def exact(process: Schedule) -> MixtureDenoiser:
    m = rings().mixture
    assert m is not None
    return MixtureDenoiser(process, m.means, m.stds, m.weights)


def squares(x0: Tensor, cond: Any = None) -> Tensor:
    """A reward: -|x0|²."""
    return -x0.flatten(1).square().sum(1)


def labelled(x0: Tensor, cond: Tensor) -> Tensor:
    """A reward that depends on the label."""
    return cond.float() + 0.01 * x0.flatten(1).sum(1)


def policy_of(process: Schedule, sampler: GaussianSampler, K: int = 6, **options: Any) -> DenoisingPolicy:
    options = {"reduction": "mean", "denoiser": exact(process)} | options
    return DenoisingPolicy(options.pop("denoiser"), sampler, num_steps=K, **options)


def env_of(process: Schedule | None = None, reward: Any = squares, **options: Any) -> DiffusionMDP:
    options = {"event_shape": (2,), "num_steps": 6, "batch_size": [4], "seed": 0} | options
    return DiffusionMDP(process or Flow(), reward, **options)


def network(process: Schedule, num_classes: int = 0) -> Denoiser:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        mlp = MLP((2,), hidden=32, depth=2, num_classes=num_classes)
        for parameter in mlp.parameters():
            nn.init.normal_(parameter, std=0.2)
    return Denoiser(mlp, process)


# A chain of two steps solved by hand. One dimension, rectified flow, levels 1 and 1/2, then clean; first noise 3:
# x = 3. R(x0) = -x0².
#
# Next latents 2 and 1/2: those are the states, rewards 0 and -1/4.
# Clean estimates 1 and 1/2. Without fresh noise ½·1 + ½ (3 - 0·1)/1 = 2, then ½: rewards 0 and -1/4.
#   With all noise afresh (at pure noise the posterior knows nothing of the state): ½·1 + ½·3 = 2, noise 3 again.
#   Dense rewards are those of the estimates, -1 and -1/4.
#   Flow SDE, a = 1: sd² = 1/(1-½) = 2, h = -½, v = (3-1)/1 = 2: 3 (1 - ½) - 2·½ + √2·√½·3 = 3.5;
#   then t = ½: sd² = 1, v = (3.5 - ½)/½ = 6: 3.5 (1 - ½) + 6 (1 + ½)(-½) + √½·3 = -2.75 + 3/√2.
LAST = -2.75 + 3 / 2**0.5
BY_HAND: dict[str, tuple[dict[str, Any], list[float], list[float], list[float]]] = {
    "next latent": ({}, [2, 0.5], [3, 2, 0.5], [0, -0.25]),
    "ddim": ({"action": "x0_hat", "sampler": DDIM(0.0)}, [1, 0.5], [3, 2, 0.5], [0, -0.25]),
    "ancestral": ({"action": "x0_hat", "sampler": Ancestral()}, [1, 0.5], [3, 2, 0.5], [0, -0.25]),
    "cps": ({"action": "x0_hat", "sampler": CPS(1.0)}, [1, 0.5], [3, 2, 0.5], [0, -0.25]),
    "flow sde": ({"action": "x0_hat", "sampler": FlowSDE(1.0)}, [1, 0.5], [3, 3.5, LAST], [0, -(LAST**2)]),
    "dense": (
        {"action": "x0_hat", "sampler": DDIM(0.0), "reward_placement": "dense"},
        [1, 0.5],
        [3, 2, 0.5],
        [-1, -0.25],
    ),
    "cut": ({"max_steps": 1}, [2], [3, 2], [0]),
}
Walk = tuple[list[float], list[float], list[bool], list[bool]]


def walk_gym(env: Any, actions: list[float], batched: bool) -> Walk:
    at: Callable[[Any], Any] = (lambda a: a[0]) if batched else (lambda a: a)
    observation, _ = env.reset()
    walked: Any = ([at(observation["x_t"]).item()], [], [], [])
    for action in actions:
        a = np.full(env.action_space.shape, action / 4, np.float32)
        observation, *outcome, _ = env.step(a)
        for column, entry in zip(walked, (observation["x_t"], *outcome), strict=True):
            column.append(np.asarray(at(entry)).item())
    return walked


def walk_torchrl(env: Any, actions: list[float], unit: float) -> Walk:
    td, steps = env.reset(), []
    for action in actions:
        a = torch.full(env.full_action_spec["action"].shape, action / unit)
        steps.append(env.step(td.set("action", a)))
        td = step_mdp(steps[-1])
    rollout = torch.stack(steps)
    columns = [rollout["next", key] for key in (keys.REWARD, keys.TERMINATED, keys.TRUNCATED)]
    x = [steps[0][keys.X_T], *(s["next", keys.X_T] for s in steps)]
    return [float(v) for v in x], *(c.flatten().tolist() for c in columns)  # type: ignore[return-value]


def walk(form: str, actions: list[float], **variant: Any) -> Walk:
    variant |= {"num_steps": 2, "noise": lambda x: torch.full_like(x, 3.0)}
    if form.startswith("native"):
        batch = [1, 1] if form == "native batch" else []
        env = DiffusionMDP(Flow(), squares, event_shape=(1,), batch_size=batch, **variant)
        return walk_torchrl(env, actions, 1.0)
    variant |= {
        "process": "flow",
        "data": "gmm",
        "data_kwargs": {"dim": 1},
        "reward": squares,
        "action_scale": 4.0,
    }
    if form == "gymnasium":
        return walk_gym(gymnasium.make(ID, **variant), actions, batched=False)
    if form == "gymnasium vector":
        return walk_gym(gymnasium.make_vec(ID, **variant), actions, batched=True)
    if form == "torchrl from gymnasium":
        return walk_torchrl(GymEnv(ID, **variant), actions, 4.0)
    return walk_torchrl(GymWrapper(gymnasium.make_vec(ID, **variant)), actions, 4.0)


@pytest.mark.parametrize(
    "form",
    [
        "native",
        "native batch",
        "gymnasium",
        "gymnasium vector",
        "torchrl from gymnasium",
        "torchrl from vector",
    ],
)
@pytest.mark.parametrize("case", BY_HAND)
def test_chain_solved_by_hand(case: str, form: str) -> None:
    variant, actions, states, rewards = BY_HAND[case]
    x, r, terminated, truncated = walk(form, actions, **variant)
    np.testing.assert_allclose(x, states, rtol=1e-6)
    np.testing.assert_allclose(r, rewards, rtol=1e-6)
    ends = [False] * (len(rewards) - 1) + [True]
    never = [False] * len(rewards)
    assert (terminated, truncated) == ((never, ends) if case == "cut" else (ends, never))


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
    denoiser = network(Flow(), 3) if has_labels else Zero()
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
    td = env.rollout(6, policy_of(Flow(), CPS(0.7), denoiser=network(Flow(), 5)))
    expected = td[keys.COND][:, -1].float() + 0.01 * td[keys.ACTION][:, -1].sum(-1)
    torch.testing.assert_close(td["next", keys.REWARD][:, -1, 0], expected)
    A = group_advantages(td["next", keys.REWARD][:, -1, 0], td[keys.GROUP][:, 0], std="none")
    torch.testing.assert_close(A.view(2, 3).sum(1), torch.zeros(2), rtol=0, atol=1e-5)


def test_losses_take_a_rollout() -> None:
    """Of pairs: DDPO and SDPO, whose ratio is 1 before the first update."""
    policy = policy_of(Flow(), CPS(0.7), denoiser=network(Flow()))
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


# The native environment

SPECS: list[dict[str, Any]] = [
    {},
    {"batch_size": []},
    {"batch_size": [2, 3], "max_steps": 2},
    {"batch_size": [6], "pairs": True, "conditions": torch.arange(3)},
    {"conditions": randn(5, 2, 3, dtype=torch.float32)},
    {"event_shape": (1, 4, 4), "action": "x0_hat", "sampler": Ancestral()},
    {"reward_placement": "dense"},
    {"num_steps": 1, "sampler": CPS(0.5)},
]


@pytest.mark.parametrize("options", SPECS, ids=lambda o: ", ".join(o) or "plain")
def test_specs(options: dict[str, Any]) -> None:
    env = env_of(**options)
    check_env_specs(env)
    b, d = env.batch_size, env.decision_process
    assert env.reward_spec.shape == (*b, 1)
    assert env.full_action_spec["action"].shape == (*b, *d.event_shape)
    assert set(env.observation_spec.keys()) == {keys.X_T, keys.T, keys.INDEX, keys.GROUP} | (
        {keys.COND} if "conditions" in options else set()
    )


def test_seeds() -> None:
    def draw(seed: int | None) -> Tensor:
        return env_of(seed=seed, conditions=torch.arange(9), batch_size=[8]).reset()[keys.X_T]

    assert torch.equal(draw(1), draw(1)) and not torch.equal(draw(1), draw(2))
    env = env_of(seed=None, conditions=torch.arange(9), batch_size=[8])
    env.set_seed(1)
    first = env.reset()
    assert torch.equal(first[keys.X_T], draw(1))
    assert not torch.equal(first[keys.X_T], env.reset()[keys.X_T])
    before = torch.get_rng_state()
    env.reset()
    assert torch.equal(torch.get_rng_state(), before)  # none of the global stream is used
    torch.manual_seed(7)
    one = draw(None)
    torch.manual_seed(7)
    assert torch.equal(draw(None), one)


def random_steps(env: DiffusionMDP, td: TensorDictBase, n: int) -> TensorDictBase:
    for _ in range(n):
        td = step_mdp(env.step(td.set(keys.ACTION, torch.randn(4, 2, generator=generator(9)))))
    return td


def test_partial_reset_leaves_the_others() -> None:
    env = env_of(reward=labelled, conditions=torch.arange(50))
    td = random_steps(env, env.reset(), 3)
    mask = torch.tensor([True, False, False, True])
    again = env.reset(td.clone().set("_reset", mask.unsqueeze(-1)), set_state=False)
    assert again[keys.INDEX].flatten().tolist() == [0, 3, 3, 0]
    assert torch.equal(again[keys.X_T][~mask], td[keys.X_T][~mask])
    assert not torch.equal(again[keys.X_T][mask], td[keys.X_T][mask])
    assert torch.equal(again[keys.COND][~mask], td[keys.COND][~mask])
    assert again[keys.GROUP].flatten().tolist() == [0, 1, 2, 3]
    pairs = env_of(pairs=True)
    td = random_steps(pairs, pairs.reset(), 3)
    with pytest.raises(ValueError, match="groups of 2 rows start together"):
        pairs.reset(td.clone().set("_reset", mask.unsqueeze(-1)), set_state=False)
    whole = pairs.reset(
        td.clone().set("_reset", torch.tensor([True, True, False, False]).unsqueeze(-1)), set_state=False
    )
    assert torch.equal(whole[keys.X_T][0], whole[keys.X_T][1])
    assert torch.equal(whole[keys.X_T][2:], td[keys.X_T][2:])


def test_chains_out_of_step_restart_one_by_one() -> None:
    K = 4
    env = env_of(reward=labelled, num_steps=K, batch_size=[3], conditions=torch.arange(1, 9))
    policy = policy_of(Flow(), CPS(0.7), K=K)
    at = torch.tensor([[0], [1], [3]])
    start = env.reset(TensorDict({keys.X_T: torch.zeros(3, 2), keys.INDEX: at}, [3]), set_state=True)
    td = env.rollout(9, policy, auto_reset=False, tensordict=start, break_when_any_done=False)
    expected = (at + torch.arange(9)) % K
    assert torch.equal(td[keys.INDEX].squeeze(-1), expected)
    assert torch.equal(td["next", keys.TERMINATED].squeeze(-1), expected == K - 1)
    paid, clean = td["next", keys.REWARD].squeeze(-1), expected == K - 1
    torch.testing.assert_close(paid, torch.where(clean, td[keys.COND] + 0.01 * td[keys.ACTION].sum(-1), 0.0))


def test_set_state() -> None:
    env = env_of(reward=labelled, batch_size=[2], conditions=torch.arange(5))
    x = randn(2, 2, dtype=torch.float32)
    td = env.reset(TensorDict({keys.X_T: x, keys.COND: torch.tensor([3, 1])}, [2]), set_state=True)
    assert torch.equal(td[keys.X_T], x) and td[keys.COND].tolist() == [3, 1]
    assert td[keys.T].flatten().tolist() == [1.0, 1.0]
    whole = env.rollout(6, policy_of(Flow(), CPS(0.7), denoiser=network(Flow(), 5)))
    for k in range(6):  # every state of a rollout is a state to start from
        state = whole[:, k].select(*env.observation_spec.keys())
        again = env.reset(state.clone(), set_state=True)
        for key in env.observation_spec.keys():
            assert torch.equal(again[key], state[key])
    other = env.reset(TensorDict({keys.X_T: x}, [2]), set_state=False)
    assert not torch.equal(other[keys.X_T], x)
    cond = torch.tensor([4, 2])
    assert env.reset(TensorDict({keys.COND: cond}, [2]), set_state=True)[keys.COND].tolist() == [4, 2]


@pytest.mark.parametrize(
    ("state", "error", "says"),
    [
        ({keys.INDEX: torch.zeros(4, 1, dtype=torch.int64)}, ValueError, "no 'x_t' for that position"),
        ({keys.X_T: torch.zeros(4, 3)}, ValueError, r"x_t has shape \(4, 3\), but \(4, 2\)"),
        ({keys.X_T: torch.zeros(4, 2, dtype=torch.int64)}, TypeError, "x_t has dtype torch.int64"),
        ({keys.X_T: torch.full((4, 2), torch.nan)}, DataError, "x_t: sample 0"),
        ({keys.X_T: torch.zeros(4, 2), keys.INDEX: torch.full((4, 1), 6)}, ValueError, r"index in \[0, 5\]"),
        ({keys.COND: torch.zeros(4, dtype=torch.int64)}, ValueError, "the environment has no conditions"),
    ],
    ids=lambda p: str(p)[:40],
)
def test_states_that_cannot_be_set(state: dict[str, Tensor], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        env_of().reset(TensorDict(state, [4]), set_state=True)


def test_clean_data_stay_as_they_are() -> None:
    reward = BlackBox(squares)
    env = env_of(reward=reward)
    end = env.rollout(6, policy_of(Flow(), CPS(0.7)))[:, -1]["next"].exclude(keys.REWARD, *FLAGS)
    asked = reward.queries
    after = env.step(end.set(keys.ACTION, torch.ones(4, 2)))["next"]
    assert torch.equal(after[keys.X_T], end[keys.X_T])
    assert after[keys.TERMINATED].all() and not after[keys.REWARD].any() and reward.queries == asked


def test_device_follows_the_states() -> None:
    """Nothing in a step is tied to the CPU: a device without storage finds every tensor that is."""
    d = env_of(sampler=CPS(0.5)).decision_process
    x = torch.zeros(4, 2, device="meta")
    latents = d.start(x)
    assert latents.x.device.type == latents.t.device.type == latents.index.device.type == "meta"
    assert d.latents(latents.index, x).t.device.type == "meta"


def test_transforms_and_collector_of_torchrl() -> None:
    policy = policy_of(Flow(), CPS(0.7), K=5)
    env = TransformedEnv(env_of(num_steps=5), Compose(RewardSum(), StepCounter()))
    rollout = env.rollout(5, policy)
    torch.testing.assert_close(rollout["next", "episode_reward"][:, -1], rollout["next", "reward"].sum(1))
    collector = Collector(
        env_of(num_steps=5),
        policy,
        frames_per_batch=32,
        total_frames=64,
        auto_register_policy_transforms=False,
    )
    batches = list(collector)
    collector.shutdown()
    assert [b.shape for b in batches] == [(4, 8), (4, 8)]
    index = torch.cat(batches, 1)[keys.INDEX].squeeze(-1)
    assert torch.equal(index, (torch.arange(16) % 5).expand(4, 16))


def test_ppo_loss_of_torchrl() -> None:
    """The clipped surrogate is that of DDPO, gradients too; and its updates raise the reward."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        denoiser = Denoiser(MLP((2,), hidden=32, depth=2), Flow())
    policy = policy_of(Flow(), CPS(0.7), K=4, denoiser=denoiser, reduction="sum")
    policy.generator = generator(1)
    env = env_of(reward=ModeDistance([0.5, 0.0]), num_steps=4, batch_size=[64])
    ppo = ClipPPOLoss(policy, critic_network=None, critic_coeff=None, entropy_bonus=False, clip_epsilon=0.2)
    ddpo = DDPOLoss(policy, clip_range=0.2, advantage_clip=1e9)

    def collect() -> TensorDictBase:
        with torch.no_grad():
            td = env.rollout(4, policy)
        r = td["next", keys.REWARD].sum(1, keepdim=True)
        td[keys.ADVANTAGE] = ((r - r.mean()) / r.std()).expand(64, 4, 1)
        return td[:, :3]  # all but the deterministic step

    td = collect()
    with torch.no_grad():
        for p in policy.parameters():
            p.add_(0.02 * torch.randn(p.shape, generator=generator(4)))
    ours, theirs = ddpo(td)["loss_policy"], ppo(td)["loss_objective"]
    torch.testing.assert_close(ours, theirs)
    expected = torch.autograd.grad(ours, list(policy.parameters()))
    optimiser = torch.optim.Adam(ppo.parameters(), lr=1e-2)
    theirs.backward()
    for parameter, gradient in zip(ppo.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-6)
    before = collect_rollout(policy, (2,), batch_size=512, generator=generator(5))
    for _ in range(25):
        td = collect()
        for _ in range(2):
            optimiser.zero_grad()
            ppo(td)["loss_objective"].backward()
            optimiser.step()
    after = collect_rollout(policy, (2,), batch_size=512, generator=generator(6))
    rewards = [env.reward(t["next", keys.X_T][:, -1], None) for t in (before, after)]
    error = math.sqrt(math.fsum(float(r.var()) for r in rewards) / 512)
    assert float(rewards[1].mean() - rewards[0].mean()) > 4 * error


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"num_step": 3}, TypeError, "num_step"),
        ({"process": "flow"}, TypeError, "process is 'flow': give a schedule"),
        ({"reward": 3.0}, TypeError, "reward is 3.0: give a callable"),
        ({"action": "x0"}, ValueError, "action is 'x0': give 'next_latent' or 'x0_hat'"),
        ({"action": "x0_hat"}, ValueError, "'x0_hat' needs a sampler"),
        ({"reward_placement": "sparse"}, ValueError, "reward_placement is 'sparse'"),
        ({"sampler": diffrl.Heun()}, TypeError, r"Heun\(\) has steps without a law"),
        ({"num_steps": 0}, ValueError, "num_steps is 0"),
        ({"max_steps": 0}, ValueError, "max_steps is 0"),
        ({"group_size": 0}, ValueError, "group_size is 0"),
        ({"pairs": True, "group_size": 3}, ValueError, "group_size is 3.*for pairs leave it out"),
        ({"pairs": True, "batch_size": [3]}, ValueError, r"batch_size is \[3\]: groups of 2 rows"),
        ({"group_size": 2, "batch_size": [2, 2]}, ValueError, "groups of 2 rows need one dim"),
        ({"conditions": torch.zeros(0)}, ValueError, "conditions have shape"),
    ],
    ids=lambda p: str(p)[:40],
)
def test_arguments_that_are_refused(change: dict[str, Any], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        env_of(**change)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"batch_size": 7, "pairs": True}, "batch_size is 7: give a multiple of the group size, 2"),
        ({"group_size": 3, "pairs": True}, "for pairs leave it out"),
        ({"cond": torch.arange(3)}, "3 conditions for 8 groups"),
    ],
    ids=str,
)
def test_sizes_that_do_not_fit(change: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        collect_rollout(policy_of(Flow(), CPS(0.7)), (2,), **{"batch_size": 8, **change})


# Gymnasium

VARIANTS: list[dict[str, Any]] = [
    {},
    {"action": "x0_hat", "num_steps": 4},
    {"process": "edm", "num_steps": 5, "data": "gmm", "data_kwargs": {"dim": 3}, "action_scale": 512.0},
    {"action": "x0_hat", "reward_placement": "dense", "sampler": "cps", "sampler_kwargs": {"eta": 0.3}},
    {
        "action": "x0_hat",
        "sampler": "flow_sde",
        "process_kwargs": {"shift": 2.0},
        "data": "moons",
        "reward": squares,
    },
    {"data": "digits", "reward": "ink", "num_steps": 3, "conditions": torch.arange(10)},
    {"conditions": randn(5, 3, dtype=torch.float32), "process": "vp", "num_steps": 1},
]


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: ", ".join(v) or "plain")
def test_gymnasium_checks_it_without_a_warning(variant: dict[str, Any]) -> None:
    check_env(gymnasium.make(ID, **variant).unwrapped)


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: ", ".join(v) or "plain")
def test_spaces_hold_what_is_returned(variant: dict[str, Any]) -> None:
    env: Any = gymnasium.make(ID, **variant)
    vector: Any = gymnasium.make_vec(ID, num_envs=3, **variant)
    K = env.unwrapped.decision_process.num_steps
    single, many = env.reset(seed=0)[0], vector.reset(seed=0)[0]
    assert ("cond" in single) == ("conditions" in variant)
    for k in range(K):
        single, reward, terminated, truncated, info = env.step(env.action_space.sample())
        many, rewards, ended, _, infos = vector.step(vector.action_space.sample())
        assert single in env.observation_space
        assert many in vector.observation_space
        assert (terminated, truncated) == (k == K - 1, False)
        assert ended.tolist() == [terminated] * 3
        assert isinstance(reward, float) and rewards.shape == (3,)
        assert info["index"] == k + 1 and infos["index"].tolist() == [k + 1] * 3


def test_gymnasium_equals_native_given_the_same_actions_and_noise() -> None:
    """TorchRL's view of the single and of the vector environment, transition by transition."""
    K, n = 5, 2  # n = D: shapes alone cannot tell them apart
    actions, noise = randn(n, K, 2, dtype=torch.float32).clamp(-1, 1), randn(n, K + 1, 2, seed=5)
    for action in ("next_latent", "x0_hat"):
        common = {"num_steps": K, "action": action}

        def feed(rows: slice | int) -> Callable[[Tensor], Tensor]:
            calls = iter(range(K + 1))
            return lambda x: noise[rows, next(calls)].view(x.shape).to(x)  # noqa: B023

        def run(env: Any, rows: slice | int, scale: float = 1.0) -> TensorDictBase:
            td, steps = env.reset(), []
            for k in range(K):
                steps.append(env.step(td.set(keys.ACTION, scale * actions[rows, k])))  # noqa: B023
                td = step_mdp(steps[-1])
            return torch.stack(steps, -1)

        native = env_of(**common, sampler=Ancestral(), batch_size=[n], noise=feed(slice(None)))
        scale = 4.0 if action == "next_latent" else 1.0
        expected = run(native, slice(None), scale)
        variant = {**common, "reward": squares}
        views: list[tuple[Any, slice | int]] = [
            (GymWrapper(gymnasium.make_vec(ID, num_envs=n, noise=feed(slice(None)), **variant)), slice(None)),
            *((GymEnv(ID, noise=feed(row), **variant), row) for row in range(n)),
        ]
        for env, rows in views:
            stepped = run(env, rows)
            for key in (keys.X_T, keys.T, *(("next", k) for k in (keys.X_T, keys.T, keys.REWARD, *FLAGS))):
                assert torch.equal(stepped[key], expected[key][rows]), key


def test_torchrl_checks_its_view_and_restarts_chains() -> None:
    check_env_specs(GymEnv(ID, num_steps=3))
    env = GymWrapper(gymnasium.make_vec(ID, num_envs=3, num_steps=4))
    check_env_specs(env)
    td = env.rollout(9, break_when_any_done=False)
    t, index = Flow().time_grid(4).float(), torch.arange(9) % 4
    torch.testing.assert_close(td[keys.T].squeeze(-1), t[index].expand(3, 9))
    torch.testing.assert_close(td["next", keys.T].squeeze(-1), t[index + 1].expand(3, 9))


def test_vector_equals_single_environments() -> None:
    """A list of seeds gives each chain the numbers of a single environment, through partial resets too."""
    variant = {"num_steps": 4, "action": "x0_hat", "conditions": torch.arange(20)}
    seeds = [3, 0, 11]
    singles = [DiffusionMDPEnv(**variant) for _ in seeds]
    vector = DiffusionMDPVectorEnv(3, **variant)
    many, infos = vector.reset(seed=seeds)
    seen = [env.reset(seed=s) for env, s in zip(singles, seeds, strict=True)]
    actions = randn(6, 3, 2, dtype=torch.float32).clamp(-1, 1).numpy()

    def same() -> None:
        for row, (observation, info) in enumerate(seen):
            for key in observation:
                np.testing.assert_array_equal(many[key][row], observation[key])
            assert infos["index"][row] == info["index"]

    same()
    mask = np.array([True, False, True])
    for k in range(6):
        many, rewards, *ended, infos = vector.step(actions[k])
        for row, env in enumerate(singles):
            observation, reward, *over, info = env.step(actions[k, row])
            seen[row] = observation, info
            assert rewards[row] == pytest.approx(reward)
            assert [bool(e[row]) for e in ended] == over
        same()
        restart = mask if k == 1 else np.logical_or(*ended)  # two start anew before their chain has ended
        if restart.any():
            many, infos = vector.reset(options={"reset_mask": restart})
            for row in np.flatnonzero(restart).tolist():
                seen[row] = singles[row].reset()
            same()


def test_gymnasium_seeds() -> None:
    def draw(seed: int | None, env: Any) -> Any:
        return env.reset(seed=seed)[0]["x_t"], env.step(np.zeros(env.action_space.shape, np.float32))[0][
            "x_t"
        ]

    for make in (gymnasium.make, gymnasium.make_vec):
        env = make(ID, action="x0_hat")
        first = draw(1, env)
        np.testing.assert_array_equal(first, draw(1, make(ID, action="x0_hat")))
        assert not np.array_equal(first, draw(None, env))
        assert not np.array_equal(first, draw(2, env))
        assert not np.array_equal(draw(None, make(ID)), draw(None, make(ID)))


def test_environments_copy_and_pickle() -> None:
    env = gymnasium.make(ID, action="x0_hat")
    env.reset(seed=0)
    copies: list[Any] = [copy.deepcopy(env), pickle.loads(pickle.dumps(env))]
    zero = np.zeros(2, np.float32)
    expected = env.step(zero)[0]["x_t"]
    for other in copies:
        np.testing.assert_array_equal(other.step(zero)[0]["x_t"], expected)


def test_arrays_are_not_shared_with_the_caller() -> None:
    env: Any = gymnasium.make(ID, num_steps=3)
    twin: Any = gymnasium.make(ID, num_steps=3)
    for e in (env, twin):
        e.reset(seed=0)
    action = np.full(2, 0.5, np.float32)
    observation, *_ = env.step(action)
    twin.step(np.full(2, 0.5, np.float32))
    action[...] = observation["x_t"][...] = observation["t"][...] = 1e6
    assert env.unwrapped._chains.latents.x.tolist() == twin.unwrapped._chains.latents.x.tolist()
    np.testing.assert_array_equal(env.unwrapped._chains.latents.t, twin.unwrapped._chains.latents.t)


def test_ways_to_make_it() -> None:
    default: Any = gymnasium.make_vec(ID, num_envs=2)
    named: Any = gymnasium.make_vec(
        ID, num_envs=2, vectorization_mode="vector_entry_point", max_episode_steps=2
    )
    assert isinstance(default, DiffusionMDPVectorEnv) and isinstance(named, DiffusionMDPVectorEnv)
    assert default.autoreset_mode is default.metadata["autoreset_mode"] is AutoresetMode.DISABLED
    named.reset()
    zero = np.zeros((2, 2), np.float32)
    assert [named.step(zero)[3].tolist() for _ in range(2)] == [[False] * 2, [True] * 2]
    limited: Any = gymnasium.make(ID, max_episode_steps=2)
    limited.reset()
    assert [limited.step(zero[0])[3] for _ in range(2)] == [False, True]
    sync: Any = gymnasium.make_vec(ID, num_envs=2, vectorization_mode="sync")
    sync.reset()
    assert sync.step(zero)[1].shape == (2,)
    given: Any = gymnasium.make(ID, process=Flow(shift=2.0), data=digits(), reward="ink", sampler=DDIM(0.5))
    x = np.full((1, 8, 8), 0.25)
    observation, info = given.reset(options={"x_t": x, "index": 3})
    np.testing.assert_array_equal(observation["x_t"], x)
    assert info["index"] == 3
    own: Any = gymnasium.make(ID, denoiser=lambda x, t, cond: 0 * x, action="x0_hat")
    own.reset()
    np.testing.assert_array_equal(own.unwrapped.pretrained_action(), np.zeros(2))


def test_the_default_reward_is_minus_the_squared_distance_to_a_mode() -> None:
    env: Any = gymnasium.make(ID, num_steps=1)
    env.reset()
    assert env.step(np.array([0.1, 0.05], np.float32))[1] == pytest.approx(-((0.4 - 0.8) ** 2 + 0.2**2))


def test_bare_script(tmp_path: Path) -> None:
    """No import of diffrl, and none of torchrl by Gymnasium's side."""
    code = (
        "import gymnasium, numpy, sys\n"
        "env = gymnasium.make('diffrl:DiffusionMDP-v0', num_steps=3)\n"
        "env.reset(seed=0)\n"
        "zero = numpy.zeros(2, numpy.float32)\n"
        "print([env.step(zero)[2] for _ in range(3)], 'torchrl' in sys.modules)"
    )
    ran = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "PATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.stdout == "[False, False, True] False\n", ran.stderr


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"num_step": 3}, TypeError, "unexpected keyword argument 'num_step'"),
        ({"process": "emd"}, ValueError, "process is 'emd': choose from ddpm, edm, flow, vp"),
        ({"reward": "inc"}, ValueError, "reward is 'inc': choose from .*ink"),
        (
            {"sampler": "heun"},
            ValueError,
            "sampler is 'heun': choose from ancestral, consistency, cps, ddim, euler",
        ),
        ({"sampler_kwargs": {"eta": 1.0}}, TypeError, "sampler_kwargs has no 'eta'"),
        ({"reward": squares, "reward_kwargs": {"a": 1}}, ValueError, "reward_kwargs goes with a name"),
        ({"data": "moons"}, ValueError, "mode_distance needs a point"),
        ({"reward_placement": "dense"}, ValueError, "only action 'x0_hat' brings"),
        ({"action_scale": 0.0}, ValueError, "action_scale is 0.0"),
        ({"num_steps": 0}, ValueError, "num_steps is 0"),
    ],
)
def test_keywords_that_are_refused(arguments: dict[str, Any], error: type[Exception], says: str) -> None:
    for make in (gymnasium.make, gymnasium.make_vec):
        with pytest.raises(error, match=says):
            make(ID, **arguments)


def test_calls_that_are_refused() -> None:
    zero = np.zeros(2, np.float32)
    env = DiffusionMDPEnv(num_steps=1)
    for call in (lambda: env.step(zero), env.pretrained_action):
        with pytest.raises(ResetNeeded, match=r"chains \[0\] of 1 are not running: call reset"):
            call()
    env.reset()
    bad: Sequence[tuple[Any, type[Exception], str]] = [
        (np.zeros(3, np.float32), ValueError, r"action has shape \(3,\), but \(2,\)"),
        (np.zeros(2, int), TypeError, "action has dtype torch.int64"),
        (np.array([np.nan, 0], np.float32), DataError, "action"),
    ]
    for action, error, says in bad:
        with pytest.raises(error, match=says):
            env.step(action)
    env.step(zero)  # it runs on after what was refused
    options: Sequence[tuple[dict[str, Any], str]] = [
        ({"x0": zero}, "options has no 'x0': choose from x_t, index, cond"),
        ({"index": 0}, "no 'x_t' for that position"),
        ({"x_t": zero, "index": 1}, r"index is \[1\]: give whole numbers in \[0, 0\]"),
        ({"x_t": np.zeros(3)}, r"x_t has shape \(3,\)"),
        ({"cond": 1}, "the environment has no conditions"),
    ]
    for option, says in options:
        with pytest.raises(ValueError, match=says):
            env.reset(options=option)
    with pytest.raises(ValueError, match="cond is torch.float64"):
        DiffusionMDPEnv(conditions=torch.arange(3)).reset(options={"cond": 0.5})
    vector = DiffusionMDPVectorEnv(3, num_steps=1)
    vector.reset(options={"reset_mask": np.array([True, False, True])})
    with pytest.raises(ResetNeeded, match=r"chains \[1\] of 3"):
        vector.step(np.zeros((3, 2), np.float32))
    with pytest.raises(ValueError, match="reset_mask is int64"):
        vector.reset(options={"reset_mask": np.ones(3, int)})
    with pytest.raises(ValueError, match="2 seeds for 3 chains"):
        vector.reset(seed=[0, 1])
    with pytest.raises(ValueError, match="num_envs is 0"):
        DiffusionMDPVectorEnv(0)
    moons = DiffusionMDPEnv(data="moons", reward=squares)
    moons.reset()
    with pytest.raises(ValueError, match="exact denoiser of these data is not known"):
        moons.pretrained_action()


@pytest.mark.slow
def test_an_outside_agent_learns() -> None:
    """Stable-baselines3's PPO, which knows nothing of diffusion, comes closer to the mode than the sampler does."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its dependencies
        from stable_baselines3 import PPO
        from stable_baselines3.common.env_util import make_vec_env
    variant = {"num_steps": 4, "action": "x0_hat"}
    n = 1000

    def rewards(act: Callable[[Any, Any], Any]) -> np.ndarray:
        env: Any = gymnasium.make_vec(ID, num_envs=n, **variant)
        observation, _ = env.reset(seed=10)
        total = np.zeros(n)
        for _ in range(4):
            observation, reward, *_ = env.step(act(env, observation))
            total += reward
        return total

    agent = PPO(
        "MultiInputPolicy",
        make_vec_env(lambda: gymnasium.make(ID, **variant), 8, seed=0),
        n_steps=128,
        batch_size=256,
        n_epochs=4,
        learning_rate=3e-3,
        gamma=1.0,
        seed=0,
        device="cpu",
        policy_kwargs={"net_arch": [32, 32]},
    )
    pretrained = rewards(lambda env, _: env.unwrapped.pretrained_action())
    before = rewards(lambda _, observation: agent.predict(observation)[0])
    agent.learn(12_288)
    after = rewards(lambda _, observation: agent.predict(observation)[0])
    for other in (before, pretrained):
        error = ((after.var() + other.var()) / n) ** 0.5
        assert after.mean() - other.mean() > 5 * error
    assert after.mean() > before.mean() / 2  # rewards are negative: less than half the squared distance
