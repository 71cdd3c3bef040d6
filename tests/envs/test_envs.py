"""Environments: a chain solved by hand, the closed-form draw, and what TorchRL and Gymnasium expect."""

import copy
import pickle
import re
import runpy
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.error import ResetNeeded
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode
from tensordict import TensorDict
from torch import Tensor
from torchrl.collectors import Collector
from torchrl.envs import Compose, GymEnv, GymWrapper, RewardSum, StepCounter, TransformedEnv
from torchrl.envs.utils import check_env_specs

import diffrl
from diffrl import keys
from diffrl.data.dataset import Data
from diffrl.data.files import digits
from diffrl.data.image_files import DataError
from diffrl.data.synthetic import rings
from diffrl.diffusion.chains import Chain
from diffrl.diffusion.schedules.registry import PROCESSES
from diffrl.diffusion.trajectories import draw_chain
from diffrl.envs import DiffusionMRP, DiffusionMRPEnv, DiffusionMRPVectorEnv
from tests.kit.paths import ROOT

ID = "DiffusionMRP-v0"
EXACT = {"rtol": 0.0, "atol": 1e-12}
FLAGS = (keys.TERMINATED, keys.TRUNCATED, keys.DONE)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


class Given:
    """A source of noise that hands out the rows of [B, K, *E], then numbers that must have no effect."""

    def __init__(self, noise: Tensor) -> None:
        self.noise, self.calls = noise, 0

    def __call__(self, x: Tensor) -> Tensor:
        k, self.calls = self.calls, self.calls + 1
        return self.noise[:, k].to(x).view(x.shape) if k < self.noise.shape[1] else torch.full_like(x, 1e3)


# A chain solved by hand. One dimension, VE, levels 3, 2, 1, then clean; x0 = 1, first noise 1: x = 1 + 3 = 4.
#
# Markov: Bayes' rule with prior x_s | x0 ~ N(1, s²) and likelihood x_t | x_s ~ N(x_s, t² - s²).
#   3 → 2: precision 1/4 + 1/5 = 9/20, mean (1/4 + 4/5)/(9/20) = 7/3, std √(20/9); noise 1/√5: 7/3 + 2/3 = 3
#   2 → 1: precision 1/1 + 1/3 = 4/3, mean (1/1 + 3/3)/(4/3) = 3/2, std √(3/4); noise 1/√3: 3/2 + 1/2 = 2
#   1 → 0: 1. Posterior means 7/3, 3/2, 1, then 0: rewards 5/6, 1/2, 1.
# Span 2. 3 → 1: precision 1/1 + 1/8 = 9/8, mean (1/1 + 4/8)/(9/8) = 4/3, std √(8/9); noise 1/√2: 2.
#   The values are still those of one level, 7/3, 1: rewards 4/3, 1.
# Stride 2: the values look two levels on, 4/3 from x = 4, and 1 where that is clean: rewards 1/3, 0, 1.
# Shared noise 1: states 1 + level, each the posterior mean of the one before, 3, 2, 1: rewards 1, 1, 1.
# 'clean' value: the posterior mean is x0 = 1 all along: rewards 0, 0, 1.
MARKOV = [1, 5**-0.5, 3**-0.5]
BY_HAND: dict[str, tuple[dict[str, Any], list[float], list[float], list[float]]] = {
    "markov": ({}, MARKOV, [4, 3, 2, 1], [5 / 6, 1 / 2, 1]),
    "span": ({"span": 2}, [1, 2**-0.5], [4, 2, 1], [4 / 3, 1]),
    "stride": ({"stride": 2.0}, MARKOV, [4, 3, 2, 1], [1 / 3, 0, 1]),
    "shared": ({"coupling": "shared"}, [1, 7, 7], [4, 3, 2, 1], [1, 1, 1]),
    "clean": ({"value": "clean"}, MARKOV, [4, 3, 2, 1], [0, 0, 1]),
    "cut": ({"max_steps": 2}, MARKOV, [4, 3, 2], [5 / 6, 1 / 2]),
}

Walk = tuple[list[float], list[float], list[bool], list[bool]]


def walk_gym(env: gymnasium.Env[Any, Any] | Any, batched: bool) -> Walk:
    at: Callable[[Any], Any] = (lambda a: a[0]) if batched else (lambda a: a)
    action = np.zeros(1, int) if batched else 0
    observation, _ = env.reset()
    walked: Any = ([at(observation["x_t"]).item()], [], [], [])
    while not (walked[2] and (walked[2][-1] or walked[3][-1])):
        observation, reward, terminated, truncated, _ = env.step(action)
        for column, entry in zip(
            walked, (at(observation["x_t"]), at(reward), at(terminated), at(truncated)), strict=True
        ):
            column.append(np.asarray(entry).item())
    return walked


def walk_torchrl(env: Any) -> Walk:
    td = env.rollout(10)
    states = torch.cat([td[keys.X_T][..., :1, :], td["next", keys.X_T]], dim=-2)
    columns = states, *(td["next", key] for key in (keys.REWARD, keys.TERMINATED, keys.TRUNCATED))
    x, r, terminated, truncated = (c.flatten().tolist() for c in columns)
    return x, r, terminated, truncated


def walk(form: str, noise: list[float], **variant: Any) -> Walk:
    level = {"process": diffrl.EDM(sigma_min=1.0, sigma_max=3.0, rho=1.0), "data": torch.ones(1, 1).double()}
    variant |= level | {
        "num_steps": 3,
        "noise": Given(torch.tensor(noise, dtype=torch.float64).view(1, -1, 1)),
    }
    if form == "native":
        return walk_torchrl(DiffusionMRP(**variant, batch_size=[]))
    if form == "native batch":
        return walk_torchrl(DiffusionMRP(**variant, batch_size=[1, 1]))
    if form == "gymnasium":
        return walk_gym(gymnasium.make(ID, **variant), batched=False)
    if form == "gymnasium vector":
        return walk_gym(gymnasium.make_vec(ID, **variant), batched=True)
    if form == "torchrl from gymnasium":
        return walk_torchrl(GymEnv(ID, **variant))
    return walk_torchrl(GymWrapper(gymnasium.make_vec(ID, **variant)))


FORMS = [
    "native",
    "native batch",
    "gymnasium",
    "gymnasium vector",
    "torchrl from gymnasium",
    "torchrl from vector",
]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", BY_HAND)
def test_chain_solved_by_hand(case: str, form: str) -> None:
    variant, noise, states, rewards = BY_HAND[case]
    x, r, terminated, truncated = walk(form, noise, **variant)
    np.testing.assert_allclose(x, states, rtol=0, atol=1e-12)
    np.testing.assert_allclose(r, rewards, rtol=0, atol=1e-12)
    ends = [False] * (len(rewards) - 1) + [True]
    never = [False] * len(rewards)
    assert (terminated, truncated) == ((never, ends) if case == "cut" else (ends, never))


# The native environment


def labelled(event: tuple[int, ...] = (2,)) -> Data:
    labels = torch.arange(50) % 3
    x = normal(50, *event, dtype=torch.float32)
    return Data("labelled", x, labels, x, labels, num_classes=3)


CHAINS: list[dict[str, Any]] = [
    {"num_steps": 1},
    {"num_steps": 6},
    {"num_steps": 6, "coupling": "shared"},
    {"num_steps": 6, "coupling": 0.5},
    {"num_steps": 7, "span": 3},
    {"num_steps": 6, "stride": 2.0, "value": "posterior_mean"},
    {"num_steps": 6, "span": 2, "coupling": "shared", "value": "clean"},
    {"num_steps": 3, "span": 5},
]


@pytest.mark.parametrize("process", sorted(PROCESSES))
@pytest.mark.parametrize("chain", CHAINS, ids=str)
def test_rollout_equals_the_closed_form(process: str, chain: dict[str, Any]) -> None:
    """The keys they share hold the same numbers, given the same noise."""
    levels = Chain(PROCESSES[process](), **{"coupling": "markov", **chain})
    K = levels.num_transitions
    noise = normal(5, K, 2, seed=1)
    env = DiffusionMRP(levels.process, normal(9, 2), **chain, batch_size=[5], noise=Given(noise))
    assert env.num_transitions == K
    rollout = env.rollout(K + 1)
    assert rollout.batch_size == (5, K)
    drawn = draw_chain(levels, rollout[keys.X0][:, 0], noise=noise)
    shared = set(drawn.keys(True, True)) & set(rollout.keys(True, True))
    assert shared == set(drawn.keys(True, True))
    for key in shared:
        # Paths multiply noise by ρ in one form, states by κ in the other: they part by rounding, times σ
        torch.testing.assert_close(rollout[key], drawn[key], rtol=1e-11, atol=1e-10)
        assert rollout[key].dtype == drawn[key].dtype


def test_rollout_equals_the_closed_form_on_images_with_labels() -> None:
    noise = normal(4, 6, 1, 8, 8, dtype=torch.float32)
    env = DiffusionMRP(
        diffrl.Flow(), digits(conditional=True), num_steps=6, batch_size=[4], noise=Given(noise)
    )
    rollout = env.rollout(6)
    first = rollout[:, 0]
    drawn = draw_chain(env.reward_process.chain, first[keys.X0], cond=first[keys.COND], noise=noise)
    for key in drawn.keys(True, True):
        torch.testing.assert_close(rollout[key], drawn[key], rtol=1e-5, atol=1e-5)


def test_cut_chains_are_the_beginning_of_whole_ones() -> None:
    noise = normal(5, 6, 2)
    x0 = normal(9, 2)
    whole, cut = (
        DiffusionMRP(
            diffrl.VP(), x0, num_steps=6, batch_size=[5], noise=Given(noise), max_steps=m, seed=0
        ).rollout(9)
        for m in (None, 4)
    )
    assert cut.shape == (5, 4)
    for key in (keys.X_T, ("next", keys.X_T), ("next", keys.REWARD), ("next", keys.TERMINATED)):
        torch.testing.assert_close(cut[key], whole[key][:, :4], **EXACT)
    assert cut["next", keys.TRUNCATED][:, :, 0].tolist() == [[False, False, False, True]] * 5
    assert not whole["next", keys.TRUNCATED].any()
    beyond = DiffusionMRP(diffrl.VP(), x0, num_steps=6, batch_size=[5], max_steps=6).rollout(9)
    assert beyond["next", keys.TERMINATED][:, -1].all()
    assert not beyond["next", keys.TRUNCATED].any()


@pytest.mark.parametrize("process", sorted(PROCESSES))
@pytest.mark.parametrize("value", ["posterior_mean", "clean"])
def test_rewards_sum_to_the_first_posterior_mean(process: str, value: str) -> None:
    env = DiffusionMRP(PROCESSES[process](), normal(9, 3, 2), num_steps=9, value=value, batch_size=[4])
    rollout = env.rollout(9)
    first = rollout[:, 0]
    A, kappa = first[keys.A].unsqueeze(-1), first[keys.KAPPA].unsqueeze(-1)
    mu = A * first[keys.X0] + kappa * first[keys.X_T]
    torch.testing.assert_close(rollout["next", keys.REWARD].sum(1), mu, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(rollout["next", keys.X_T][:, -1], first[keys.X0], **EXACT)


SPECS: list[tuple[Any, dict[str, Any]]] = [
    (normal(9, 2), {}),
    (rings(), {"batch_size": [4], "coupling": "shared"}),
    (normal(9, 1, 8, 8), {"batch_size": [2, 3], "reward_mode": "sum"}),
    (labelled(), {"batch_size": [], "max_steps": 2}),
    (labelled((1, 4, 4)), {"batch_size": [3]}),
    (normal(9, 2), {"num_steps": 1, "batch_size": [1]}),
]


@pytest.mark.parametrize(("data", "options"), SPECS, ids=lambda p: getattr(p, "name", "") or str(p)[:60])
def test_specs(data: Any, options: dict[str, Any]) -> None:
    env = DiffusionMRP(diffrl.EDM(), data, **{"num_steps": 5, **options})
    check_env_specs(env)
    b = env.batch_size
    assert env.action_spec.shape == (*b, 0)
    assert env.reward_spec.shape == (
        (*b, 1) if env.reward_mode == "sum" else (*b, *env.reward_process.event_shape)
    )
    names = {keys.X_T, keys.T, keys.X0, keys.A, keys.KAPPA, keys.INDEX}
    assert set(env.observation_spec.keys()) == names | (
        {keys.COND} if isinstance(data, Data) and data.num_classes else set()
    )


def test_scalar_reward_is_the_sum_of_the_vector() -> None:
    vector, scalar = (
        DiffusionMRP(
            diffrl.EDM(), normal(9, 1, 2, 2), num_steps=4, batch_size=[3], reward_mode=m, seed=5
        ).rollout(4)
        for m in ("vector", "sum")
    )
    torch.testing.assert_close(
        scalar["next", "reward"], vector["next", "reward"].flatten(2).sum(-1, keepdim=True)
    )


def test_seeds() -> None:
    def draw(seed: int | None) -> Tensor:
        return DiffusionMRP(diffrl.EDM(), rings(), num_steps=4, batch_size=[8], seed=seed).rollout(4)[
            keys.X_T
        ]

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))
    env = DiffusionMRP(diffrl.EDM(), rings(), num_steps=4, batch_size=[8])
    assert env.set_seed(1) != 1  # TorchRL's next seed
    rollout = env.rollout(4)[keys.X_T]
    assert torch.equal(rollout, draw(1))
    assert not torch.equal(rollout, env.rollout(4)[keys.X_T])
    before = torch.get_rng_state()
    env.rollout(4)
    assert torch.equal(torch.get_rng_state(), before)  # none of the global stream is used
    torch.manual_seed(7)
    one = draw(None)
    torch.manual_seed(7)
    assert torch.equal(draw(None), one)


def test_data_and_noise_have_no_numbers_in_common() -> None:
    """Seeding two streams alike would make the first noise equal to data that are drawn from the same law."""
    law = Data("normal", normal(9, 2), draw=lambda n, g: torch.randn(n, 2, generator=g))
    td = DiffusionMRP(diffrl.EDM(), law, num_steps=3, batch_size=[64], seed=0).reset()
    observation, info = DiffusionMRPVectorEnv(64, data=law, num_steps=3).reset(seed=0)
    for x, x0 in ((td[keys.X_T], td[keys.X0]), (torch.tensor(observation["x_t"]), torch.tensor(info["x0"]))):
        noise = (x - x0) / 80
        correlation = torch.corrcoef(torch.stack([noise.flatten(), x0.flatten()]).double())[0, 1]
        assert abs(correlation) < 0.4  # of 128 independent pairs it is normal, 0 ± 0.09


def test_partial_reset_leaves_the_others() -> None:
    env = DiffusionMRP(diffrl.EDM(), labelled(), num_steps=6, batch_size=[4])
    td = env.rollout(3)[:, -1]["next"].clone()
    mask = torch.tensor([True, False, False, True])
    again = env.reset(td.clone().set("_reset", mask.unsqueeze(-1)), set_state=False)
    assert again[keys.INDEX].flatten().tolist() == [0, 3, 3, 0]
    assert again[keys.T].flatten().tolist() == [80.0, *td[keys.T][1:3, 0].tolist(), 80.0]
    for key in (keys.X_T, keys.X0, keys.A, keys.KAPPA):
        assert torch.equal(again[key][~mask], td[key][~mask])
        assert not torch.equal(again[key][mask], td[key][mask])


def test_chains_out_of_step_restart_one_by_one() -> None:
    K = 4
    env = DiffusionMRP(diffrl.EDM(), normal(9, 2), num_steps=K, batch_size=[3])
    at = torch.tensor([[0], [1], [3]])
    start = env.reset(TensorDict({keys.X0: normal(3, 2), keys.INDEX: at}, [3]), set_state=True)
    td = env.rollout(9, auto_reset=False, tensordict=start, break_when_any_done=False)
    expected = (at + torch.arange(9)) % K
    assert torch.equal(td[keys.INDEX].squeeze(-1), expected)
    assert torch.equal(td["next", keys.TERMINATED].squeeze(-1), expected == K - 1)
    same = (td[keys.X0][:, 1:] == td[keys.X0][:, :-1]).all(-1)
    assert torch.equal(same, expected[:, 1:] > 0)  # a datum for each chain


def test_set_state() -> None:
    noise = normal(2, 1, 2)
    env = DiffusionMRP(diffrl.EDM(), labelled(), num_steps=4, batch_size=[2], noise=Given(noise.float()))
    x0, cond = normal(2, 2, seed=3).float(), torch.tensor([2, 0])
    td = env.reset(TensorDict({keys.X0: x0, keys.COND: cond}, [2]), set_state=True)
    torch.testing.assert_close(td[keys.X_T], x0 + 80 * noise[:, 0].float())
    assert torch.equal(td[keys.X0], x0)
    assert torch.equal(td[keys.COND], cond)
    whole = env.rollout(4)
    for k in range(4):  # every state of a rollout is a state to start from
        assert torch.equal(
            env.reset(whole[:, k].select(*env.observation_spec.keys()), set_state=True)[keys.A],
            whole[keys.A][:, k],
        )
    other = env.reset(TensorDict({keys.X0: x0, keys.COND: cond}, [2]), set_state=False)
    assert not torch.equal(other[keys.X0], x0)


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({keys.X0: None}, ValueError, "has no 'x0'"),
        ({keys.INDEX: None}, ValueError, "has no 'index'"),
        ({keys.COND: None}, ValueError, "3 classes: give cond"),
        ({keys.COND: torch.tensor([3, 0])}, ValueError, r"0\.\.2"),
        ({keys.X0: torch.zeros(2, 3)}, ValueError, r"x0 has shape \(2, 3\), but \(2, 2\)"),
        ({keys.X0: torch.zeros(2, 2, dtype=torch.int64)}, TypeError, "x0 has dtype torch.int64"),
        ({keys.X0: torch.tensor([[0.0, 0.0], [0.0, torch.nan]])}, DataError, "x0: sample 1"),
        ({keys.INDEX: torch.tensor([[0], [4]])}, ValueError, r"index in \[0, 3\]"),
    ],
    ids=lambda p: str(p)[:40],
)
def test_states_that_cannot_be_set(change: dict[str, Any], error: type[Exception], says: str) -> None:
    env = DiffusionMRP(diffrl.EDM(), labelled(), num_steps=4, batch_size=[2])
    state = dict(env.reset().select(*env.observation_spec.keys()).items()) | change
    td = TensorDict({k: v for k, v in state.items() if v is not None}, [2])
    with pytest.raises(error, match=says):
        env.reset(td, set_state=True)


def test_clean_data_stay_as_they_are() -> None:
    env = DiffusionMRP(diffrl.EDM(), normal(9, 2), num_steps=3, batch_size=[4])
    end = env.rollout(3)[:, -1]["next"].exclude(keys.REWARD, *FLAGS)
    after = env.step(end.set("action", env.action_spec.zero()))["next"]
    assert torch.equal(after[keys.X_T], end[keys.X_T])
    assert not after[keys.REWARD].any()
    assert after[keys.TERMINATED].all()


def test_device_follows_the_states() -> None:
    """Nothing in a step is tied to the CPU: a device without storage finds every tensor that is."""
    env = DiffusionMRP(diffrl.EDM(), normal(9, 2), num_steps=3, batch_size=[4])
    r = env.reward_process
    index, x = torch.zeros(4, dtype=torch.int64, device="meta"), torch.zeros(4, 2, device="meta")
    states, reward, terminated, truncated = r.step(r.start(index, x, x), x, x)
    for tensor in (states.x, states.t, states.A, states.kappa, reward, terminated, truncated):
        assert tensor.device.type == "meta"


def test_transforms_of_torchrl() -> None:
    env = DiffusionMRP(diffrl.EDM(), normal(9, 2), num_steps=5, batch_size=[4])
    env = TransformedEnv(env, Compose(RewardSum(), StepCounter()))
    rollout = env.rollout(5)
    torch.testing.assert_close(
        rollout["next", "episode_reward"][:, -1], rollout["next", "reward"].sum(1), **EXACT
    )
    assert rollout["next", "step_count"][:, :, 0].tolist() == [[1, 2, 3, 4, 5]] * 4


def test_collector_of_torchrl() -> None:
    env = DiffusionMRP(diffrl.EDM(), normal(9, 2), num_steps=5, batch_size=[4])
    collector = Collector(env, frames_per_batch=32, total_frames=64)
    batches = list(collector)
    collector.shutdown()
    assert [b.shape for b in batches] == [(4, 8), (4, 8)]
    index = torch.cat(batches, 1)[keys.INDEX].squeeze(-1)
    assert torch.equal(index, (torch.arange(16) % 5).expand(4, 16))


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"num_step": 3}, TypeError, "num_step"),
        ({"process": "edm"}, TypeError, "process is 'edm': give a schedule"),
        ({"data": [[0.0]]}, TypeError, "data is a list"),
        ({"data": torch.zeros(4)}, ValueError, r"data has shape \(4,\)"),
        ({"data": torch.zeros(4, 2, dtype=torch.uint8)}, TypeError, "data has dtype torch.uint8"),
        ({"data": torch.tensor([[0.0], [torch.inf]])}, DataError, "data: sample 1"),
        ({"max_steps": 0}, ValueError, "max_steps is 0"),
        ({"coupling": 1.5}, ValueError, "coupling is 1.5"),
        ({"reward_mode": "mean"}, ValueError, "reward_mode is 'mean'"),
    ],
    ids=lambda p: str(p)[:40],
)
def test_arguments_that_are_refused(arguments: dict[str, Any], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        DiffusionMRP(**{"process": diffrl.EDM(), "data": torch.zeros(4, 2), "num_steps": 3, **arguments})


# Gymnasium

VARIANTS: list[dict[str, Any]] = [
    {},
    {"process": "ddpm", "num_steps": 4, "reward_mode": "sum"},
    {
        "process": "vp",
        "data": "gmm",
        "process_kwargs": {"kind": "cosine"},
        "data_kwargs": {"dim": 3},
        "coupling": 0.5,
    },
    {"process": "flow", "data": "digits", "data_kwargs": {"conditional": True}, "num_steps": 8},
    {"data": "digits", "num_steps": 8, "span": 3, "stride": 0.5, "coupling": "shared", "reward_mode": "flat"},
    {"data": "moons", "value": "clean", "num_steps": 1},
]


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_gymnasium_checks_it(variant: dict[str, Any]) -> None:
    env = gymnasium.make(ID, **variant)
    with warnings.catch_warnings():  # states are unbounded, rewards an array
        warnings.filterwarnings("ignore", ".*A Box observation space m.* value is")
        warnings.filterwarnings("ignore", ".*The reward returned by `step..` must be a float")
        check_env(env.unwrapped)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_spaces_hold_what_is_returned(variant: dict[str, Any]) -> None:
    env: Any = gymnasium.make(ID, **variant)
    vector: Any = gymnasium.make_vec(ID, num_envs=3, **variant)
    K = env.unwrapped.reward_process.chain.num_transitions
    single, many = env.reset(seed=0)[0], vector.reset(seed=0)[0]
    for k in range(K):
        single, reward, terminated, _, info = env.step(env.action_space.sample())
        many, rewards, ended, _, infos = vector.step(vector.action_space.sample())
        assert single in env.observation_space
        assert many in vector.observation_space
        assert terminated == (k == K - 1)
        assert ended.tolist() == [terminated] * 3
        event = env.observation_space["x_t"].shape
        assert info["x0"].shape == event
        assert infos["x0"].shape == (3, *event)
        if variant.get("reward_mode") == "sum":
            assert isinstance(reward, float)
            assert not hasattr(env.unwrapped, "reward_space")
            np.testing.assert_allclose(reward, info["vector_reward"].sum(), rtol=1e-5)
            np.testing.assert_allclose(rewards, infos["vector_reward"].sum(1), rtol=1e-5)
        else:
            assert reward in env.unwrapped.reward_space
            assert rewards in vector.reward_space
            assert reward.size == env.unwrapped.reward_dim == vector.reward_dim
    np.testing.assert_array_equal(single["x_t"], info["x0"])
    np.testing.assert_array_equal(many["x_t"], infos["x0"])
    assert ("cond" in info) == ("cond" in infos) == (env.unwrapped.reward_process.num_classes > 0)


def test_gymnasium_equals_native_given_the_same_noise() -> None:
    """TorchRL's view of the single and of the vector environment, transition by transition."""
    x0, K, n = normal(2, 2, seed=4, dtype=torch.float32), 5, 2  # n = D: shapes alone cannot tell them apart
    noise = normal(n, K, 2, seed=5, dtype=torch.float32)
    native = DiffusionMRP(diffrl.Flow(), x0, num_steps=K, batch_size=[n], noise=Given(noise))
    start = native.reset(TensorDict({keys.X0: x0}, [n]), set_state=True)
    expected = native.rollout(K, auto_reset=False, tensordict=start)

    def same(env: Any, source: Given, rows: slice | int) -> None:
        assert env.reward_spec.shape == x0[rows].shape
        check_env_specs(env)
        source.calls = 0
        start = env.reset(options={"x0": x0[rows].numpy()})
        rollout = env.rollout(K, auto_reset=False, tensordict=start)
        for key in (keys.X_T, keys.T, *(("next", k) for k in (keys.X_T, keys.T, keys.REWARD, *FLAGS))):
            assert torch.equal(rollout[key], expected[key][rows]), key

    variant = {"process": "flow", "num_steps": K}
    source = Given(noise)
    same(GymWrapper(gymnasium.make_vec(ID, num_envs=n, noise=source, **variant)), source, slice(None))
    for row in range(n):
        source = Given(noise[row : row + 1])
        same(GymEnv(ID, noise=source, **variant), source, row)


def test_torchrl_restarts_the_chains_of_a_vector_environment() -> None:
    """With autoreset disabled the clean state is kept, and the next chain starts at the noisiest level."""
    env = GymWrapper(gymnasium.make_vec(ID, num_envs=3, num_steps=4))
    td = env.rollout(9, break_when_any_done=False)
    t = torch.tensor([*diffrl.EDM().time_grid(4).float().tolist()])
    index = torch.arange(9) % 4
    torch.testing.assert_close(td[keys.T].squeeze(-1), t[index].expand(3, 9))
    torch.testing.assert_close(td["next", keys.T].squeeze(-1), t[index + 1].expand(3, 9))


def test_vector_equals_single_environments() -> None:
    """A list of seeds gives each chain the numbers of a single environment, through partial resets too."""
    variant = {"data": "digits", "data_kwargs": {"conditional": True}, "process": "vp", "num_steps": 4}
    seeds = [3, 0, 11]
    singles = [DiffusionMRPEnv(**variant) for _ in seeds]
    vector = DiffusionMRPVectorEnv(3, **variant)
    many, infos = vector.reset(seed=seeds)
    seen = [env.reset(seed=s) for env, s in zip(singles, seeds, strict=True)]

    def same() -> None:
        for row, (observation, info) in enumerate(seen):
            for key in observation:
                np.testing.assert_array_equal(many[key][row], observation[key])
            for key in info:
                np.testing.assert_array_equal(infos[key][row], info[key])

    same()
    mask = np.array([True, False, True])
    for k in range(6):
        many, rewards, *ended, infos = vector.step(np.zeros(3, int))
        for row, env in enumerate(singles):
            observation, reward, *over, info = env.step(0)
            seen[row] = observation, info
            np.testing.assert_array_equal(rewards[row], reward)
            assert [bool(e[row]) for e in ended] == over
        same()
        if k == 1:  # two start anew before their chain has ended
            many, infos = vector.reset(options={"reset_mask": mask})
            for row in (0, 2):
                seen[row] = singles[row].reset()
            same()
        elif np.logical_or(*ended).any():
            many, infos = vector.reset(options={"reset_mask": np.logical_or(*ended)})
            for row in np.flatnonzero(np.logical_or(*ended)).tolist():
                seen[row] = singles[row].reset()
            same()


def test_gymnasium_seeds() -> None:
    def draw(seed: int | None, env: Any) -> Any:
        return env.reset(seed=seed)[0]["x_t"], env.step(env.action_space.sample() * 0)[0]["x_t"]

    for make in (lambda: gymnasium.make(ID), lambda: gymnasium.make_vec(ID, num_envs=3)):
        env = make()
        first = draw(1, env)
        np.testing.assert_array_equal(first, draw(1, make()))
        assert not np.array_equal(first, draw(None, env))
        assert not np.array_equal(first, draw(2, env))
        assert not np.array_equal(draw(None, make()), draw(None, make()))


def test_environments_copy_and_pickle() -> None:
    env = gymnasium.make(ID, data="moons")
    env.reset(seed=0)
    copies: list[Any] = [copy.deepcopy(env), pickle.loads(pickle.dumps(env))]
    expected = env.step(0)[0]["x_t"]
    for other in copies:
        np.testing.assert_array_equal(other.step(0)[0]["x_t"], expected)


def test_arrays_handed_out_are_the_callers() -> None:
    env: Any = gymnasium.make(ID, num_steps=3)
    twin: Any = gymnasium.make(ID, num_steps=3)
    for e in (env, twin):
        e.reset(seed=0)
    observation, reward, *_, info = env.step(0)
    twin.step(0)
    for array in (observation["x_t"], observation["t"], reward, info["x0"]):
        array[...] = 1e6
    np.testing.assert_array_equal(env.step(0)[0]["x_t"], twin.step(0)[0]["x_t"])


def test_ways_to_make_it() -> None:
    default: Any = gymnasium.make_vec(ID, num_envs=2)
    named: Any = gymnasium.make_vec(
        ID, num_envs=2, vectorization_mode="vector_entry_point", max_episode_steps=2
    )
    assert isinstance(default, DiffusionMRPVectorEnv)
    assert isinstance(named, DiffusionMRPVectorEnv)
    assert default.autoreset_mode is default.metadata["autoreset_mode"] is AutoresetMode.DISABLED
    named.reset()
    assert [named.step(np.zeros(2, int))[3].tolist() for _ in range(2)] == [[False] * 2, [True] * 2]
    limited: Any = gymnasium.make(ID, max_episode_steps=2)
    limited.reset()
    assert [limited.step(0)[3] for _ in range(2)] == [False, True]
    scalar: Any = gymnasium.make_vec(ID, num_envs=2, vectorization_mode="sync", reward_mode="sum")
    scalar.reset()
    assert scalar.step(np.zeros(2, int))[1].shape == (2,)
    given: Any = gymnasium.make(ID, process=diffrl.Flow(shift=2.0), data=normal(4, 3))
    assert given.reset(options={"x0": [1.0, 2.0, 3.0]})[1]["x0"].tolist() == [1.0, 2.0, 3.0]


def test_bare_script(tmp_path: Path) -> None:
    """No import of diffrl, and none of torchrl by Gymnasium's side."""
    code = (
        "import gymnasium, sys\n"
        "env = gymnasium.make('diffrl:DiffusionMRP-v0', num_steps=3)\n"
        "env.reset(seed=0)\n"
        "print([env.step(0)[2] for _ in range(3)], 'torchrl' in sys.modules)"
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


def test_wrappers_of_mo_gymnasium() -> None:
    import mo_gymnasium
    from mo_gymnasium.wrappers import LinearReward, MORecordEpisodeStatistics
    from mo_gymnasium.wrappers.vector import MOSyncVectorEnv

    def run(env: Any, **reset: Any) -> tuple[list[Any], dict[str, Any]]:
        env.reset(**reset)
        rewards, over, info = [], False, {}
        while not over:
            _, reward, terminated, truncated, info = env.step(0)
            rewards.append(reward)
            over = terminated or truncated
        return rewards, info

    rewards, _ = run(mo_gymnasium.make(ID), seed=0)
    weighted, _ = run(LinearReward(gymnasium.make(ID), weight=np.array([2.0, -1.0])), seed=0)
    np.testing.assert_allclose(weighted, np.array(rewards) @ [2.0, -1.0], rtol=1e-6)
    for variant in ({}, {"data": "digits", "reward_mode": "flat", "num_steps": 3}):
        rewards, info = run(MORecordEpisodeStatistics(gymnasium.make(ID, **variant)), seed=0)
        np.testing.assert_allclose(info["episode"]["r"], np.sum(rewards, axis=0), rtol=1e-4, atol=1e-4)
        assert info["episode"]["l"] == len(rewards)
    vector = MOSyncVectorEnv([lambda: gymnasium.make(ID, num_steps=3)] * 2)
    vector.reset(seed=0)
    assert [vector.step(np.zeros(2, int))[2].tolist() for _ in range(3)] == [[False] * 2] * 2 + [[True] * 2]


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"num_step": 3}, TypeError, "unexpected keyword argument 'num_step'"),
        ({"process": "emd"}, ValueError, "process is 'emd': choose from ddpm, edm, flow, vp"),
        ({"data": "ring"}, ValueError, "data is 'ring': choose from .*rings"),
        ({"process_kwargs": {"sigma": 3}}, TypeError, "process_kwargs has no 'sigma': 'edm' takes sigma_min"),
        ({"data_kwargs": {"mods": 3}}, TypeError, "data_kwargs has no 'mods': 'rings' takes modes"),
        ({"process": diffrl.EDM(), "process_kwargs": {"rho": 3}}, ValueError, "goes with a name"),
        ({"reward_mode": "mean"}, ValueError, "reward_mode is 'mean'"),
        ({"num_steps": 0}, ValueError, "num_steps is 0"),
    ],
    ids=lambda p: str(p)[:40],
)
def test_keywords_that_are_refused(arguments: dict[str, Any], error: type[Exception], says: str) -> None:
    for make in (gymnasium.make, gymnasium.make_vec):
        with pytest.raises(error, match=says):
            make(ID, **arguments)


def test_calls_that_are_refused() -> None:
    env = DiffusionMRPEnv(num_steps=1)
    with pytest.raises(ResetNeeded, match=r"chains \[0\] of 1 are not running: call reset"):
        env.step(0)
    env.reset()
    with pytest.raises(ValueError, match="action is 1"):
        env.step(1)
    env.step(0)
    with pytest.raises(ResetNeeded):
        env.step(0)
    with pytest.raises(ValueError, match="options has no 'xo': choose from x0, cond"):
        env.reset(options={"xo": 1})
    with pytest.raises(TypeError, match="x0 has dtype torch.int64"):
        env.reset(options={"x0": [1, 2]})
    vector = DiffusionMRPVectorEnv(3, num_steps=1)
    vector.reset(options={"reset_mask": np.array([True, False, True])})
    with pytest.raises(ResetNeeded, match=r"chains \[1\] of 3"):
        vector.step(np.zeros(3, int))
    with pytest.raises(ValueError, match="reset_mask is int64"):
        vector.reset(options={"reset_mask": np.ones(3, int)})
    with pytest.raises(ValueError, match="2 seeds for 3 chains"):
        vector.reset(seed=[0, 1])
    with pytest.raises(ValueError, match="num_envs is 0"):
        DiffusionMRPVectorEnv(0)
    with pytest.raises(ValueError, match="give cond beside x0"):
        DiffusionMRPEnv(data=labelled((1, 8, 8))).reset(options={"x0": np.zeros((1, 8, 8))})
    with pytest.raises(ValueError, match="0 classes: leave cond out"):
        DiffusionMRPEnv().reset(options={"x0": np.zeros(2), "cond": 1})
    with pytest.raises(ValueError, match="cond is given without x0"):
        DiffusionMRPEnv(data=labelled((1, 8, 8))).reset(options={"cond": 1})


@pytest.mark.parametrize("process", ["flow", "edm"])
def test_example(process: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Values and returns agree over many chains, as it says."""
    main = runpy.run_path(str(ROOT / "examples" / "gymnasium_loop.py"))["main"]
    main(out=str(tmp_path / "chain.png"), process=process, num_steps=4)
    assert (tmp_path / "chain.png").stat().st_size > 10_000
    last = capsys.readouterr().out.splitlines()[-1].partition(":")[2]
    mean, error = np.array(re.findall(r"[-\d.e]+", last), float).reshape(2, 2)
    assert (error > 0).all()
    assert (abs(mean) < 4 * error + 1e-4).all()
