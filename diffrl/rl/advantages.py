"""Credit for fine-tuning: statistics to standardise rewards by, rewards-to-go, and a learned critic's advantages.

Functions of tensors along chains, ignorant of diffusion. Rows are trajectories, columns are denoising steps.
"""

from collections import deque
from typing import Any, Literal

import torch
from torch import Tensor

from diffrl.rl.returns import lambda_returns, monte_carlo_returns

__all__ = ["FifoStatistics", "critic_advantages", "group_advantages", "rewards_to_go"]


class FifoStatistics:
    """Standardises values by the latest ones of the same key: of a prompt, or of a prompt and a step.

        push the values first;   A = (v - mean)/(std + tol),   std with denominator n

    mean and std are those of a key's buffer if it holds `min_count` values, else of the whole batch (in that
    column, where there are columns). The buffer persists over batches, and holds the batch itself.

    Source: Training Diffusion Models with Reinforcement Learning (Black et al., 2024), section 4.2 and its code's
    per-prompt statistics, https://arxiv.org/abs/2305.13301; by step: Aligning Few-Step Diffusion Models with Dense
    Reward Difference Learning (Zhang et al., 2024), https://arxiv.org/abs/2411.11727.

    Args:
        buffer: values kept of each key.
        min_count: values that a key needs before its own statistics are used.
        tol: added to the standard deviation.
    """

    def __init__(self, buffer: int = 32, min_count: int = 16, tol: float = 1e-6) -> None:
        if not 1 <= min_count <= buffer:
            raise ValueError(
                f"min_count is {min_count} and buffer {buffer}: a key can hold at most `buffer` values"
            )
        self.buffer, self.min_count, self.tol = buffer, min_count, tol
        self._values: dict[tuple[int, int], deque[float]] = {}

    def __call__(self, values: Tensor, key: Tensor | None = None) -> Tensor:
        """Advantages of values.

        Args:
            values: shape [B], or [B, K] to keep the statistics of each step apart.
            key: the prompt of each row, integers, shape [B]; None: one for all.

        Returns:
            Of the shape of `values`.
        """
        table = values.detach().cpu().double().reshape(len(values), -1)
        keys = [0] * len(values) if key is None else key.flatten().tolist()
        if len(keys) != len(values):
            raise ValueError(f"{len(keys)} keys for {len(values)} rows: give one key a row")
        for name, row in zip(keys, table.tolist(), strict=True):
            for k, value in enumerate(row):
                self._values.setdefault((name, k), deque(maxlen=self.buffer)).append(value)
        mean, std = (
            table.mean(0).expand_as(table).clone(),
            table.std(0, correction=0).expand_as(table).clone(),
        )
        for name in set(keys):
            rows = torch.tensor([name == other for other in keys])
            for k in range(table.shape[1]):
                kept = self._values[name, k]
                if len(kept) >= self.min_count:
                    own = torch.tensor(kept, dtype=torch.float64)
                    mean[rows, k], std[rows, k] = own.mean(), own.std(correction=0)
        return ((table - mean) / (std + self.tol)).to(values).view_as(values)

    def state_dict(self) -> dict[str, Any]:
        """The buffers, for a checkpoint."""
        return {"values": [[name, k, list(kept)] for (name, k), kept in self._values.items()]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the buffers of a checkpoint."""
        self._values = {(name, k): deque(kept, maxlen=self.buffer) for name, k, kept in state["values"]}


def group_advantages(
    values: Tensor, group: Tensor, *, std: Literal["group", "global", "none"] = "group", tol: float = 1e-4
) -> Tensor:
    """Values minus the mean of their group, over a standard deviation.

        A_i = (v_i - mean_group)/(std + tol)

    Source: DeepSeekMath (Shao et al., 2024), section 4.1.1, https://arxiv.org/abs/2402.03300; with the standard
    deviation of all rewards: Flow-GRPO (Liu et al., 2025), https://arxiv.org/abs/2505.05470.

    Args:
        values: shape [B] or [B, K].
        group: group of each row, integers, shape [B].
        std: of the group, of the whole batch, or none (A is centred only).
        tol: added to it.
    """
    if std not in ("group", "global", "none"):
        raise ValueError(f"std is {std!r}: give 'group', 'global' or 'none'")
    table = values.reshape(len(values), -1)
    _, member = group.flatten().unique(return_inverse=True)
    one_hot = torch.nn.functional.one_hot(member).to(table)
    count = one_hot.sum(0)[:, None]
    mean = (one_hot.T @ table) / count
    centred = table - mean[member]
    if std == "none":
        return centred.view_as(values)
    if std == "global":
        return (centred / (table.std(0, correction=0) + tol)).view_as(values)
    variance = (one_hot.T @ centred**2) / count
    return (centred / (variance.sqrt()[member] + tol)).view_as(values)


def rewards_to_go(reward: Tensor, *, gamma: float) -> Tensor:
    """G_i = R_i + γ G_{i+1}, G_K = 0: what is still to come, a step's own reward included.

    Args:
        reward: R, shape [B, K, 1].
        gamma: γ ∈ [0, 1].
    """
    terminated = torch.zeros_like(reward, dtype=torch.bool)
    terminated[:, -1] = True
    return monte_carlo_returns(reward, None, terminated, gamma=gamma)


def critic_advantages(
    reward: Tensor, value: Tensor, *, lmbda: float, gamma: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Advantages over a learned critic, and the targets to train it on: TD(λ) over denoising steps.

        G_i = R_i + γ [(1-λ) V_{i+1} + λ G_{i+1}],    V_K = 0,    A_i = G_i - V_i

    It is generalised advantage estimation; λ = 1 is reward-to-go with V as baseline, λ = 0 the one-step error.

    Source: High-Dimensional Continuous Control Using Generalized Advantage Estimation (Schulman et al., 2016),
    eq. 16, https://arxiv.org/abs/1506.02438.

    Args:
        reward: R, shape [B, K, 1].
        value: V at the states left, shape [B, K, 1], no gradient taken.
        lmbda: λ ∈ [0, 1].
        gamma: γ ∈ [0, 1].

    Returns:
        A and G, shape [B, K, 1] each.
    """
    value = value.detach()
    next_value = torch.cat([value[:, 1:], torch.zeros_like(value[:, :1])], 1)
    terminated = torch.zeros_like(reward, dtype=torch.bool)
    terminated[:, -1] = True
    target = lambda_returns(reward, next_value, terminated, lmbda=lmbda, gamma=gamma)
    return target - value, target
