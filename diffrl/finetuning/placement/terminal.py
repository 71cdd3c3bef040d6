"""Where rewards stand along a denoising chain: at its end, or at the clean estimate of every step."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

import torch
from tensordict import TensorDictBase
from torch import Tensor

from diffrl import keys
from diffrl.finetuning.placement.similarity import DenseMode, dense_queries, predict_dense
from diffrl.rewards.black_box import Reward

__all__ = ["PLACEMENTS", "Dense", "Placement", "Terminal", "trajectory_condition"]


def trajectory_condition(rollout: TensorDictBase) -> Tensor | None:
    """The condition of each trajectory of a rollout [B, K], shape [B, ...]; None without one."""
    cond = rollout.get(keys.COND, None)
    return None if cond is None else cond[:, 0]


class Placement(Protocol):
    """Asks a reward about a rollout and pays its steps."""

    @property
    def dense(self) -> bool:
        """Whether steps before the last are paid."""
        ...

    def __call__(self, rollout: TensorDictBase, reward: Reward) -> Tensor:
        """Rewards r of the steps of a rollout [B, K], float32 [B, K, 1]."""
        ...

    def queries(self, num_steps: int) -> int:
        """Reward queries of a trajectory of K = num_steps steps."""
        ...


@dataclass(frozen=True)
class Terminal:
    """The last step is paid for the sample that it draws: r_{K-1} = R(x_K, c), all others 0.

    Source: Training Diffusion Models with Reinforcement Learning (Black et al., 2024), section 4.2,
    https://arxiv.org/abs/2305.13301.
    """

    dense: ClassVar[bool] = False

    def __call__(self, rollout: TensorDictBase, reward: Reward) -> Tensor:
        """One query a trajectory."""
        x_K = rollout.get((keys.NEXT, keys.X_T))[:, -1]
        r = torch.zeros(*rollout.shape, 1, device=x_K.device)
        r[:, -1, 0] = torch.as_tensor(reward(x_K, trajectory_condition(rollout))).to(r)
        return r

    def queries(self, num_steps: int) -> int:
        """1."""
        return 1


@dataclass(frozen=True)
class Dense:
    """Every step is paid for a clean estimate, queried or predicted from few: see `predict_dense`.

        timing "state":  r_i = R̂(x̂_i)        the estimate that step i starts from, as published
        timing "next":   r_i = R̂(x̂_{i+1}),   r_{K-1} = R(x_K): what step i leads to

    x̂_i is a function of x_i alone, so with "state" the reward of a step does not depend on its own noise: only
    later rewards teach it, and the last step learns nothing.

    Source: Aligning Few-Step Diffusion Models with Dense Reward Difference Learning (Zhang et al., 2024),
    https://arxiv.org/abs/2411.11727; "next" is ours.

    Args:
        mode: what to query: "anchor" (3 a trajectory), "linear" (2), "last" (1) or "all" (K).
        timing: "state" or "next".
        interior: where the anchor is looked for.
        guarded: whether similarities below 0 count as 0; False is the published form.

    Raises:
        ValueError: an unknown mode or timing.
    """

    dense: ClassVar[bool] = True
    mode: DenseMode = "anchor"
    timing: Literal["state", "next"] = "state"
    interior: bool = True
    guarded: bool = True

    def __post_init__(self) -> None:
        dense_queries(self.mode, 1)
        if self.timing not in ("state", "next"):
            raise ValueError(f"placement.timing is {self.timing!r}: give 'state' or 'next'")

    def __call__(self, rollout: TensorDictBase, reward: Reward) -> Tensor:
        """`queries` queries a trajectory."""
        x_hat = rollout.get(keys.X0_HAT)
        if self.timing == "next":
            x_hat = torch.cat([x_hat[:, 1:], rollout.get((keys.NEXT, keys.X_T))[:, -1:]], 1)
        options = {"mode": self.mode, "interior": self.interior, "guarded": self.guarded}
        return predict_dense(x_hat, reward, trajectory_condition(rollout), **options)[..., None]  # type: ignore[arg-type]

    def queries(self, num_steps: int) -> int:
        """As `diffrl.finetuning.placement.similarity.dense_queries`."""
        return dense_queries(self.mode, num_steps)


PLACEMENTS: dict[str, Callable[..., Placement]] = {"terminal": Terminal, "dense": Dense}
