"""Autoreset of the vector environments, held against Gymnasium's own vector environment."""

from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.error import ResetNeeded
from gymnasium.vector import AutoresetMode, SyncVectorEnv, VectorEnv
from gymnasium.wrappers.vector import (
    DictInfoToList,
    FlattenObservation,
    NormalizeObservation,
    NormalizeReward,
    RecordEpisodeStatistics,
)

import diffrl  # noqa: F401  registers the ids

SEEDS = [3, 0, 11]
FORMS: list[tuple[str, dict[str, Any]]] = [
    ("DiffusionMDP-v0", {"num_steps": 3}),
    ("DiffusionMDP-v0", {"num_steps": 4, "action": "x0_hat", "conditions": np.arange(20), "max_steps": 2}),
    ("DiffusionMRP-v0", {"num_steps": 3, "reward_mode": "sum"}),
    ("DiffusionMRP-v0", {"num_steps": 4, "data": "digits", "data_kwargs": {"conditional": True}}),
]


def pair(form: str, variant: dict[str, Any], mode: str) -> tuple[VectorEnv, VectorEnv]:
    """The environment, and Gymnasium's own, which steps one chain after the other."""
    ours = gymnasium.make_vec(form, num_envs=3, autoreset_mode=mode, **variant)
    theirs = SyncVectorEnv([lambda: gymnasium.make(form, **variant)] * 3, autoreset_mode=mode)
    if variant.get("data") == "digits":  # which has room for scalar rewards only
        theirs._rewards = np.zeros((3, 1, 8, 8), np.float32)
    return ours, theirs


def same(a: Any, b: Any, where: str = "") -> None:
    """Equal numbers, masks and nested entries, but for entries of chains that have none."""
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            same(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, tuple) or (isinstance(a, np.ndarray) and a.dtype == object):
        for row, other in zip(a, b, strict=True):
            same(row, other, where)
    elif a is None:
        assert b is None
    else:
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6, err_msg=where)


@pytest.mark.parametrize("mode", ["NextStep", "SameStep", "Disabled"])
@pytest.mark.parametrize(("form", "variant"), FORMS, ids=[str(f)[:60] for f in FORMS])
def test_it_equals_gymnasiums_own(form: str, variant: dict[str, Any], mode: str) -> None:
    """Step by step: observations, rewards, flags, infos, and what an ended chain ended with."""
    ours, theirs = pair(form, variant, mode)
    same(ours.reset(seed=SEEDS), theirs.reset(seed=SEEDS))
    ours.action_space.seed(0)
    ended = 0
    for _ in range(11):
        action = ours.action_space.sample()
        a, b = ours.step(action), theirs.step(action)
        same(a, b)
        over = a[2] | a[3]
        ended += int(over.sum())
        if mode == "SameStep":
            assert ("final_obs" in a[4]) == bool(over.any())
        if mode == "Disabled" and over.any():
            again = ours.reset(options={"reset_mask": over})[0], theirs.reset(options={"reset_mask": over})[0]
            same(*again)
    assert ended >= 6


def test_chains_out_of_step() -> None:
    """One chain starts further on than the others, and so ends and restarts alone."""
    for mode in AutoresetMode:
        env = gymnasium.make_vec("DiffusionMDP-v0", num_envs=2, num_steps=3, autoreset_mode=mode)
        env.reset(seed=0)
        x = np.zeros((2, 2), np.float32)
        env.reset(options={"x_t": x, "index": np.array([0, 2]), "reset_mask": np.array([False, True])})
        *_, terminated, _, infos = env.step(x)
        assert terminated.tolist() == [False, True]
        if mode is AutoresetMode.DISABLED:
            with pytest.raises(ResetNeeded, match=r"chains \[1\] of 2"):
                env.step(x)
            env.reset(options={"reset_mask": terminated})
            continue
        if mode is AutoresetMode.SAME_STEP:
            assert infos["index"].tolist() == [1, 0] and infos["final_info"]["index"].tolist() == [0, 3]
            assert infos["_final_obs"].tolist() == [False, True] and infos["final_obs"][0] is None
        _, reward, terminated, _, infos = env.step(x)
        assert infos["index"].tolist() == ([2, 0] if mode is AutoresetMode.NEXT_STEP else [2, 1])
        assert not terminated.any() and not reward.any()


def test_no_step_before_a_reset() -> None:
    for mode in AutoresetMode:
        env = gymnasium.make_vec("DiffusionMDP-v0", num_envs=2, autoreset_mode=mode)
        with pytest.raises(ResetNeeded, match=r"chains \[0, 1\] of 2 are not running"):
            env.step(np.zeros((2, 2), np.float32))
    with pytest.raises(ValueError, match="autoreset_mode is 'Never': choose from 'NextStep'"):
        gymnasium.make_vec("DiffusionMDP-v0", autoreset_mode="Never")


def test_the_pretrained_action_of_chains_that_wait_is_zero() -> None:
    env: Any = gymnasium.make_vec("DiffusionMDP-v0", num_envs=2, num_steps=1)
    env.reset(seed=0)
    env.step(env.unwrapped.pretrained_action())
    assert not env.unwrapped.pretrained_action().any()
    env.step(np.zeros((2, 2), np.float32))
    assert env.unwrapped.pretrained_action().all()


@pytest.mark.parametrize("form", ["DiffusionMDP-v0", "DiffusionMRP-v0"])
def test_wrappers_see_what_they_see_of_gymnasiums_own(form: str) -> None:
    """Running means of observations and rewards, and the statistics of episodes."""
    variant = {"num_steps": 3} | ({"reward_mode": "sum"} if "MRP" in form else {})

    def wrapped(env: Any) -> Any:
        env = NormalizeObservation(FlattenObservation(RecordEpisodeStatistics(env)))
        return DictInfoToList(NormalizeReward(env, gamma=0.9))

    ours, theirs = map(wrapped, pair(form, variant, "NextStep"))
    np.testing.assert_allclose(ours.reset(seed=SEEDS)[0], theirs.reset(seed=SEEDS)[0], rtol=1e-5, atol=1e-6)
    ours.action_space.seed(0)
    episodes = 0
    for _ in range(9):
        action = ours.action_space.sample()
        (x, r, *flags, infos), (x_, r_, *flags_, infos_) = ours.step(action), theirs.step(action)
        np.testing.assert_allclose(x, x_, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(r, r_, rtol=1e-4, atol=1e-5)
        assert [f.tolist() for f in flags] == [f.tolist() for f in flags_]
        for info, other in zip(infos, infos_, strict=True):
            assert ("episode" in info) == ("episode" in other)
            if "episode" in info:
                episodes += 1
                assert info["episode"]["l"] == other["episode"]["l"] == 3
                np.testing.assert_allclose(info["episode"]["r"], other["episode"]["r"], rtol=1e-5)
    assert episodes == 6
