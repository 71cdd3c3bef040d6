"""The decision process for Gymnasium: spaces, vectors of it, ways to make it, what is refused."""

import copy
import pickle
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
from tensordict import TensorDictBase
from torch import Tensor
from torchrl.envs import GymEnv, GymWrapper
from torchrl.envs.utils import check_env_specs, step_mdp

from diffrl import keys
from diffrl.data.files import digits
from diffrl.data.image_files import DataError
from diffrl.diffusion.samplers.ddim import DDIM, Ancestral
from diffrl.diffusion.schedules.flow import Flow
from diffrl.envs import DiffusionMDPEnv, DiffusionMDPVectorEnv
from tests.kit.decision_process import ID, env_of, squares
from tests.kit.environments import FLAGS, printed_by
from tests.kit.oracles import randn

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

        def run(env: Any, rows: slice | int) -> TensorDictBase:
            td, steps = env.reset(), []
            for k in range(K):
                steps.append(env.step(td.set(keys.ACTION, actions[rows, k])))  # noqa: B023
                td = step_mdp(steps[-1])
            return torch.stack(steps, -1)

        sampler = Ancestral()
        native = env_of(
            **common, sampler=sampler, batch_size=[n], noise=feed(slice(None)), action_scale="level"
        )
        expected = run(native, slice(None))
        variant = {**common, "reward": squares}
        views: list[tuple[Any, slice | int]] = [
            (
                GymWrapper(
                    gymnasium.make_vec(
                        ID, autoreset_mode="Disabled", num_envs=n, noise=feed(slice(None)), **variant
                    )
                ),
                slice(None),
            ),
            *((GymEnv(ID, noise=feed(row), **variant), row) for row in range(n)),
        ]
        for env, rows in views:
            stepped = run(env, rows)
            for key in (keys.X_T, keys.T, *(("next", k) for k in (keys.X_T, keys.T, keys.REWARD, *FLAGS))):
                assert torch.equal(stepped[key], expected[key][rows]), key


def test_torchrl_checks_its_view_and_restarts_chains() -> None:
    check_env_specs(GymEnv(ID, num_steps=3))
    env = GymWrapper(gymnasium.make_vec(ID, autoreset_mode="Disabled", num_envs=3, num_steps=4))
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
    assert default.autoreset_mode is default.metadata["autoreset_mode"] is AutoresetMode.NEXT_STEP
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
    env: Any = gymnasium.make(ID, num_steps=1, action_scale=4.0)
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
    assert printed_by(code, tmp_path) == "[False, False, True] False\n"


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
