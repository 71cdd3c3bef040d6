"""Steps that Gymnasium recorded feed the value loss: by its infos, or by the times and the chain alone."""

from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from tensordict import TensorDict
from torch import nn

import diffrl.envs  # noqa: F401 (registers the environments)
from diffrl.diffusion.chains import Chain
from diffrl.diffusion.denoisers import Denoiser
from diffrl.diffusion.networks import MLP
from diffrl.diffusion.schedules.ddpm import DDPM
from diffrl.diffusion.schedules.edm import EDM
from diffrl.diffusion.trajectories import add_coefficients, sample_chain
from diffrl.errors import InputError, InputKeyError
from diffrl.objectives import ValueLoss
from tests.kit.value_loss import number

VARIANTS: list[dict[str, Any]] = [
    {},
    {"coupling": 0.5, "stride": 0.5},
    {"span": 2, "value": "clean"},
    {"process": "ddpm", "coupling": "shared"},
    {"process": "flow"},
]
SETTINGS = ("coupling", "span", "stride", "value")


def record(env: Any, frames: int) -> tuple[TensorDict, TensorDict]:
    """What an agent's buffer holds, and beside it the infos of the state left and of the state reached."""
    observation, info = env.reset(seed=0)
    steps, infos = [], []
    for _ in range(frames):
        reached, reward, terminated, truncated, info_next = env.step(0)
        flags = {"terminated": [terminated], "truncated": [truncated], "done": [terminated or truncated]}
        steps.append(TensorDict({**observation, "next": {**reached, "reward": reward, **flags}}))
        names = ("A", "kappa", "x0")
        infos.append(
            TensorDict({**{n: info[n] for n in names}, "next": {n: info_next[n] for n in ("A", "kappa")}})
        )
        observation, info = env.reset() if terminated or truncated else (reached, info_next)
    return torch.stack(steps), torch.stack(infos)


def loss(process: Any, **options: Any) -> ValueLoss:
    torch.manual_seed(0)
    denoiser = Denoiser(MLP((2,), hidden=8), process, prediction_type="x0").double()
    nn.init.normal_(denoiser.network.last.weight)
    return ValueLoss(denoiser, weight="none", **options)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("target", [{"lmbda": 0.5}, {"n_steps": 1}, {"lmbda": 1.0}])
def test_the_loss_is_that_of_the_same_chain(variant: dict[str, Any], target: dict[str, float]) -> None:
    made = {"data": "rings", "num_steps": 6, "dtype": "float64", **variant}
    env: Any = gymnasium.make("DiffusionMRP-v0", **made).unwrapped
    chain = env.reward_process.chain
    K = chain.num_transitions
    steps, infos = record(env, 3 * K)
    x0 = infos["x0"].view(3, K, 2)[:, 0]
    # the noise that the environment drew: of each chain's first state, then of each step
    rows = steps.view(3, K)
    (alpha, sigma), (A, kappa, std) = chain.scales, chain.step_coefficients
    first = (rows["x_t"][:, 0] - alpha[0] * x0) / sigma[0]
    fresh = [
        (rows["next", "x_t"][:, k] - A[k] * x0 - kappa[k] * rows["x_t"][:, k]) / std[k].clamp(min=1e-30)
        for k in range(K - 1)
    ]
    options = {k: v for k, v in made.items() if k in SETTINGS}
    drawn = sample_chain(
        chain.process,
        x0,
        num_steps=6,
        noise=torch.stack([first, *fresh], 1),
        **{"coupling": "markov", **options},
    )
    wanted = number(loss(chain.process, **target)(drawn)["loss_value"])

    by_times = add_coefficients(steps.clone(), chain)
    by_infos = steps.clone().update(infos.exclude("x0"))
    for name in ("A", "kappa", ("next", "A"), ("next", "kappa")):
        torch.testing.assert_close(by_times[name], by_infos[name], rtol=1e-12, atol=0)
    for states in (by_times, by_infos, by_infos.clone().update(infos.select("x0"))):
        assert number(loss(chain.process, **target)(states)["loss_value"]) == pytest.approx(wanted, rel=1e-8)


def test_steps_in_float32_are_found_on_the_grid() -> None:
    for process in (EDM(), DDPM()):
        chain = Chain(process, 100, "markov")
        drawn = sample_chain(process, torch.zeros(4, 2), num_steps=100)
        found = add_coefficients(drawn.exclude("A", "kappa", ("next", "A"), ("next", "kappa")), chain)
        for name in ("A", "kappa", ("next", "A"), ("next", "kappa")):
            assert torch.equal(found[name], drawn[name])


def test_what_does_not_fit_is_said() -> None:
    steps = sample_chain(EDM(), torch.zeros(4, 2), num_steps=6).exclude("A", "kappa")
    with pytest.raises(InputKeyError, match=r"^A, kappa missing .*add_coefficients"):
        ValueLoss(Denoiser(MLP((2,)), EDM()))(steps)
    with pytest.raises(InputError, match="which is no time of Chain"):
        add_coefficients(steps, Chain(EDM(), 7, "markov"))
    with pytest.raises(InputKeyError, match="t missing"):
        add_coefficients(steps.exclude("t"), Chain(EDM(), 6, "markov"))


def test_vector_infos_have_the_shape_of_the_times() -> None:
    env = gymnasium.make_vec("DiffusionMRP-v0", num_envs=3, data="rings", num_steps=4)
    observation, info = env.reset(seed=0)
    for name in ("A", "kappa"):
        assert np.shape(info[name]) == observation["t"].shape == (3, 1)
