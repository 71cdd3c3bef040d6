"""Closeness to a point, or to a mode of the data, as a reward."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from diffrl.data.mixtures import Mixture
from diffrl.errors import InputError
from diffrl.ranges import require_number
from diffrl.rewards.registry import REWARDS

__all__ = ["ModeDistance"]


@REWARDS.register("mode_distance")
@dataclass(frozen=True, eq=False)
class ModeDistance:
    """Minus the squared distance to a point or to a mode: R = -‖x - μ‖², in (-∞, 0].

    Args:
        point: μ, its numbers in the order of the flattened sample.
        index: instead, which mode of `mixture`.
        mixture: the data's law, e.g. ``diffrl.data.rings().mixture``.

    Raises:
        ValueError: neither or both are given, or there is no such mode; when called, a sample of another size.
    """

    point: Sequence[float] | None = None
    index: int | None = None
    mixture: Mixture | None = None
    _mu: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if (self.point is None) == (self.index is None) or (self.index is None) != (self.mixture is None):
            raise InputError("mode_distance needs a point, or index and mixture: one of the two")
        mu: Any = self.point
        if self.mixture is not None and self.index is not None:
            modes = self.mixture.means
            if not 0 <= self.index < len(modes):
                raise InputError(f"index is {self.index}, but the mixture has {len(modes)} modes")
            mu = modes[self.index]
        if isinstance(mu, str) or not isinstance(mu, Sequence | Tensor):
            raise InputError(f"point is {mu!r}: give a list of numbers, one for each dimension of a sample")
        object.__setattr__(
            self, "_mu", torch.tensor([require_number("point", c) for c in mu], dtype=torch.float64)
        )

    def __call__(self, x0: Tensor, cond: Any = None) -> Tensor:
        """Rewards of samples [N, *E]: floats [N]."""
        mu = self._mu.to(x0)
        if mu.shape != (math.prod(x0.shape[1:]),):
            raise InputError(
                f"the point has {mu.numel()} numbers, but a sample has {math.prod(x0.shape[1:])}"
            )
        return -(x0.flatten(1) - mu).square().sum(1)
