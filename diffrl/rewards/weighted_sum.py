"""Weighted sums of rewards; and two helpers for any reward, a sum or not."""

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from diffrl.errors import InputError
from diffrl.ranges import require_number
from diffrl.rewards.black_box import BlackBox
from diffrl.rewards.calls import Reward

__all__ = ["WeightedSum", "as_reward", "nondeterminism"]


class WeightedSum:
    """Several rewards added up as one; each can be standardised first.

        R = Σⱼ wⱼ Rⱼ    or    R = Σⱼ wⱼ (Rⱼ - mⱼ)/(sⱼ + tol)

    mⱼ and sⱼ are mean and standard deviation (denominator n) of all values that reward j has given to this
    object, those of the present call included. Without standardising, the reward with the largest spread decides
    almost alone. With it, a value depends on what came before, so a `BlackBox` with a cache may be a part of such
    a sum, but must not wrap one.

    Source: GDPO: Group reward-Decoupled Normalization Policy Optimization for Multi-reward RL Optimization (Liu et
    al., 2026), https://arxiv.org/abs/2601.05242, which standardises within a group.

    Args:
        rewards: name → (reward, weight). A callable that is no `BlackBox` is made one. Weight 0: only logged.
        normalise: "none", or "running" to standardise as above.
        tol: added to sⱼ.

    Raises:
        ValueError: no reward, a weight that is not finite, an unknown normalisation.
    """

    def __init__(
        self,
        rewards: Mapping[str, tuple[Reward, float]],
        *,
        normalise: Literal["none", "running"] = "none",
        tol: float = 1e-6,
    ) -> None:
        if not rewards:
            raise InputError("a weighted sum needs at least one reward: name -> (reward, weight)")
        if normalise not in ("none", "running"):
            raise InputError(f"normalise is {normalise!r}: give 'none' or 'running'")
        for name, (_, weight) in rewards.items():
            require_number(f"the weight of {name!r}", weight)
        require_number("tol", tol, 0)
        self.parts = {name: as_reward(reward) for name, (reward, _) in rewards.items()}
        for name, part in self.parts.items():
            part.name = name
        self.weights = {name: float(weight) for name, (_, weight) in rewards.items()}
        self.normalise, self.tol = normalise, tol
        self.name: str = " + ".join(rewards)
        self.latest: dict[str, Tensor] = {}
        """What each reward gave in the last call, as it is, float32 [N]."""
        self._moments = {name: (0, 0.0, 0.0) for name in rewards}  # count, mean, sum of squared deviations

    def __call__(self, x0: Tensor, cond: Any = None) -> Tensor:
        """Weighted sums of rewards.

        Args:
            x0: samples, shape [N, *E].
            cond: tensor [N, ...], list of N, or None.

        Returns:
            float32 [N], without gradients.
        """
        self.latest = {name: part(x0, cond) for name, part in self.parts.items()}
        total = torch.zeros(len(x0), dtype=torch.float64, device=x0.device)
        for name, reward in self.latest.items():
            r = reward.double()
            if self.normalise == "running":
                m, s = self._updated(name, r)
                r = (r - m) / (s + self.tol)
            total += self.weights[name] * r
        return total.float()

    def score(self, x0: Tensor, cond: Any = None) -> Tensor:
        """Weighted sums for evaluation: not standardised, not cached and not counted.

        Args:
            x0: samples, shape [N, *E].
            cond: tensor [N, ...], list of N, or None.
        """
        parts = [self.weights[name] * part.score(x0, cond).double() for name, part in self.parts.items()]
        return torch.stack(parts).sum(0).float()

    def _updated(self, name: str, r: Tensor) -> tuple[float, float]:
        """Mean and standard deviation of all values of a reward so far, after adding r [N] to them."""
        count, mean, squares = self._moments[name]
        if n := len(r):
            shift = float(r.mean()) - mean
            squares += float((r - r.mean()).square().sum()) + shift**2 * count * n / (count + n)
            mean += shift * n / (count + n)
        self._moments[name] = count + n, mean, squares
        return mean, math.sqrt(squares / max(count + n, 1))

    @property
    def queries(self) -> int:
        """Samples that the rewards were asked to score, added up over all rewards."""
        return sum(part.queries for part in self.parts.values())

    @property
    def failures(self) -> int:
        """Samples that got what `on_failure` says, over all rewards."""
        return sum(part.failures for part in self.parts.values())

    def metrics(self) -> dict[str, float]:
        """For a log: mean and standard deviation of each reward in the last call, and its counts."""
        log: dict[str, float] = {}
        for name, part in self.parts.items():
            if name in self.latest and len(self.latest[name]):
                r = self.latest[name].double()
                log |= {f"{name}/mean": float(r.mean()), f"{name}/std": float(r.std(correction=0))}
            log |= {f"{name}/{key}": value for key, value in part.metrics().items()}
        return log

    def close(self) -> None:
        """End the workers of all rewards."""
        for part in self.parts.values():
            part.close()

    def state_dict(self) -> dict[str, Any]:
        """The statistics, and the state of every reward, for a checkpoint."""
        moments = {name: list(moment) for name, moment in self._moments.items()}
        return {"moments": moments, "parts": {name: part.state_dict() for name, part in self.parts.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take the state of a checkpoint."""
        self._moments = {name: tuple(state["moments"][name]) for name in self.parts}
        for name, part in self.parts.items():
            part.load_state_dict(state["parts"][name])


def as_reward(reward: Reward, **calls: Any) -> BlackBox | WeightedSum:
    """The reward itself if its calls are checked and counted already, else a `BlackBox` of it.

    Args:
        reward: any reward.
        calls: options of that `BlackBox`, which refuses what it does not know.
    """
    return reward if isinstance(reward, BlackBox | WeightedSum) else BlackBox(reward, **calls)


def nondeterminism(reward: Reward, x0: Tensor, cond: Any = None) -> float:
    """The largest difference between the rewards of the same samples, asked twice: 0 for a deterministic reward.

    Caches are not used, and `queries` does not count these calls. For a `WeightedSum` it is the largest difference
    of any of its rewards.

    Args:
        reward: the callable.
        x0: samples, shape [N, *E].
        cond: tensor [N, ...], list of N, or None.
    """
    box = as_reward(reward)
    if isinstance(box, WeightedSum):
        return max(nondeterminism(part, x0, cond) for part in box.parts.values())
    first, second = box.score(x0, cond), box.score(x0, cond)
    return float((first - second).abs().max()) if len(x0) else 0.0
