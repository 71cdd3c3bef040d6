"""What environments are given: forms that are accepted, and what is refused, by name, as the library's own error."""

from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from torch import Tensor

import diffrl
from diffrl import keys
from diffrl.envs import DiffusionMDPEnv, DiffusionMRP, DiffusionMRPEnv
from diffrl.errors import DiffrlError
from tests.kit.decision_process import env_of, squares
from tests.kit.oracles import randn

MDP, MRP = "DiffusionMDP-v0", "DiffusionMRP-v0"
CONDITIONS: dict[str, Any] = {
    "flags": torch.tensor([True, False]),
    "uint8": torch.arange(4, dtype=torch.uint8),
    "int32 array": np.arange(4, dtype=np.int32),
    "negative": torch.tensor([-2, 5]),
    "scalars": torch.tensor([0.5, 1.5]),
    "half": torch.tensor([0.5, 1.5], dtype=torch.float16),
    "list": [0.5, 1.5],
    "int8 rows": torch.arange(6, dtype=torch.int8).view(3, 2),
    "flag rows": np.eye(3, dtype=bool),
    "float64 rows": randn(3, 2),
}


@pytest.mark.parametrize("kind", CONDITIONS)
def test_conditions_lie_in_their_observation_space(kind: str, recwarn: pytest.WarningsRecorder) -> None:
    given = CONDITIONS[kind]
    for make in (gymnasium.make, gymnasium.make_vec):
        env: Any = make(MDP, num_steps=2, conditions=given)
        for seed in range(3):
            observation, _ = env.reset(seed=seed)
            assert observation in env.observation_space
        assert env.step(env.action_space.sample())[0] in env.observation_space
    native = env_of(conditions=given, batch_size=[3])
    rows = torch.as_tensor(np.asarray(given)).double()
    td = native.reset()
    assert native.observation_spec.is_in(td)
    for c in (td[keys.COND], torch.as_tensor(observation[keys.COND])):
        assert all(any(torch.equal(row, known) for known in rows) for row in c.double())
    assert not recwarn.list


def test_a_condition_that_is_given_takes_the_kind_of_the_others() -> None:
    env = DiffusionMDPEnv(conditions=np.arange(3, dtype=np.uint8))
    observation, _ = env.reset(options={"cond": np.int32(2)})
    assert observation["cond"] == 2 and observation in env.observation_space
    for wrong, says in (
        (3, "cond is outside the labels 0..2"),
        (-1, "labels"),
        (1.0, "cond is torch.float64"),
    ):
        with pytest.raises(ValueError, match=says):
            env.reset(options={"cond": wrong})
    rows = DiffusionMDPEnv(conditions=np.array([[0.0, 1.0], [2.0, 3.0]]))
    assert rows.reset(options={"cond": [1.0, 1.5]})[0]["cond"].tolist() == [1.0, 1.5]
    with pytest.raises(ValueError, match="cond is outside the range"):
        rows.reset(options={"cond": [1.0, 9.0]})


@pytest.mark.parametrize(
    "data", [randn(20, 3, dtype=torch.float32), randn(20, 3).numpy()], ids=["tensor", "array"]
)
def test_points_are_data(data: Any) -> None:
    """As in the native form: the exact denoiser is that of the points."""
    env: Any = gymnasium.make(MDP, process="edm", data=data, reward=squares, num_steps=18)
    env.reset(seed=0)
    for _ in range(18):
        observation, *_ = env.step(env.unwrapped.pretrained_action())
    nearest = (torch.as_tensor(data).float() - torch.from_numpy(observation["x_t"])).square().sum(1).min()
    assert float(nearest) < 1e-4  # a sampler with the exact denoiser of finite data ends at one of them
    x0 = gymnasium.make(MRP, data=data, num_steps=3).reset(seed=0)[1]["x0"]
    assert (np.asarray(data) == x0).all(1).any()
    native = DiffusionMRP(diffrl.Flow(), data, num_steps=3, batch_size=[2]).reset()[keys.X0]
    assert all((torch.as_tensor(data) == row).all(1).any() for row in native)


def test_devices_and_types() -> None:
    """float64 is as exact as the native form; float32 rounds it."""
    for form, dtype in ((MDP, "float64"), (MRP, torch.float64)):
        variant: dict[str, Any] = {"num_steps": 3, "device": "cpu"}
        exact, rounded = (gymnasium.make(form, dtype=d, noise=fixed, **variant) for d in (dtype, "float32"))
        a, b = (env.reset(seed=0)[0] for env in (exact, rounded))
        assert a["x_t"].dtype == a["t"].dtype == exact.observation_space["x_t"].dtype == np.float64
        assert b["x_t"].dtype == np.float32 and a in exact.observation_space
        if form == MDP:
            np.testing.assert_allclose(a["x_t"], b["x_t"], rtol=1e-6)
            assert a["x_t"][0] == 1 / 3 and b["x_t"][0] == np.float32(1 / 3)


def fixed(x: Tensor) -> Tensor:
    return torch.full_like(x, 1 / 3)


def test_actions_are_refused_at_their_step_by_name() -> None:
    """A shape that would broadcast, and infinity that would be found only in the sample."""
    env = env_of(batch_size=[8])
    td = env.reset()
    for action, says in (
        (torch.zeros(8, 1), r"action has shape \(8, 1\), but \(8, 2\)"),
        (torch.full((8, 2), torch.inf), "action: sample 0 holds NaN or infinity"),
        (torch.zeros(8, 2).index_fill(0, torch.tensor(3), torch.nan), "action: sample 3"),
        (torch.zeros(8, 2, dtype=torch.int64), "action has dtype"),
    ):
        with pytest.raises(DiffrlError, match=says):
            env.step(td.clone().set(keys.ACTION, action))
    dense = env_of(batch_size=[8], reward_placement="dense")
    td = dense.reset().set(keys.ACTION, torch.zeros(8, 2))
    with pytest.raises(DiffrlError, match=r"x0_hat has shape \(8, 1\)"):
        dense.step(td.set(keys.X0_HAT, torch.zeros(8, 1)))


@pytest.mark.parametrize(
    ("form", "action", "says"),
    [
        (MRP, "x", "action is 'x': the only one is 0, to wait$"),
        (MRP, [0], r"action is \[0\]: the only one is 0"),
        (MRP, [[0], [0, 0]], r"action is a list that makes no array: give numbers of shape \(\), int64$"),
        (MDP, "x", r"action is text: give numbers of a floating dtype, shape \(2,\)$"),
        (MDP, None, r"action is an array of object: give numbers of a floating dtype, shape \(2,\)$"),
        (MDP, [[1.0], [1.0, 2.0]], r"action is a list that makes no array: .* shape \(2,\), float32$"),
        (
            MDP,
            torch.zeros(2, requires_grad=True),
            r"action is a tensor with a gradient that makes .*float32$",
        ),
        (MDP, [1, 2], r"action has dtype torch.int64: give numbers of a floating dtype, shape \(2,\)"),
        (MDP, [1.0, float("nan")], "action holds NaN or infinity$"),
        (MDP, [[1.0, 2.0]], r"action has shape \(1, 2\), but \(2,\) is needed"),
    ],
)
def test_the_action_of_one_chain_is_refused_in_its_own_words(form: str, action: Any, says: str) -> None:
    env = gymnasium.make(form).unwrapped
    env.reset(seed=0)
    with pytest.raises(DiffrlError, match=says):
        env.step(action)


def test_the_vector_reward_process_takes_exactly_its_actions() -> None:
    env = gymnasium.make_vec(MRP, num_envs=3, num_steps=2)
    env.reset(seed=0)
    for action in (np.zeros(7, int), np.zeros((3, 1), int), np.zeros(1, int), 0, np.ones(3, int)):
        with pytest.raises(ValueError, match="action is .*: give 3 zeros, one for each chain, to wait"):
            env.step(action)
    assert env.step(np.zeros(3, int))[1].shape == (3, 2)


def test_noise_and_denoiser_of_another_shape() -> None:
    """Numbers that would broadcast in silence."""
    for make in (gymnasium.make, gymnasium.make_vec):
        for form in (MDP, MRP):
            env: Any = make(form, noise=lambda x: torch.zeros(1))
            with pytest.raises(ValueError, match=r"noise gives \(1,\) for a tensor of shape \(1, 2\)"):
                env.reset()
        wide: Any = make(MDP, denoiser=lambda x, t, cond: x[:, :1])
        wide.reset()
        with pytest.raises(ValueError, match=r"denoiser gives \(1, 1\) for latents \(1, 2\)"):
            wide.unwrapped.pretrained_action()
    with pytest.raises(ValueError, match="noise gives"):
        env_of(noise=lambda x: torch.zeros(1)).reset()


WRONG: list[tuple[str, dict[str, Any], str]] = [
    *(("all", {"num_steps": n}, "num_steps is") for n in (5.5, True, "5", -1, None)),
    *(("all", {"max_steps": n}, "max_steps is") for n in (2.5, True, 0)),
    *(("all", {"device": d}, "device is") for d in ("nowhere", "cuda:97", 1.5)),
    *(("all", {"noise": n}, "noise is") for n in (3, "gauss")),
    *(("gym", {"dtype": d}, "dtype is") for d in ("float16", torch.int64, 3)),
    *(("gym", {"data": d}, "data is a") for d in (3, [[0.0]], None)),
    ("gym", {"data": torch.zeros(4, 2, dtype=torch.int64)}, "data has dtype torch.int64"),
    ("gym", {"data": np.zeros(4)}, r"data has shape \(4,\)"),
    ("gym", {"data": np.full((4, 2), np.nan)}, "data: sample 0"),
    ("gym", {"data": np.array([["a"]])}, "data is text: give an array or a tensor of numbers"),
    ("gym", {"process": 3}, "process is 3"),
    ("gym", {"process_kwargs": 3}, "process_kwargs is 3"),
    ("gym", {"process_kwargs": {"sigma": 3}}, "process_kwargs has no 'sigma'"),
    *(("mdp", {"conditions": c}, "conditions ") for c in (3, "cat", ["a", "b"], [], [np.nan], [1j])),
    *(("mdp", {"action_scale": c}, "action_scale is") for c in ("large", -1.0, np.inf, np.nan, [1.0])),
    *(("mdp", {"group_size": n}, "group_size is") for n in (1.5, 0)),
    *(("mdp", {"event_shape": e}, "event_shape") for e in (2, (), (2.5,), (0,), "2")),
    *(("mdp", {"data_scale": s}, "data_scale is") for s in (0, "1", np.nan)),
    *(("native", {"batch_size": b}, "batch_size") for b in (4, [4.0], [-1], [0], "4")),
    *(("native", {"seed": s}, "seed is") for s in (1.5, "1", True)),
    *(("mdp gym", {"denoiser": d}, "denoiser is") for d in (3, "exact")),
    *(("mdp gym", {"reward_scale": w}, "reward_scale is") for w in (0, np.inf, "1")),
    *(("mdp gym", {"reward": r}, "reward is") for r in (3, None)),
    ("gym", {"data": "npz", "data_kwargs": {}}, "data_kwargs: 'npz' has a missing"),
    ("mdp gym", {"sampler": 3}, "3 has steps without a law"),
    *(("vector", {"num_envs": n}, "num_envs is") for n in (2.5, 0, True)),
    ("all mdp", {"process": diffrl.EDM(), "sampler": diffrl.FlowSDE()}, "FlowSDE works on the Flow process"),
]


def made(form: str, wrong: dict[str, Any]) -> Any:
    if form == "native mrp":
        return DiffusionMRP(**{"process": diffrl.EDM(), "data": torch.zeros(4, 2), "num_steps": 3} | wrong)
    if form == "native mdp":
        return env_of(**wrong)
    return (gymnasium.make_vec if "vector" in form else gymnasium.make)(
        MDP if "mdp" in form else MRP, **wrong
    )


ALL = ("native mrp", "native mdp", "mrp", "mdp", "mrp vector", "mdp vector")
FORMS = {
    "all": ALL,
    "gym": ALL[2:],
    "mdp": ("native mdp",),
    "native": ALL[:2],
    "mdp gym": ("mdp", "mdp vector"),
    "all mdp": ("native mdp", "mdp", "mdp vector"),
    "vector": ALL[4:],
}


@pytest.mark.parametrize(("where", "wrong", "says"), WRONG, ids=lambda p: str(p)[:40])
def test_arguments_that_are_refused_by_name(where: str, wrong: dict[str, Any], says: str) -> None:
    for form in FORMS[where]:
        with pytest.raises(DiffrlError, match=says):
            made(form, wrong)


def test_options_of_a_reset_that_are_refused() -> None:
    env = DiffusionMDPEnv(conditions=[0, 1])
    x = np.zeros(2, np.float32)
    for options, says in (
        (3, "options is 3"),
        ({"x_t": "a"}, "x_t is text"),
        ({"x_t": np.full(2, np.inf)}, "x_t holds NaN or infinity"),
        ({"x_t": x, "index": 0.5}, "index is"),
        ({"x_t": x, "index": True}, "index is"),
        ({"cond": None}, "cond is an array of object"),
    ):
        with pytest.raises(DiffrlError, match=says):
            env.reset(options=options)
    for make in (DiffusionMDPEnv, DiffusionMRPEnv):
        with pytest.raises(DiffrlError, match="render_mode is 'human': give 'rgb_array'"):
            make(render_mode="human")
    with pytest.raises(DiffrlError, match="x0 is text"):
        DiffusionMRPEnv().reset(options={"x0": "a"})
