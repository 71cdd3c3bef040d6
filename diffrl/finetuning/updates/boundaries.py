"""Updates on the states that a few-step generator stops at, each with fresh noise on top."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Generator, Tensor

from diffrl import keys
from diffrl.diffusion.renoising import between
from diffrl.errors import InputError
from diffrl.finetuning.policy import DenoisingPolicy
from diffrl.finetuning.updates.base import RowUpdates
from diffrl.finetuning.updates.registry import UPDATES
from diffrl.ranges import require_number

__all__ = ["BoundaryUpdates", "draw_times"]


@UPDATES.register("boundaries")
@dataclass(frozen=True)
class BoundaryUpdates(RowUpdates):
    """Minibatches of boundaries x_{k+1}, the states at which a few-step generator stops, with a time and noise each.

        x_t = a x_{k+1} + b ε,    t ~ U between t_{k+1} and t_k ("trajectory") or t_0 ("reverse"), in index units

    With `of` "estimate" the boundary is the clean estimate D_θ(x_k) itself, noised afresh over the whole range: then
    the steps may be stochastic, as those of DMD2's generators are.

    An update has every trajectory of its part at `draws` different steps k. Each pass draws anew. A minibatch holds
    the step (x_t, index, x0_hat, next x_t), advantage, cond, group, and `RENOISE_T`, `NOISE` of what is added.

    Source: Learning Few-Step Diffusion Models by Trajectory Distribution Matching (Luo et al., 2025), eq. 5,
    https://arxiv.org/abs/2503.06674; of estimates: Improved Distribution Matching Distillation for Fast Image Synthesis
    (Yin et al., 2024), https://arxiv.org/abs/2405.14867.

    Args:
        of: "boundary" or "estimate".
        interval: "trajectory", whose times do not overlap, so that one network can learn all of them, or "reverse".
        draws: m, steps of each trajectory in an update, without repetition.
        margin: share of the grid next to x_{k+1} that is left out, see `diffrl.diffusion.renoising.between`.
        minibatches: parts that the trajectories are split into.
        passes: over the rollout.
        micro_batch: most states forwarded at once; gradients are accumulated over them.

    Raises:
        ValueError: an argument outside its range.
    """

    unit: ClassVar[Literal["boundaries", "preferences"]] = "boundaries"
    of: Literal["boundary", "estimate"] = "boundary"
    interval: Literal["trajectory", "reverse"] = "trajectory"
    draws: int = 1
    margin: float = 0.02
    minibatches: int = 1
    passes: int = 1
    micro_batch: int = 256

    def __post_init__(self) -> None:
        self._check()
        if self.of not in ("boundary", "estimate"):
            raise InputError(f"updates.of is {self.of!r}: give 'boundary' or 'estimate'")
        if self.interval not in ("trajectory", "reverse"):
            raise InputError(f"updates.interval is {self.interval!r}: give 'trajectory' or 'reverse'")
        require_number("updates.margin", self.margin, 0, 1, "()")

    def refuses(self, policy: DenoisingPolicy) -> str | None:
        """Refuse more draws than the policy has steps, and noise in its steps."""
        if self.draws > policy.num_steps:
            return f"updates.draws is {self.draws}, but the policy has {policy.num_steps} steps: draw no more"
        if policy.stochastic_steps and self.of == "boundary":
            return "the generator must be deterministic: take sampler ddim or euler, and policy.std_floor=0"
        return None

    def __call__(
        self,
        rollout: TensorDictBase,
        *,
        policy: DenoisingPolicy,
        group_size: int,
        generator: Generator,
        entries: Iterable[str],
    ) -> Iterator[TensorDict]:
        """Boundaries [n, m] of each update, in order."""
        B, K = rollout.shape
        kept = (
            keys.X_T,
            keys.INDEX,
            keys.X0_HAT,
            (keys.NEXT, keys.X_T),
            (keys.NEXT, keys.T),
            keys.ADVANTAGE,
            keys.COND,
            keys.GROUP,
        )
        rollout = rollout.select(*kept, strict=False)
        for _ in range(self.passes):
            steps = torch.rand(B, K, generator=generator).argsort(1)[:, : self.draws]
            for rows in self._rows(B, group_size, generator):
                yield self._minibatch(rollout[rows.to(rollout.device)], steps[rows], policy, generator)

    def _minibatch(
        self, rollout: TensorDictBase, k: Tensor, policy: DenoisingPolicy, generator: Generator
    ) -> TensorDict:
        """The boundaries [n, m] that steps k [n, m] of trajectories [n, K] lead to."""
        rows = torch.arange(len(rollout))[:, None]
        part = rollout[rows.to(rollout.device), k.to(rollout.device)]
        k = part.get(keys.INDEX).squeeze(-1).cpu()  # a rollout may hold the last steps only
        u = torch.rand(k.shape, generator=generator)
        if self.of == "estimate":
            part.set((keys.NEXT, keys.X_T), part.get(keys.X0_HAT))
            part.set(
                (keys.NEXT, keys.T), torch.full_like(part.get((keys.NEXT, keys.T)), policy.process.t_clean)
            )
            last = torch.full_like(k, policy.num_steps - 1)
            t = draw_times(policy, last, "reverse", self.margin, self.margin + (1 - self.margin) * u)
        else:
            t = draw_times(policy, k, self.interval, self.margin, u)
        noise = torch.randn(part.get(keys.X_T).shape, generator=generator)
        return part.update(
            {keys.RENOISE_T: t[..., None].to(rollout.device), keys.NOISE: noise.to(rollout.device)}
        )


def draw_times(
    policy: DenoisingPolicy,
    k: Tensor,
    interval: Literal["trajectory", "reverse"],
    margin: float,
    u: Tensor,
    *,
    t_min: float = -math.inf,
) -> Tensor:
    """Times to add noise up to, after steps k [*b]: float64, of k's shape.

    Args:
        policy: whose grid it is.
        k: steps, integers.
        interval: see `BoundaryUpdates`.
        margin: see `diffrl.diffusion.renoising.between`.
        u: numbers in [0, 1), of k's shape or broadcastable against it.
        t_min: no time is below this, apart from the margin; in discrete time clean data lie below 0.
    """
    grid = policy.grid
    noisiest = grid[k] if interval == "trajectory" else grid[:1].expand(k.shape)
    return between(policy.process, noisiest, grid[k + 1].clamp(min=t_min), u.expand(k.shape), margin=margin)
