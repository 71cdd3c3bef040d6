"""Software from outside takes the environments: Stable-Baselines3, TorchRL, MO-Gymnasium, Minari, replay buffers."""

import warnings
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from tensordict.nn import TensorDictModule
from torch import Tensor
from torchrl.data import LazyMemmapStorage, ReplayBuffer
from torchrl.envs import GymWrapper
from torchrl.modules import ValueOperator
from torchrl.objectives import TD3Loss

import diffrl
from diffrl import keys
from diffrl.diffusion import add_coefficients
from diffrl.envs import DiffusionMRP, DiffusionMRPEnv, sb3_vec_env
from diffrl.errors import InputError
from diffrl.rewards.black_box import BlackBox
from tests.kit.decision_process import env_of, squares
from tests.kit.networks import random_denoiser
from tests.kit.oracles import randn

MDP, MRP = "DiffusionMDP-v0", "DiffusionMRP-v0"


def vec_env(form: str = MDP, n: int = 3, **variant: Any) -> Any:
    return sb3_vec_env(gymnasium.make_vec(form, num_envs=n, autoreset_mode="SameStep", **variant))


def test_a_vec_env_of_sb3_equals_its_own() -> None:
    """Held against a list of single environments, through restarts, with what ended chains ended with."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its dependencies
        from stable_baselines3.common.vec_env import DummyVecEnv
    for form, variant in (
        (MDP, {"num_steps": 3}),
        (MRP, {"num_steps": 4, "max_steps": 2, "reward_mode": "sum"}),
    ):
        ours, theirs = vec_env(form, **variant), DummyVecEnv([lambda: gymnasium.make(form, **variant)] * 3)  # noqa: B023
        for env in (ours, theirs):
            env.seed(5)
            env.action_space.seed(0)
        a, b = ours.reset(), theirs.reset()
        ended = 0
        for _ in range(7):
            for key in b:
                np.testing.assert_allclose(a[key], b[key], rtol=1e-5)
            action = np.stack([ours.action_space.sample() for _ in range(3)])
            (a, r, done, infos), (b, r_, done_, infos_) = ours.step(action), theirs.step(action)
            np.testing.assert_allclose(r, r_, rtol=1e-4, atol=1e-6)
            assert done.tolist() == done_.tolist()
            for info, other in zip(infos, infos_, strict=True):
                assert info["index"] == other["index"]
                assert info.get("TimeLimit.truncated", False) == other["TimeLimit.truncated"]
                assert ("terminal_observation" in info) == ("terminal_observation" in other)
                if "terminal_observation" in info:
                    ended += 1
                    for key, x in other["terminal_observation"].items():
                        np.testing.assert_allclose(info["terminal_observation"][key], x, rtol=1e-5)
        assert ended >= 6
    assert ours.get_attr("num_envs") == [3] * 3 and ours.env_is_wrapped(object) == [False] * 3
    actions = vec_env(n=2)
    actions.reset()
    assert np.shape(actions.env_method("pretrained_action")) == (2, 2)


def test_what_sb3_cannot_take() -> None:
    with pytest.raises(
        InputError, match="autoreset_mode is 'NextStep': make the environment with 'SameStep'"
    ):
        sb3_vec_env(gymnasium.make_vec(MDP))
    with pytest.raises(InputError, match="rewards are vectors: make the environment with reward_mode='sum'"):
        vec_env(MRP)


def test_episode_statistics_of_mo_gymnasium_for_vectors() -> None:
    """Its wrapper reads the reward space of one chain; TorchRL's reads that of all of them, though n = D."""
    from mo_gymnasium.wrappers.vector import MORecordEpisodeStatistics

    env = MORecordEpisodeStatistics(gymnasium.make_vec(MRP, num_envs=2, num_steps=3))
    env.reset(seed=0)
    total = np.zeros((2, 2))
    for _ in range(3):
        _, reward, *_, infos = env.step(np.zeros(2, int))
        total += reward
    np.testing.assert_allclose(infos["episode"]["r"], total, rtol=1e-5)
    assert infos["episode"]["l"].tolist() == [3, 3]
    for n in (2, 3):
        viewed = GymWrapper(gymnasium.make_vec(MRP, num_envs=n, autoreset_mode="Disabled"))
        assert viewed.reward_spec.shape == (n, 2)
    assert not hasattr(gymnasium.make_vec(MRP, reward_mode="sum"), "reward_space")


@pytest.mark.parametrize("data", ["points", "labelled digits"])
def test_rollouts_enter_a_memory_mapped_buffer(data: str, tmp_path: Path) -> None:
    law = randn(9, 2) if data == "points" else diffrl.data.digits(conditional=True)
    rollout = DiffusionMRP(diffrl.EDM(), law, num_steps=4, batch_size=[6], seed=0).rollout(4)
    buffer = ReplayBuffer(storage=LazyMemmapStorage(6, scratch_dir=tmp_path), batch_size=6)
    buffer.extend(rollout)
    for key in rollout.keys(True, True):
        assert torch.equal(buffer[:][key], rollout[key]), key


def test_data_of_the_gymnasium_form_feed_the_value_loss() -> None:
    """With A and κ of the infos, or with none of them: the loss of the native rollout, given the same noise."""
    x0, K = randn(3, 2, dtype=torch.float32), 4
    noise = randn(K + 1, 3, 2, seed=5, dtype=torch.float32)

    def feed() -> Any:
        calls = iter(noise)
        return lambda x: next(calls, noise[0]).view(x.shape)

    def rollout(with_infos: bool) -> Any:
        variant = {"data": x0, "process": "flow", "num_steps": K}
        single = gymnasium.make_vec(
            MRP, num_envs=3, autoreset_mode="Disabled", noise=lambda x: source[0](x), **variant
        )
        source[0] = torch.zeros_like
        env = GymWrapper(single)
        if with_infos:
            env = env.auto_register_info_dict()
        source[0] = feed()
        start = env.reset(options={"x0": x0.numpy()})
        return env.rollout(K, auto_reset=False, tensordict=start)

    source: list[Any] = [None]
    native = DiffusionMRP(diffrl.Flow(), x0, num_steps=K, batch_size=[3], noise=feed())
    start = native.reset(native.reset().set(keys.X0, x0).select(keys.X0), set_state=True)
    native.noise = feed()
    start = native.reset(start.select(keys.X0), set_state=True)
    expected = native.rollout(K, auto_reset=False, tensordict=start)
    loss = diffrl.objectives.ValueLoss(random_denoiser(diffrl.Flow(), 2), lmbda=0.5)
    for with_infos in (True, False):
        chain = rollout(with_infos)
        assert torch.equal(chain[keys.X_T], expected[keys.X_T])
        if with_infos:
            assert chain[keys.A].shape == chain[keys.T].shape == (3, K, 1)
        else:
            chain = add_coefficients(chain, native.reward_process.chain)
        torch.testing.assert_close(
            loss(chain)["loss_value"], loss(expected)["loss_value"], rtol=1e-4, atol=1e-6
        )


def test_infos_have_the_same_keys_at_resets_and_steps() -> None:
    for form, variant in ((MRP, {"reward_mode": "sum"}), (MRP, {}), (MDP, {})):
        for make in (gymnasium.make, gymnasium.make_vec):
            env: Any = make(form, **variant)
            start, after = env.reset(seed=0)[1], env.step(env.action_space.sample())[4]
            assert start.keys() == after.keys()
            for key in start:
                assert np.shape(start[key]) == np.shape(after[key])
    env = DiffusionMRPEnv(reward_mode="sum")
    assert not env.reset()[1]["vector_reward"].any() and env.step(0)[4]["vector_reward"].any()


@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)  # it leaves its folder to the end
def test_minari_records_and_gives_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What docs/environments.md shows."""
    minari = pytest.importorskip("minari")
    for needed in ("jax", "h5py"):
        pytest.importorskip(needed)
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    env = minari.DataCollector(gymnasium.make(MRP, num_steps=3, reward_mode="sum"), record_infos=True)
    for seed in range(2):
        env.reset(seed=seed)
        for _ in range(3):
            env.step(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # asks for an author
        data = env.create_dataset("diffrl/rings-v0", algorithm_name="wait")
    env.close()
    episodes = list(data.iterate_episodes())
    assert [len(e.rewards) for e in episodes] == [3, 3]
    np.testing.assert_allclose(episodes[0].rewards, episodes[0].infos["vector_reward"][1:].sum(1), rtol=1e-5)


class Product(torch.nn.Module):
    """A value of a latent and an action."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)

    def forward(self, x: Tensor, action: Tensor) -> Tensor:
        return self.layer(x * action)


@pytest.mark.filterwarnings("ignore:No target network updater:UserWarning")
def test_a_bounded_policy_of_torchrl_on_the_native_environment() -> None:
    """TD3's loss asks the action spec for its bounds; the units are those of the Gymnasium form."""
    env = env_of(action_scale="level", batch_size=[8])
    assert bool((env.action_spec.space.low == -1).all()) and bool((env.action_spec.space.high == 1).all())
    assert env.action_spec.is_in(env.rand_action()["action"])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Tanh())
        actor = TensorDictModule(layers, [keys.X_T], [keys.ACTION])
        critic = ValueOperator(Product(), in_keys=[keys.X_T, keys.ACTION], out_keys=["state_action_value"])
        loss = TD3Loss(actor, critic, action_spec=env.action_spec)
        with torch.no_grad():
            td = env.rollout(6, actor)
        out = loss(td[:, 0])  # its bounds have the batch of the spec
    assert torch.isfinite(out["loss_actor"]) and torch.isfinite(out["loss_qvalue"])
    single: Any = gymnasium.make(MDP, num_steps=6)
    single.reset(options={"x_t": td[keys.X_T][0, 0].numpy()})
    for k in range(6):
        x = single.step(td[keys.ACTION][0, k].detach().numpy())[0]["x_t"]
        np.testing.assert_array_equal(x, td["next", keys.X_T][0, k].detach().numpy())


def test_the_box_of_the_clean_estimate_covers_the_data() -> None:
    for data in ("gmm", "rings", "moons", "spirals", "checkerboard"):
        env: Any = gymnasium.make(MDP, data=data, reward=squares, action="x0_hat").unwrapped
        largest, unit = float(env.data.test.abs().max()), env.decision_process.units
        assert bool((unit == unit[0]).all()) and largest <= float(unit[0]) < 2 * largest


def made(*arguments: Any, **variant: Any) -> Any:
    return gymnasium.make_vec(*arguments, **variant)


def test_normalised_observations_and_rewards() -> None:
    """Of the size of 1 at every level, whatever the process; the chain beneath is the same."""
    for process in ("edm", "flow", "vp"):
        raw, unit = (
            made(MDP, num_envs=500, process=process, normalise=n, reward_scale=w)
            for n, w in ((False, 1.0), (True, 0.25))
        )
        a, b = raw.reset(seed=0)[0], unit.reset(seed=0)[0]
        boxes = raw.unwrapped.decision_process.boxes.numpy()
        for k in range(11):
            np.testing.assert_allclose(b["x_t"] * boxes[k], a["x_t"], rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(b["t"], 1 - k / 10, rtol=1e-6)
            assert b in unit.observation_space and 0.05 < b["x_t"].std() < 1
            if k < 10:
                action = raw.unwrapped.pretrained_action()
                (a, r, *_), (b, r_, *_) = raw.step(action), unit.step(action)
                np.testing.assert_allclose(r_, 0.25 * r, rtol=1e-5)
        again, _ = unit.reset(options={"x_t": b["x_t"], "index": np.full(500, 9)})
        np.testing.assert_allclose(again["x_t"], b["x_t"], rtol=1e-6)


def test_rewards_of_latents_are_not_remembered_unless_asked() -> None:
    for reward, hits in ((squares, 0), (BlackBox(squares), 3)):
        env: Any = gymnasium.make(MDP, reward=reward, num_steps=1).unwrapped
        for _ in range(4):
            env.reset(seed=0)
            env.step(np.zeros(2, np.float32))
        box = env.decision_process.reward
        assert (box.cache_hits, box.queries) == (hits, 4 - hits)
        assert len(box.state_dict()["known"]["rewards"]) == (1 if hits else 0)
