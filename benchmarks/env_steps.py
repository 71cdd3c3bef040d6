"""The step of a Gymnasium environment of one chain against the same formulas by hand, and against that of tensors."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from report import Row
from timing import Ratio, interleave
from torch import Generator, Tensor

from diffrl.envs import DiffusionMDPEnv, DiffusionMDPVectorEnv, DiffusionMRPEnv, DiffusionMRPVectorEnv

__all__ = ["KINDS", "Kind", "env_steps"]

NUM_STEPS, REPEATS = 20_000, 50  # long enough that no chain ends while it is timed
Array = NDArray[Any]
ByHand = Callable[[Any, Array, Array, Callable[[], Array]], Callable[[], tuple[Any, ...]]]


def reward_steps(env: DiffusionMRPEnv, x: Array, x0: Array, noise: Callable[[], Array]) -> Any:
    """The steps of the reward process from its first state x on: x_s = A x0 + κ x + std z, r = μ - μ_s."""
    chain = env.reward_process.chain
    step, value, t = (
        torch.stack(c, 1).float().numpy()
        for c in (tuple(chain.step_coefficients), chain.value_coefficients, (chain.t,))
    )
    index, state, mean = 0, x, value[0, 0] * x0 + value[0, 1] * x

    def go() -> tuple[Any, ...]:
        nonlocal index, state, mean
        A, kappa, std = step[index]
        state, before = A * x0 + kappa * state + std * noise(), mean
        index += 1
        A, kappa = value[index]
        mean = A * x0 + kappa * state
        return {"x_t": state.copy(), "t": t[index].copy()}, before - mean, index == len(step), False, {}

    return go


def decision_steps(env: DiffusionMDPEnv, x: Array, action: Array, noise: Callable[[], Array]) -> Any:
    """The steps of the decision process from its first latent x on: x_s = A c a + κ x + std z."""
    d = env.decision_process
    assert d.linear_law is not None and d.units is not None
    law, unit, t = (
        torch.stack(d.linear_law, 1).float().numpy(),
        d.units.float().numpy(),
        d.grid.float().numpy(),
    )
    index, latent = 0, x

    def go() -> tuple[Any, ...]:
        nonlocal index, latent
        kappa, A, std = law[index]
        latent = A * (unit[index] * action) + kappa * latent + std * noise()
        index += 1
        return {"x_t": latent.copy(), "t": t[index : index + 1].copy()}, 0.0, index == len(law), False, {}

    return go


@dataclass(frozen=True)
class Kind:
    """An environment and its steps by hand, which `given` is handed to: the datum, or the action of all steps."""

    name: str
    single: Callable[..., Any]
    vector: Callable[..., Any]
    variant: dict[str, Any]
    action: Any
    by_hand: ByHand
    given: Array


HALF = np.full(2, 0.5, np.float32)
KINDS = (
    Kind("DiffusionMRP-v0", DiffusionMRPEnv, DiffusionMRPVectorEnv, {}, 0, reward_steps, HALF),
    Kind(
        "DiffusionMDP-v0, x0_hat",
        DiffusionMDPEnv,
        DiffusionMDPVectorEnv,
        {"action": "x0_hat"},
        HALF,
        decision_steps,
        HALF,
    ),
)


def env_steps(*, rounds: int) -> tuple[list[Row], list[Row]]:
    """A row for each kind with its defaults, in 2-D: its time over that by hand, and how fast it is against tensors.

    By hand the numbers come of arrays, and so does what a step returns, without `info`. The tensors are those of a
    vector environment of one chain.
    """
    pairs = [_rows(kind, rounds) for kind in KINDS]
    return [by_hand for by_hand, _ in pairs], [tensors for _, tensors in pairs]


def _rows(kind: Kind, rounds: int) -> tuple[Row, Row]:
    require_agreement(kind)
    env, by_hand = _pair(kind, NUM_STEPS, noise=None)
    many = kind.vector(1, num_steps=NUM_STEPS, **kind.variant)
    many.reset(seed=0)
    actions = np.asarray(kind.action)[None]
    variants = {
        "diffrl": lambda: env.step(kind.action),
        "by hand": by_hand,
        "tensors": lambda: many.step(actions),
    }
    seconds = interleave(variants, rounds=rounds, repeats=REPEATS)
    milliseconds = Row.milliseconds_of(seconds["diffrl"])
    return (
        Row(kind.name, milliseconds, {"by hand": Ratio.of(seconds, "diffrl", "by hand")}, "≤ 3"),
        Row(kind.name, milliseconds, {"tensors": Ratio.of(seconds, "tensors", "diffrl")}, "≥ 4"),
    )


def require_agreement(kind: Kind) -> None:
    """Both sides come to the same states and rewards, or the comparison means nothing."""
    env, by_hand = _pair(kind, num_steps=4, noise=Generator().manual_seed(1))
    for _ in range(3):
        ours, witness = env.step(kind.action)[:2], by_hand()[:2]
        for a, b in ((ours[0]["x_t"], witness[0]["x_t"]), (ours[1], witness[1])):
            if not np.allclose(a, b, rtol=1e-4, atol=1e-4):
                raise RuntimeError(
                    f"{kind.name}: a step comes to {a} in diffrl and {b} by hand: one is wrong"
                )


def _pair(kind: Kind, num_steps: int, noise: Generator | None) -> tuple[Any, Callable[[], tuple[Any, ...]]]:
    """The environment, reset, and the steps by hand from there, with the same noise if it is given."""

    def drawn(generator: Generator) -> Tensor:
        return torch.randn(1, 2, generator=generator)

    source = None if noise is None else lambda x: drawn(noise)
    env = kind.single(num_steps=num_steps, noise=source, **kind.variant)
    options = {"x0": kind.given} if kind.single is DiffusionMRPEnv else None
    start = env.reset(seed=0, options=options)[0]["x_t"]
    own = Generator().manual_seed(1)
    if noise is not None:
        drawn(own)  # which the reset took
    return env, kind.by_hand(env, start, kind.given, lambda: drawn(own).numpy()[0])
