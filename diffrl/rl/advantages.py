"""Advantages of actions: standardised rewards, rewards-to-go, and advantages over a learned critic.

Rows are trajectories, columns are steps.
"""

import math
from collections import deque
from typing import Any, Literal

import torch
from torch import Tensor

from diffrl.errors import InputError, InputTypeError
from diffrl.ranges import require_int, require_number
from diffrl.rl.returns import lambda_returns, monte_carlo_returns

__all__ = ["FifoStatistics", "critic_advantages", "group_advantages", "rewards_to_go", "spread"]


class FifoStatistics:
    """Standardises values by the latest values of the same key, and of the same step where there are steps.

        adv = (v - mean)/(std + tol),    std with denominator n

    Every key has a buffer that persists over batches; a batch enters it before it is standardised. mean and std are
    those of the buffer if it holds `min_count` values, else those of the whole batch (in that column, if there are
    columns).

    Source: Training Diffusion Models with Reinforcement Learning (Black et al., 2024), section 4.2 and its code's
    per-prompt statistics, https://arxiv.org/abs/2305.13301; by step: Aligning Few-Step Diffusion Models with Dense
    Reward Difference Learning (Zhang et al., 2024), https://arxiv.org/abs/2411.11727.

    Args:
        buffer: number of values to keep of each key.
        min_count: number of values of a key from which on its own statistics are used, in 1..buffer.
        tol: added to the standard deviation.

    Raises:
        ValueError: min_count outside 1..buffer.
    """

    def __init__(self, buffer: int = 32, min_count: int = 16, tol: float = 1e-6) -> None:
        require_int("buffer", buffer)
        require_int("min_count", min_count, most=buffer)
        require_number("tol", tol, 0)
        self.buffer, self.min_count, self.tol = buffer, min_count, tol
        self._values: dict[tuple[int, int], deque[float]] = {}

    def __call__(self, values: Tensor, key: Tensor | None = None) -> Tensor:
        """Standardise a batch of values.

        Args:
            values: shape [B], or [B, K] to keep the statistics of each step apart.
            key: key of each row, such as the number of a prompt, integers, shape [B]; None: one for all.

        Returns:
            Advantages, of the shape of `values`.

        Raises:
            TypeError: values are no floating numbers.
            ValueError: the number of keys is not that of the rows.
        """
        _require_floating(values)
        table = values.detach().cpu().double().reshape(len(values), -1)
        keys = [0] * len(values) if key is None else key.flatten().tolist()
        if len(keys) != len(values):
            raise InputError(f"{len(keys)} keys for {len(values)} rows: give one key a row")
        for name, row in zip(keys, table.tolist(), strict=True):
            for k, value in enumerate(row):
                self._values.setdefault((name, k), deque(maxlen=self.buffer)).append(value)
        adv = _standardised(table, table, self.tol)
        for name in set(keys):
            rows = torch.tensor([name == other for other in keys])
            for k in range(table.shape[1]):
                kept = self._values[name, k]
                if len(kept) >= self.min_count:
                    own = torch.tensor(kept, dtype=torch.float64)
                    adv[rows, k] = _standardised(table[rows, k], own, self.tol)
        return adv.to(values).view_as(values)

    def state_dict(self) -> dict[str, Any]:
        """The buffers of all keys, for a checkpoint."""
        return {"values": [[name, k, list(kept)] for (name, k), kept in self._values.items()]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue with the buffers of a checkpoint."""
        self._values = {(name, k): deque(kept, maxlen=self.buffer) for name, k, kept in state["values"]}


def group_advantages(
    values: Tensor, group: Tensor, *, std: Literal["group", "global", "none"] = "group", tol: float = 1e-4
) -> Tensor:
    """Values minus the mean of their group, over a standard deviation.

        adv_i = (v_i - mean_group)/(std + tol)

    Source: DeepSeekMath (Shao et al., 2024), section 4.1.1, https://arxiv.org/abs/2402.03300; with the standard
    deviation of all rewards: Flow-GRPO (Liu et al., 2025), https://arxiv.org/abs/2505.05470.

    Args:
        values: shape [B] or [B, K].
        group: group of each row, integers, shape [B].
        std: of the "group", or of the whole batch ("global"); "none" does not divide.
        tol: added to the standard deviation.

    Returns:
        Advantages, of the shape and dtype of `values`, computed in float64; 0 exactly in a group of equal values.

    Raises:
        TypeError: values are no floating numbers.
        ValueError: another std, or not one group for each row.
    """
    _require_floating(values)
    if std not in ("group", "global", "none"):
        raise InputError(f"std is {std!r}: give 'group', 'global' or 'none'")
    if group.numel() != len(values):
        raise InputError(f"group has {group.numel()} entries for {len(values)} rows: give one group a row")
    table = values.double().reshape(len(values), -1)
    _, member = group.flatten().unique(return_inverse=True)
    one_hot = torch.nn.functional.one_hot(member).to(table)
    count = one_hot.sum(0)[:, None]
    low = table.new_full((len(count), table.shape[1]), math.inf)
    low = low.scatter_reduce(0, member[:, None].expand_as(table), table, "amin")
    centred = (
        table - low[member]
    )  # first by a member: equal values become 0 exactly, large ones keep their digits
    centred = centred - ((one_hot.T @ centred) / count)[member]
    scale = torch.ones_like(centred)
    if std == "global":
        scale = (table - table.amin(0)).std(0, correction=0) + tol
    elif std == "group":
        scale = ((one_hot.T @ centred**2) / count).sqrt()[member] + tol
    return (centred / scale).to(values).view_as(values)


def spread(values: Tensor) -> float:
    """Standard deviation of all values, denominator n: exactly 0 if they are equal, whatever their size."""
    x = values.detach().double()
    return float((x - x.min()).std(correction=0))


def _standardised(values: Tensor, known: Tensor, tol: float) -> Tensor:
    """(v - mean)/(std + tol) by the mean and std of other values, column by column; 0 exactly where all are equal."""
    low = known.amin(0)
    shifted = known - low
    return (values - low - shifted.mean(0)) / (shifted.std(0, correction=0) + tol)


def rewards_to_go(reward: Tensor, *, gamma: float) -> Tensor:
    """Discounted sum of the rewards from each step on, its own included: G_i = r_i + γ G_{i+1}, G_K = 0.

    Args:
        reward: r, shape [B, K, 1].
        gamma: discount γ ∈ [0, 1].

    Returns:
        G, shape [B, K, 1].

    Raises:
        ValueError: another shape, or gamma outside [0, 1].
    """
    _require_rows("reward", reward)
    terminated = torch.zeros_like(reward, dtype=torch.bool)
    terminated[:, -1] = True
    return monte_carlo_returns(reward, None, terminated, gamma=gamma)


def critic_advantages(
    reward: Tensor, value: Tensor, *, lmbda: float, gamma: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Advantages over a learned critic, and the targets to train it on: TD(λ) along each trajectory.

        G_i = r_i + γ [(1-λ) V_{i+1} + λ G_{i+1}],    V_K = 0,    adv_i = G_i - V_i

    This is generalised advantage estimation. λ = 1 is the reward-to-go minus V, λ = 0 is the one-step TD error.

    Source: High-Dimensional Continuous Control Using Generalized Advantage Estimation (Schulman et al., 2016),
    eq. 16, https://arxiv.org/abs/1506.02438.

    Args:
        reward: r, shape [B, K, 1].
        value: V of the state before each step, shape [B, K, 1]; it gets no gradient.
        lmbda: λ ∈ [0, 1].
        gamma: γ ∈ [0, 1].

    Returns:
        adv and G, shape [B, K, 1] each.

    Raises:
        ValueError: another shape, or lmbda or gamma outside [0, 1].
    """
    _require_rows("reward", reward)
    _require_rows("value", value)
    value = value.detach()
    next_value = torch.cat([value[:, 1:], torch.zeros_like(value[:, :1])], 1)
    terminated = torch.zeros_like(reward, dtype=torch.bool)
    terminated[:, -1] = True
    target = lambda_returns(reward, next_value, terminated, lmbda=lmbda, gamma=gamma)
    return target - value, target


def _require_floating(values: Tensor) -> None:
    """Advantages have the dtype of the values, and would be cut to whole numbers."""
    if not values.is_floating_point():
        raise InputTypeError(f"values have dtype {values.dtype}: give floating numbers, values.float()")


def _require_rows(name: str, x: Tensor) -> None:
    if x.ndim != 3 or x.shape[-1] != 1:
        raise InputError(
            f"{name} has shape {list(x.shape)}, but trajectories are rows and steps columns: [B, K, 1]"
        )
