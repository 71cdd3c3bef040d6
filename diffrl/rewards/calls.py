"""What a reward is, and one call of it: its answer is checked and becomes plain numbers."""

import functools
import inspect
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from diffrl.errors import DiffrlError, InputTypeError
from diffrl.workers import Failure

__all__ = ["Reward", "RewardError", "ask", "takes_cond"]


class RewardError(DiffrlError, RuntimeError):
    """A reward gave no usable number; the message names the reward, the samples and what went wrong."""


class Reward(Protocol):
    """What a reward is: any callable (x0 [N, *E], cond) → N numbers.

    cond is what the samples were asked to be (labels [N], a list of N prompts) or None. A reward whose signature has
    one argument only is called as reward(x0). The numbers may be a tensor, an array or a sequence, of floats or
    integers, of shape [N].
    """

    def __call__(self, x0: Tensor, cond: Any, /) -> Tensor | np.ndarray | Sequence[float]: ...


def takes_cond(reward: Any, *keywords: str) -> bool:
    """Whether a reward is called as reward(x0, cond), and not as reward(x0): its signature tells; what has none is.

    Args:
        reward: any callable.
        keywords: what it is given by name besides.

    Raises:
        TypeError: it can be called in neither way.
    """
    called = reward.forward if isinstance(reward, nn.Module) else reward
    try:
        signature = inspect.signature(called)
    except (TypeError, ValueError):  # compiled code
        return True
    bound = isinstance(called, functools.partial)  # which may have been given its cond already
    if _binds(signature, 2, keywords):
        return True
    if _binds(signature, 1, keywords) and (bound or "cond" not in signature.parameters):
        return False
    raise InputTypeError(
        f"the reward takes {signature}, but is called as reward(x0, cond), samples [N, *E] and their conditions: give "
        "it a second argument `cond`, or x0 as its only one"
    )


def _binds(signature: inspect.Signature, n: int, keywords: Sequence[str]) -> bool:
    try:
        signature.bind(*[None] * n, **dict.fromkeys(keywords))
    except TypeError:
        return False
    return True


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
        call: Any = reward
        answer: Any = call(x0, cond) if takes_cond(reward) else call(x0)
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
        remedies = {
            (n, 1): "take .squeeze(1) of it",
            (): "let it give one number a sample, no mean of all of them",
        }
        remedy = remedies.get(array.shape, "let it give one number a sample")
        return Failure(f"it gave shape {list(array.shape)}, not [{n}]: {remedy}", hopeless=True)
    if array.dtype.kind == "O":
        array = np.array([np.nan if value is None else value for value in answer])
    if array.dtype.kind not in "fiub":
        return Failure(f"it gave {array.dtype}, not real numbers", hopeless=True)
    return array.astype(np.float64)
