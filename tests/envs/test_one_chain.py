"""The single Gymnasium environment steps in plain numbers, and comes to what the tensors of a batch come to."""

from dataclasses import dataclass
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from torch import Tensor

from diffrl.diffusion.laws import Gaussian
from diffrl.diffusion.samplers.ddim import DDIM
from diffrl.diffusion.samplers.registry import samplers_with_law
from diffrl.diffusion.schedules.base import Schedule
from diffrl.envs import DiffusionMDPEnv, DiffusionMRPEnv
from tests.kit.decision_process import squares
from tests.kit.oracles import randn

ARRAYS = randn(4, 3)
PROCESS_OF = {"consistency": "edm", "lcm": "ddpm"}  # those of one process that is not "flow"
REWARD_PROCESSES: list[dict[str, Any]] = [
    {"process": "edm", "coupling": "markov", "reward_mode": "sum", "max_steps": 3},
    {"process": "vp", "coupling": 0.5, "span": 2, "stride": 0.5, "reward_mode": "flat"},
    {"process": "flow", "coupling": "shared", "data": randn(9, 1, 2, 3)},
]
DECISION_PROCESSES: list[dict[str, Any]] = [
    {"process": "edm", "action_scale": None, "max_steps": 3, "conditions": ARRAYS},
    {"normalise": True, "reward_scale": 0.3, "data": randn(9, 1, 2, 3)},
    {"action": "x0_hat", "reward_placement": "dense", "normalise": True, "conditions": torch.arange(5)},
    *({"action": "x0_hat", "sampler": n, "process": PROCESS_OF.get(n, "flow")} for n in samplers_with_law()),
]


@dataclass(frozen=True)
class Thresholded(DDIM):
    """DDIM whose clean estimates are cut off at ±1: its mean is not linear in them."""

    def law(self, process: Schedule, x: Tensor, D_x: Tensor, t: Tensor, s: Tensor) -> Gaussian:
        return super().law(process, x, D_x.clamp(-1, 1), t, s)


def same(given: Any, expected: Any, rtol: float) -> None:
    """Numbers within rtol, of one type and one shape."""
    assert type(given) is type(expected)
    if isinstance(given, dict):
        assert list(given) == list(expected)
        same(tuple(given.values()), tuple(expected.values()), rtol)
    elif isinstance(given, tuple):
        for one, other in zip(given, expected, strict=True):
            same(one, other, rtol)
    else:
        assert np.asarray(given).dtype == np.asarray(expected).dtype
        assert np.shape(given) == np.shape(expected)
        np.testing.assert_allclose(given, expected, rtol=rtol, atol=rtol)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("kind", [DiffusionMRPEnv, DiffusionMDPEnv])
def test_it_equals_the_step_of_tensors(kind: Any, dtype: str) -> None:
    rtol, rng = {"float64": 1e-12, "float32": 1e-5}[dtype], np.random.default_rng(0)
    common: dict[str, Any] = {"num_steps": 5, "dtype": dtype}
    variants = REWARD_PROCESSES
    if kind is DiffusionMDPEnv:
        common, variants = common | {"reward": squares}, DECISION_PROCESSES
    for variant in variants:
        plain, tensors = kind(**common | variant), kind(**common | variant)
        assert plain._chains.plain
        tensors._chains.plain = False
        for seed in (7, None):  # the second chain goes on with the stream
            same(plain.reset(seed=seed), tensors.reset(seed=seed), 0)
            over = False
            while not over:
                shape = plain.action_space.shape
                action = rng.uniform(-1, 1, shape).astype(dtype) if shape else 0
                taken = plain.step(action)
                same(taken, tensors.step(action), rtol)
                over = taken[2] or taken[3]
        assert taken[4]["index"] == (3 if "max_steps" in variant else 3 if "span" in variant else 5)


def test_its_numbers_are_the_formulas() -> None:
    """Markov EDM by hand: x_s = x0 + (σ_s/σ_t)² (x - x0) + std z, and the mean of the next step; to the clean end."""
    N, x0 = 4, np.array([0.3, -0.7])
    z = iter(randn(N + 1, 1, 2))
    env = DiffusionMRPEnv(data=randn(5, 2), num_steps=N, noise=lambda x: next(z).to(x))
    noise = randn(N + 1, 1, 2).numpy()
    sigma = np.array(
        [*((80 ** (1 / 7) + i / (N - 1) * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7 for i in range(N)), 0]
    )
    x = x0 + sigma[0] * noise[0, 0]
    observation, _ = env.reset(options={"x0": x0})
    np.testing.assert_allclose(observation["x_t"], x, rtol=1e-12)
    for i in range(N):
        kappa = (sigma[i + 1] / sigma[i]) ** 2
        mean = x0 + kappa * (x - x0)
        x = mean + sigma[i + 1] * np.sqrt(1 - kappa) * noise[i + 1, 0]
        after = np.zeros(2) if i == N - 1 else x0 + (sigma[i + 2] / sigma[i + 1]) ** 2 * (x - x0)
        observation, reward, terminated, _, _ = env.step(0)
        np.testing.assert_allclose(observation["x_t"], x, rtol=1e-11)
        np.testing.assert_allclose(reward, mean - after, rtol=1e-9, atol=1e-11)
    assert terminated


def test_a_law_that_is_not_linear_is_left_to_tensors() -> None:
    action, kept = np.array([5.0, 0.25], np.float32), np.array([1.0, 0.25], np.float32)
    cut = DiffusionMDPEnv(action="x0_hat", sampler=Thresholded(), action_scale=None)
    plain = DiffusionMDPEnv(action="x0_hat", sampler=DDIM(), action_scale=None)
    assert plain._chains.plain and not cut._chains.plain
    for env in (cut, plain):
        env.reset(seed=0)
    same(cut.step(action)[0], plain.step(kept)[0], 1e-6)


def test_a_source_of_noise_may_change_what_it_gets() -> None:
    for kind in (DiffusionMRPEnv, DiffusionMDPEnv):
        variant = {"action": "x0_hat"} if kind is DiffusionMDPEnv else {}
        careful, careless = (
            kind(num_steps=3, noise=noise, **variant) for noise in (torch.ones_like, lambda x: x.fill_(1.0))
        )
        for env in (careful, careless):
            env.reset(seed=0)
        action: Any = 0 if kind is DiffusionMRPEnv else np.zeros(2, np.float32)
        for _ in range(3):
            same(careless.step(action)[0], careful.step(action)[0], 0)


@pytest.mark.parametrize("name", ["DiffusionMDP-v0", "DiffusionMRP-v0"])
def test_a_vector_of_one_chain_steps_as_a_single_chain_does(name: str) -> None:
    one: Any = gymnasium.make(name).unwrapped
    vector: Any = gymnasium.make_vec(name, num_envs=1)
    one.action_space.seed(0)
    (first, _), (start, _) = one.reset(seed=5), vector.reset(seed=5)
    np.testing.assert_array_equal(start["x_t"][0], first["x_t"])
    over = False
    while not over:
        action = one.action_space.sample()
        seen, reward, over, _, _ = one.step(action)
        seen_by_many, rewards, ended, _, _ = vector.step(np.asarray([action]))
        for key in ("x_t", "t"):
            np.testing.assert_allclose(seen_by_many[key][0], seen[key], rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(rewards[0], reward, rtol=1e-4, atol=1e-4)
        assert ended.tolist() == [over]
