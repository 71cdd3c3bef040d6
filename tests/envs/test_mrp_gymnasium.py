"""The reward process for Gymnasium: spaces, vectors of it, ways to make it, what is refused."""

import copy
import pickle
import re
import runpy
import warnings
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
from torchrl.envs import GymEnv, GymWrapper
from torchrl.envs.utils import check_env_specs

import diffrl
from diffrl import keys
from diffrl.envs import DiffusionMRP, DiffusionMRPEnv, DiffusionMRPVectorEnv
from tests.kit.environments import FLAGS, printed_by
from tests.kit.oracles import randn
from tests.kit.paths import ROOT
from tests.kit.reward_process import ID, Given, labelled

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
            assert all(row in vector.reward_space for row in rewards)
            assert reward.size == env.unwrapped.reward_dim == vector.reward_dim
    np.testing.assert_array_equal(single["x_t"], info["x0"])
    np.testing.assert_array_equal(many["x_t"], infos["x0"])
    assert ("cond" in info) == ("cond" in infos) == (env.unwrapped.reward_process.num_classes > 0)


def test_gymnasium_equals_native_given_the_same_noise() -> None:
    """TorchRL's view of the single and of the vector environment, transition by transition."""
    x0, K, n = randn(2, 2, seed=4, dtype=torch.float32), 5, 2  # n = D: shapes alone cannot tell them apart
    noise = randn(n, K, 2, seed=5, dtype=torch.float32)
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
    same(
        GymWrapper(gymnasium.make_vec(ID, autoreset_mode="Disabled", num_envs=n, noise=source, **variant)),
        source,
        slice(None),
    )
    for row in range(n):
        source = Given(noise[row : row + 1])
        same(GymEnv(ID, noise=source, **variant), source, row)


def test_torchrl_restarts_the_chains_of_a_vector_environment() -> None:
    """With autoreset disabled the clean state is kept, and the next chain starts at the noisiest level."""
    env = GymWrapper(gymnasium.make_vec(ID, autoreset_mode="Disabled", num_envs=3, num_steps=4))
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
    assert default.autoreset_mode is default.metadata["autoreset_mode"] is AutoresetMode.NEXT_STEP
    named.reset()
    assert [named.step(np.zeros(2, int))[3].tolist() for _ in range(2)] == [[False] * 2, [True] * 2]
    limited: Any = gymnasium.make(ID, max_episode_steps=2)
    limited.reset()
    assert [limited.step(0)[3] for _ in range(2)] == [False, True]
    scalar: Any = gymnasium.make_vec(ID, num_envs=2, vectorization_mode="sync", reward_mode="sum")
    scalar.reset()
    assert scalar.step(np.zeros(2, int))[1].shape == (2,)
    given: Any = gymnasium.make(ID, process=diffrl.Flow(shift=2.0), data=randn(4, 3))
    assert given.reset(options={"x0": [1.0, 2.0, 3.0]})[1]["x0"].tolist() == [1.0, 2.0, 3.0]


def test_bare_script(tmp_path: Path) -> None:
    """No import of diffrl, and none of torchrl by Gymnasium's side."""
    code = (
        "import gymnasium, sys\n"
        "env = gymnasium.make('diffrl:DiffusionMRP-v0', num_steps=3)\n"
        "env.reset(seed=0)\n"
        "print([env.step(0)[2] for _ in range(3)], 'torchrl' in sys.modules)"
    )
    assert printed_by(code, tmp_path) == "[False, False, True] False\n"


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
