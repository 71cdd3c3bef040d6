"""The reward process: a chain solved by hand, the closed-form draw, and what TorchRL expects."""

from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
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
from diffrl.envs import DiffusionMRP, DiffusionMRPVectorEnv
from tests.kit.environments import FLAGS
from tests.kit.oracles import randn
from tests.kit.reward_process import ID, Given, labelled

EXACT = {"rtol": 0.0, "atol": 1e-12}
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
    return walk_torchrl(GymWrapper(gymnasium.make_vec(ID, autoreset_mode="Disabled", **variant)))


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
    noise = randn(5, K, 2, seed=1)
    env = DiffusionMRP(levels.process, randn(9, 2), **chain, batch_size=[5], noise=Given(noise))
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
    noise = randn(4, 6, 1, 8, 8, dtype=torch.float32)
    env = DiffusionMRP(
        diffrl.Flow(), digits(conditional=True), num_steps=6, batch_size=[4], noise=Given(noise)
    )
    rollout = env.rollout(6)
    first = rollout[:, 0]
    drawn = draw_chain(env.reward_process.chain, first[keys.X0], cond=first[keys.COND], noise=noise)
    for key in drawn.keys(True, True):
        torch.testing.assert_close(rollout[key], drawn[key], rtol=1e-5, atol=1e-5)


def test_cut_chains_are_the_beginning_of_whole_ones() -> None:
    noise = randn(5, 6, 2)
    x0 = randn(9, 2)
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
    env = DiffusionMRP(PROCESSES[process](), randn(9, 3, 2), num_steps=9, value=value, batch_size=[4])
    rollout = env.rollout(9)
    first = rollout[:, 0]
    A, kappa = first[keys.A].unsqueeze(-1), first[keys.KAPPA].unsqueeze(-1)
    mu = A * first[keys.X0] + kappa * first[keys.X_T]
    torch.testing.assert_close(rollout["next", keys.REWARD].sum(1), mu, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(rollout["next", keys.X_T][:, -1], first[keys.X0], **EXACT)


SPECS: list[tuple[Any, dict[str, Any]]] = [
    (randn(9, 2), {}),
    (rings(), {"batch_size": [4], "coupling": "shared"}),
    (randn(9, 1, 8, 8), {"batch_size": [2, 3], "reward_mode": "sum"}),
    (labelled(), {"batch_size": [], "max_steps": 2}),
    (labelled((1, 4, 4)), {"batch_size": [3]}),
    (randn(9, 2), {"num_steps": 1, "batch_size": [1]}),
]


@pytest.mark.parametrize(("data", "options"), SPECS, ids=lambda p: getattr(p, "name", "") or str(p)[:60])
def test_specs(data: Any, options: dict[str, Any]) -> None:
    env = DiffusionMRP(diffrl.EDM(), data, **{"num_steps": 5, **options})
    check_env_specs(env)
    b = env.batch_size
    assert env.action_spec.shape == b and env.action_spec.n == 1
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
            diffrl.EDM(), randn(9, 1, 2, 2), num_steps=4, batch_size=[3], reward_mode=m, seed=5
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
    law = Data("normal", randn(9, 2), draw=lambda n, g: torch.randn(n, 2, generator=g))
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
    env = DiffusionMRP(diffrl.EDM(), randn(9, 2), num_steps=K, batch_size=[3])
    at = torch.tensor([[0], [1], [3]])
    start = env.reset(TensorDict({keys.X0: randn(3, 2), keys.INDEX: at}, [3]), set_state=True)
    td = env.rollout(9, auto_reset=False, tensordict=start, break_when_any_done=False)
    expected = (at + torch.arange(9)) % K
    assert torch.equal(td[keys.INDEX].squeeze(-1), expected)
    assert torch.equal(td["next", keys.TERMINATED].squeeze(-1), expected == K - 1)
    same = (td[keys.X0][:, 1:] == td[keys.X0][:, :-1]).all(-1)
    assert torch.equal(same, expected[:, 1:] > 0)  # a datum for each chain


def test_set_state() -> None:
    noise = randn(2, 1, 2)
    env = DiffusionMRP(diffrl.EDM(), labelled(), num_steps=4, batch_size=[2], noise=Given(noise.float()))
    x0, cond = randn(2, 2, seed=3).float(), torch.tensor([2, 0])
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
    env = DiffusionMRP(diffrl.EDM(), randn(9, 2), num_steps=3, batch_size=[4])
    end = env.rollout(3)[:, -1]["next"].exclude(keys.REWARD, *FLAGS)
    after = env.step(end.set("action", env.action_spec.zero()))["next"]
    assert torch.equal(after[keys.X_T], end[keys.X_T])
    assert not after[keys.REWARD].any()
    assert after[keys.TERMINATED].all()


def test_device_follows_the_states() -> None:
    """Nothing in a step is tied to the CPU: a device without storage finds every tensor that is."""
    env = DiffusionMRP(diffrl.EDM(), randn(9, 2), num_steps=3, batch_size=[4])
    r = env.reward_process
    index, x = torch.zeros(4, dtype=torch.int64, device="meta"), torch.zeros(4, 2, device="meta")
    states, reward, terminated, truncated = r.step(r.start(index, x, x), x, x)
    for tensor in (states.x, states.t, states.A, states.kappa, reward, terminated, truncated):
        assert tensor.device.type == "meta"


def test_transforms_of_torchrl() -> None:
    env = DiffusionMRP(diffrl.EDM(), randn(9, 2), num_steps=5, batch_size=[4])
    env = TransformedEnv(env, Compose(RewardSum(), StepCounter()))
    rollout = env.rollout(5)
    torch.testing.assert_close(
        rollout["next", "episode_reward"][:, -1], rollout["next", "reward"].sum(1), **EXACT
    )
    assert rollout["next", "step_count"][:, :, 0].tolist() == [[1, 2, 3, 4, 5]] * 4


def test_collector_of_torchrl() -> None:
    env = DiffusionMRP(diffrl.EDM(), randn(9, 2), num_steps=5, batch_size=[4])
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
