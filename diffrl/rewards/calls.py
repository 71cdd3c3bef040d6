"""What a reward is, and one call of it: its answer is checked and becomes plain numbers."""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from diffrl.errors import DiffrlError
from diffrl.workers import Failure

__all__ = ["Reward", "RewardError", "ask"]


class RewardError(DiffrlError, RuntimeError):
    """A reward gave no usable number; the message names the reward, the samples and what went wrong."""


class Reward(Protocol):
    """What a reward is: any callable (x0 [N, *E], cond) → N numbers.

    cond is what the samples were asked to be (labels [N], a list of N prompts) or None. The numbers may be a
    tensor, an array or a sequence, of floats or integers, of shape [N].
    """

    def __call__(self, x0: Tensor, cond: Any, /) -> Tensor | np.ndarray | Sequence[float]: ...


def ask(reward: Reward, batch: tuple[Tensor, Any]) -> np.ndarray | Failure:
    """One call of a reward, without gradients.

    Args:
        reward: the callable; what it raises is passed on.
        batch: samples [n, *E] and their conditions.

    Returns:
        float64 [n], NaN where the reward gave None; a hopeless `Failure` if the answer has a wrong shape or type.
    """
    x0, cond = batch
    n = len(x0)
    with torch.no_grad():
        answer: Any = reward(x0, cond)
    if isinstance(answer, Tensor):
        answer = answer.detach().cpu()
        answer = answer.double().numpy() if not answer.is_complex() else answer.numpy()
    if answer is None:
        return np.full(n, np.nan)
    try:
        array = np.asarray(answer)
    except (RuntimeError, TypeError, ValueError):  # a ragged list
        return Failure(f"it gave a {type(answer).__name__} that is no array of shape [{n}]", hopeless=True)
    if array.shape != (n,):
        return Failure(f"it gave shape {list(array.shape)}, not [{n}]", hopeless=True)
    if array.dtype.kind == "O":
        array = np.array([np.nan if value is None else value for value in answer])
    if array.dtype.kind not in "fiub":
        return Failure(f"it gave {array.dtype}, not real numbers", hopeless=True)
    return array.astype(np.float64)
