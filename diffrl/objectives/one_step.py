"""Chains of one step, put together from the state left and the state reached."""

from collections.abc import Mapping

import torch
from tensordict import TensorDict
from torch import Tensor

from diffrl import keys
from diffrl.objectives.chain_value import state_value

__all__ = ["cut_pairs", "one_step_chains"]


def one_step_chains(
    x0: Tensor,
    left: Mapping[str, Tensor],
    reached: Mapping[str, Tensor],
    *,
    reward: Tensor,
    terminated: bool,
    cond: Tensor | None,
) -> TensorDict:
    """Chains of one step, as a loss reads them.

    Args:
        x0: the datum of each, shape [B, 1, *E].
        left: entries of the state left, each [B, 1, ...].
        reached: those of the state reached.
        reward: of the step, shape [B, 1, *E].
        terminated: whether the state reached is the datum; otherwise the chain is cut there.
        cond: condition of each datum, shape [B, ...].

    Returns:
        TensorDict of batch size [B, 1].
    """
    size = x0.shape[:2]
    ended = torch.full((*size, 1), terminated, device=x0.device)
    flags = {keys.DONE: torch.ones_like(ended), keys.TERMINATED: ended, keys.TRUNCATED: ~ended}
    root = {**left, keys.X0: x0} if cond is None else {**left, keys.X0: x0, keys.COND: cond.unsqueeze(1)}
    return TensorDict(
        {**root, keys.NEXT: TensorDict({**reached, keys.REWARD: reward, **flags}, size)},
        size,
    )


def cut_pairs(
    x0: Tensor,
    left: Mapping[str, Tensor],
    reached: Mapping[str, Tensor],
    *,
    valid: Tensor,
    cond: Tensor | None,
) -> TensorDict:
    """Pairs of states that a TD term compares: the chain is cut at the second one, so that it bootstraps there.

        reward = Φ(x_t) - Φ(x_t'),    Φ(x) = A x0 + κ x

    Args:
        x0: the datum of each, shape [B, 1, *E].
        left: x_t, t, A and κ of the noisier state; each [B, 1, ...].
        reached: those of x_t', the less noisy one.
        valid: whether the TD term holds; where not, the loss is plain denoising; bool, shape [B, 1, 1].
        cond: condition of each datum, shape [B, ...].
    """
    reward = state_value(left, x0) - state_value(reached, x0)
    root = {**left, keys.VALID: valid}
    return one_step_chains(x0, root, reached, reward=reward, terminated=False, cond=cond)
