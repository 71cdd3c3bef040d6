"""What a tuned policy is worth: held-out reward, divergence and distance from the base, diversity; when to stop."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor

from diffrl import keys
from diffrl.errors import InputError
from diffrl.finetuning.policy import DenoisingPolicy
from diffrl.finetuning.rollouts.base import trajectory_condition
from diffrl.finetuning.rollouts.chains import collect_rollout, require_sound
from diffrl.metrics.distances import sample_distance
from diffrl.metrics.measures import FigureName, measure_names
from diffrl.ranges import require_int, require_number
from diffrl.rewards.calls import Reward
from diffrl.rewards.weighted_sum import as_reward

__all__ = ["TO_BASE", "EarlyStop", "Judge", "TuningEvaluation", "chain_kl", "diversity", "to_base_of"]

EVAL_SEED = 3_141_592  # of held-out noise: the same for every run, and no training seed's
TO_BASE = "distance_to_base"  # begin of its name; in tables of diffrl 0.3 and before all of it


@torch.no_grad()
def chain_kl(policy: DenoisingPolicy, base: DenoisingPolicy, rollout: TensorDict) -> Tensor:
    """KL(π ‖ π_base) of whole chains, estimated from the policy's own: Σ_i KL of step i, in nats, shape [B].

    The steps' divergences are exact; deterministic steps, where it is infinite or 0, are left out.

    Args:
        policy: π, which drew the rollout.
        base: π_base, on the same grid.
        rollout: [B, K].
    """
    total = torch.zeros(len(rollout), device=rollout.device)
    cond, stochastic = trajectory_condition(rollout), rollout.get(keys.TRAINABLE)[0, :, 0].tolist()
    for i in [i for i, is_so in enumerate(stochastic) if is_so]:
        x, D_x = rollout.get(keys.X_T)[:, i], rollout.get(keys.X0_HAT)[:, i]
        own = policy.law_of_estimate(x, torch.full((len(x),), i), D_x)
        other = base.law(x, torch.full((len(x),), i), cond)
        total += own.kl(other, "sum")
    return total


def diversity(x: Tensor) -> float:
    """Mean distance between two samples per dimension: mean ‖x_a - x_b‖/√dim over all pairs of x [N, *E], N ≥ 2."""
    flat = x.flatten(1).double()
    return float(torch.pdist(flat).mean()) / math.sqrt(flat.shape[1])


@dataclass(frozen=True)
class TuningEvaluation:
    """What to measure of a tuned policy.

    Args:
        samples: drawn from fixed held-out noise, 2 to 1,000,000.
        distance: to the base policy's samples of the same noise; one of `diffrl.metrics.measure_names`.
        at_once: most of them drawn side by side; None: all.

    Raises:
        ValueError: an argument outside its range.
    """

    samples: int = 256
    distance: str = "sliced_w2"
    at_once: int | None = None

    def __post_init__(self) -> None:
        require_int("evaluation.samples", self.samples, 2, 10**6)
        if self.at_once is not None:
            require_int("evaluation.at_once", self.at_once)
        if self.distance not in (known := measure_names(with_weights=False)):
            raise InputError(f"evaluation.distance is {self.distance!r}: give one of {', '.join(known)}")

    @property
    def to_base(self) -> str:
        """What the distance to the base is called, with its measure, the number of samples and their seed."""
        return str(FigureName(f"{TO_BASE}_{self.distance}", self.samples, f"seed{EVAL_SEED}"))


def to_base_of(names: Iterable[str]) -> str:
    """Which of these names of figures is that of the distance to the base."""
    return next((name for name in names if name.startswith(TO_BASE)), TO_BASE)


class Judge:
    """Evaluates policies on the same held-out noise and conditions; what it asks is not counted as queries.

    Args:
        evaluation: what to measure.
        base: the policy before tuning.
        reward: R, the one that is tuned for.
        heldout: a second reward, never trained on, that should rise along; None: none.
        event_shape: *E of a latent.
        conditions: taken in turn, [M, ...]; None: no condition.
        device: where to draw.
        precision: the run's autocast, for policies; rewards are asked outside it, as in training.
    """

    def __init__(
        self,
        evaluation: TuningEvaluation,
        base: DenoisingPolicy,
        reward: Reward,
        *,
        heldout: Reward | None = None,
        event_shape: tuple[int, ...],
        conditions: Tensor | None = None,
        device: torch.device | str = "cpu",
        precision: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        self.evaluation, self.base, self.event_shape, self.device = evaluation, base, event_shape, device
        self.precision = precision
        self.reward, self.heldout = as_reward(reward), None if heldout is None else as_reward(heldout)
        self.cond = None
        if conditions is not None:
            self.cond = conditions[torch.arange(evaluation.samples) % len(conditions)].to(device)
        self.base_samples = self.draw(base)[0]
        sample_distance(evaluation.distance, self.base_samples.cpu(), self.base_samples.cpu())

    def draw(self, policy: DenoisingPolicy) -> tuple[Tensor, TensorDict]:
        """The policy's samples of the held-out noise, [samples, *E], and their rollout; not counted in its nfe."""
        nfe, n = policy.nfe, self.evaluation.samples
        generators = [torch.Generator(self.device).manual_seed(EVAL_SEED + j) for j in range(n)]
        with self.precision():
            rollout = collect_rollout(
                policy,
                self.event_shape,
                batch_size=n,
                cond=self.cond,
                generator=generators,
                device=self.device,
                at_once=self.evaluation.at_once,
            )
        policy.nfe = nfe
        return rollout.get((keys.NEXT, keys.X_T))[:, -1].clone(), rollout

    def __call__(self, policy: DenoisingPolicy) -> dict[str, float]:
        """Figures of a policy; docs/metrics.md defines them.

        Raises:
            NonFiniteLoss: see `diffrl.finetuning.rollouts.chains.require_sound`.
        """
        x, rollout = self.draw(policy)
        require_sound(rollout)
        R = self.reward.score(x, self.cond)
        nfe = self.base.nfe
        parts = rollout.split(self.evaluation.at_once or len(rollout))
        with self.precision():
            kl = torch.cat([chain_kl(policy, self.base, part) for part in parts])
        self.base.nfe = nfe
        figures = {
            "eval_reward": float(R.mean()),
            "eval_reward_std": float(R.std(correction=0)),
            "eval_reward_best": float(R.max()),
            "kl_to_base": float(kl.mean()),
            self.evaluation.to_base: sample_distance(
                self.evaluation.distance, x.cpu(), self.base_samples.cpu()
            ),
            "diversity": diversity(x.cpu()),
        }
        if self.heldout is not None:
            figures["heldout_reward"] = float(self.heldout.score(x, self.cond).mean())
        return figures


@dataclass(frozen=True)
class EarlyStop:
    """When to end a run before it over-optimises; by default never.

    Args:
        patience: evaluations without a new best of the held-out reward (without one: of the reward on held-out
            noise) after which to stop; None: never.
        max_kl: stop where the divergence from the base, `kl_to_base`, is above this; None: never.
        min_diversity: stop where the diversity is below this share of the base's; None: never.

    Raises:
        ValueError: an argument outside its range.
    """

    patience: int | None = None
    max_kl: float | None = None
    min_diversity: float | None = None

    def __post_init__(self) -> None:
        if self.patience is not None:
            require_int("stop.patience", self.patience)
        if self.max_kl is not None:
            require_number("stop.max_kl", self.max_kl, 0, ends="()")
        if self.min_diversity is not None:
            require_number("stop.min_diversity", self.min_diversity, 0, 1, "()")

    def reason(self, rows: Sequence[Mapping[str, float]]) -> str | None:
        """Why to stop after these evaluations, the base's first; None to go on.

        Args:
            rows: figures of `Judge`, in order.
        """
        last, first = rows[-1], rows[0]
        if self.max_kl is not None and last["kl_to_base"] > self.max_kl:
            return f"kl_to_base {last['kl_to_base']:.3g} is above stop.max_kl={self.max_kl:g}"
        share = last["diversity"] / first["diversity"] if first["diversity"] > 0 else 1.0
        if self.min_diversity is not None and share < self.min_diversity:
            return (
                f"diversity is {share:.0%} of the base's, below stop.min_diversity={self.min_diversity:.0%}"
            )
        name = "heldout_reward" if "heldout_reward" in last else "eval_reward"
        values = [row[name] for row in rows]
        since = len(values) - 1 - max(range(len(values)), key=values.__getitem__)
        if self.patience is not None and since >= self.patience:
            return f"{name} had no new best in {since} evaluations"
        return None
