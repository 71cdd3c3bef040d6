"""Returns or rewards-to-go, standardised by the latest ones of the same prompt: the credit of DDPO and of SDPO."""

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from tensordict import TensorDictBase
from torch import Tensor

from diffrl.errors import InputError
from diffrl.finetuning.credit.base import Credit
from diffrl.finetuning.credit.registry import CREDITS
from diffrl.finetuning.rollouts.base import trajectory_condition
from diffrl.ranges import require_int, require_number
from diffrl.rl.advantages import FifoStatistics, rewards_to_go

__all__ = ["RewardsToGo", "Standardised"]

PROMPT_BUFFER = 32
ROLLOUTS_KEPT = 4


def _prompt(rollout: TensorDictBase, per: str) -> Tensor | None:
    """The prompt of each row, by which statistics are kept apart: integers [B], or None for one buffer."""
    cond = trajectory_condition(rollout)
    if per != "prompt" or cond is None:
        return None
    if cond.ndim != 1 or cond.is_floating_point():
        raise InputError(
            f"credit.per is 'prompt', but conditions are {cond.dtype} of shape {list(cond.shape[1:])}: "
            "statistics are kept by integers; give per='batch'"
        )
    return cond


@dataclass
class _Fifo(Credit):
    """Statistics that persist over rollouts: see `FifoStatistics`."""

    shared: ClassVar[bool] = True
    buffer: int | None = None
    min_count: int = 16
    per: Literal["prompt", "batch", "rollout"] = "prompt"
    statistics: FifoStatistics | None = field(init=False, default=None, repr=False, compare=False)
    raw_std: float = field(init=False, default=math.nan, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.per not in ("prompt", "batch", "rollout"):
            raise InputError(f"credit.per is {self.per!r}: give 'prompt', 'batch' or 'rollout'")
        require_int("credit.min_count", self.min_count)
        if self.buffer is not None and require_int("credit.buffer", self.buffer) < self.min_count:
            raise InputError(
                f"credit.buffer is {self.buffer}: it must hold credit.min_count, {self.min_count}"
            )

    def _standardise(self, values: Tensor, rollout: TensorDictBase) -> Tensor:
        """Values [B] or [B, K] by the statistics of their prompts."""
        prompt = _prompt(rollout, self.per)
        above = values.double() - values.double().amin(0)  # equal values are 0 exactly
        self.raw_std = float((above - above.mean(0)).std(correction=0))
        if self.per == "rollout":
            return FifoStatistics(len(values), 1)(values)
        if self.statistics is None:
            size = self.buffer or (PROMPT_BUFFER if prompt is not None else ROLLOUTS_KEPT * len(values))
            self.statistics = FifoStatistics(size, min(self.min_count, size))
        return self.statistics(values, prompt)

    def centred_over(self, *, one_condition: bool) -> Literal["batch"] | None:
        """The batch has mean 0 if one buffer holds all of it."""
        whole = self.buffer is None and (one_condition or self.per == "batch")
        return "batch" if whole or self.per == "rollout" else None

    def state_dict(self) -> dict[str, Any]:
        """Values that are kept."""
        s = self.statistics
        return {} if s is None else {"size": s.buffer, **s.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the buffers of a checkpoint."""
        if state:
            self.statistics = FifoStatistics(state["size"], min(self.min_count, state["size"]))
            self.statistics.load_state_dict(state)


@CREDITS.register("standardised")
@dataclass
class Standardised(_Fifo):
    """All steps of a trajectory get its return, standardised by the latest returns of its prompt.

        adv_i = (R - mean)/(std + 1e-6),    R = Σ_i r_i

    Source: Training Diffusion Models with Reinforcement Learning (Black et al., 2024), section 4.2 and its code,
    https://arxiv.org/abs/2305.13301.

    Args:
        buffer: returns kept of a prompt; None: the published 32, or without prompts four rollouts' worth.
        min_count: returns that a prompt needs before its own statistics are used.
        per: "prompt"; "batch": one buffer for all; or "rollout": no buffer, the rollout's own mean and standard
            deviation, which is what the published code does with its tracking off.

    Raises:
        ValueError: an argument outside its range; when called, conditions that are no integers.
    """

    @property
    def takes_dense(self) -> bool:
        """No: a trajectory gets one advantage."""
        return False

    def __call__(self, rollout: TensorDictBase, reward: Tensor) -> Tensor:
        """Advantages, the same for all steps of a trajectory."""
        adv = self._standardise(reward.sum((1, 2)), rollout)
        return adv[:, None, None].expand_as(reward)


@CREDITS.register("rewards_to_go")
@dataclass
class RewardsToGo(_Fifo):
    """Each step gets the rewards from it on, standardised by the latest values of its prompt *and step*.

        G_i = r_i + γ G_{i+1},    adv_i = (G_i - mean_i)/(std_i + 1e-6)

    Source: Aligning Few-Step Diffusion Models with Dense Reward Difference Learning (Zhang et al., 2024) and its
    code, https://arxiv.org/abs/2411.11727.

    Args:
        buffer: values kept of a prompt and step; None: the published 32, or without prompts four rollouts' worth.
        min_count: values needed before their own statistics are used.
        per: "prompt"; "batch": one buffer a step for all; or "rollout": no buffer, each step among the rollout's
            own. (With its tracking off, the published code takes all steps together: advantages early in the
            chain are then nearly all above 0, late ones below.)
        gamma: γ ∈ [0, 1].

    Raises:
        ValueError: an argument outside its range; when called, conditions that are no integers.
    """

    gamma: float = 0.99

    def __post_init__(self) -> None:
        super().__post_init__()
        require_number("credit.gamma", self.gamma, 0, 1)

    def __call__(self, rollout: TensorDictBase, reward: Tensor) -> Tensor:
        """Advantages, each step's own."""
        G = rewards_to_go(reward, gamma=self.gamma)
        return self._standardise(G[..., 0], rollout)[..., None]
