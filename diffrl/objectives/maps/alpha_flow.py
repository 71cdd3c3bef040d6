"""α-Flow: one number leads from flow matching on whole jumps over shortcuts to MeanFlow."""

import math
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from diffrl.diffusion.denoisers import Denoiser
from diffrl.errors import InputError
from diffrl.objectives.annealing import Ranges
from diffrl.objectives.maps.improved_mean_flow import ImprovedMeanFlowPairs
from diffrl.objectives.maps.loss import MapLoss, MapRows, jump
from diffrl.objectives.place import Place
from diffrl.objectives.registry import OBJECTIVES
from diffrl.ranges import require_number
from diffrl.shapes import expand_like

__all__ = ["AlphaFlowLoss", "alpha_at"]


def alpha_at(step: int, grad_steps: int, *, gamma: float = 25.0, clamp: float = 0.005) -> float:
    """α at gradient step k, counted from 0, of K: a sigmoid from 1 to 0, which reaches both.

        α = σ(-γ (k/(K-1) - ½)),    0 where α < clamp,    1 where α > 1 - clamp

    >>> [round(alpha_at(k, 101), 3) for k in (0, 40, 50, 60, 100)]
    [1.0, 0.924, 0.5, 0.076, 0.0]

    Source: AlphaFlow: Understanding and Improving MeanFlow Models (Zhang et al., 2025),
    https://arxiv.org/abs/2510.20771, and its released code.

    Args:
        step: k.
        grad_steps: K.
        gamma: γ > 0, steepness.
        clamp: in [0, 0.5).
    """
    alpha = 1 / (1 + math.exp(gamma * (min(step / max(grad_steps - 1, 1), 1.0) - 0.5)))
    return 0.0 if alpha < clamp else 1.0 if alpha > 1 - clamp else alpha


@OBJECTIVES.register(
    "alpha_flow",
    also=ImprovedMeanFlowPairs,
    label="α-Flow",
    place=Place("map", "pairs", "shared", "instant", "own", "forward", begins="end"),
)
class AlphaFlowLoss(MapLoss):
    """α-Flow: u at (t, r) is pulled to a step of the data's velocity over a share α of the jump, and u from there on.

        L = w ‖u(x, t, r) - y‖²,    y = α v + (1-α) sg[u(x_s, s, r)],    s = α r + (1-α) t,    x_s = x - (t - s) v
        w = α^{2p-1}/sg(‖u - y‖²/dim(E) + c)^p/dim(E)

    At r = t it is flow matching, with α = 1 in w. At α = 1 it is flow matching for every r, which learns no map; at ½
    with u in place of v it would be a shortcut; as α → 0, u - y is α times MeanFlow's difference, whence the power of
    α, and α = 0 is MeanFlow, by a Jacobian-vector product. At the exact map the target of 0 < α < 1 has a bias, as x_s
    is on average an Euler step from x and not on the path through it. Where u is linear in x, as for Gaussian data,

        E[y | x] - u = (X_{t→r}(x) - X_{s→r}(x - (t-s) E[v | x]))/(t-r),    of order α²(t-r)

    Source: AlphaFlow: Understanding and Improving MeanFlow Models (Zhang et al., 2025),
    https://arxiv.org/abs/2510.20771, and its released code, for 256² images without guidance: p = 1, and α as in
    `alpha_at` over the whole training. c is not in what was read of it. The release can clip y, and guides v; both are
    left out.

    Args:
        denoiser: D of two times, on `Flow` or `EDM`; trained in place.
        alpha: α ∈ [0, 1], constant; None is `alpha_at`.
        gamma: γ > 0, steepness of `alpha_at`, ≤ 1000.
        clamp: of `alpha_at`, in [0, 0.5).
        p: ≥ 0, of the weight; 0 leaves 1/α.
        c: > 0, of the weight.
        anneal: as in `ValueLoss`: alpha, in place of `alpha_at`.

    Raises:
        ValueError: an argument outside its range, alpha both given and annealed, another process, a denoiser without a
            second time.
    """

    annealable: ClassVar[Ranges] = {"alpha": (0, 1)}

    def __init__(
        self,
        denoiser: Denoiser,
        *,
        alpha: float | None = None,
        gamma: float = 25.0,
        clamp: float = 0.005,
        p: float = 1.0,
        c: float = 1e-3,
        anneal: Mapping[str, Sequence[float]] | None = None,
    ) -> None:
        if alpha is not None:
            require_number("alpha", alpha, 0, 1)
        require_number("gamma", gamma, 0, 1000, ends="(]")
        require_number("clamp", clamp, 0, 0.5, ends="[)")
        require_number("p", p, 0, 4)
        require_number("c", c, 0, ends="()")
        super().__init__(denoiser, anneal=anneal)
        if alpha is not None and "alpha" in self.anneal:
            raise InputError(
                f"alpha is {alpha} and annealed too: give one of them, and set the other to null"
            )
        self.by_sigmoid = alpha is None and "alpha" not in self.anneal
        self.gamma, self.clamp, self.p, self.c = gamma, clamp, p, c
        self.alpha = 1.0 if alpha is None else alpha
        self.set_progress(0, 1)

    @property
    def moving(self) -> frozenset[str]:
        """α, unless it is constant."""
        return super().moving | ({"alpha"} if self.by_sigmoid else set())

    def set_progress(self, step: int, grad_steps: int) -> None:
        """Give α its value at gradient step `step`, counted from 0, of `grad_steps`."""
        super().set_progress(step, grad_steps)
        if self.by_sigmoid:
            self.alpha = alpha_at(step, grad_steps, gamma=self.gamma, clamp=self.clamp)

    def _losses(self, s: MapRows) -> tuple[Tensor, Tensor]:
        α = self.alpha
        if α == 0:
            u, du = self._u_along(s, s.v)
            y = (s.v - expand_like(s.t - s.r, du) * du).detach()
        else:
            u, y = self._u(s.x, s.t, s.r, s.cond), s.v
            jumps = s.r < s.t
            if α < 1 and bool(jumps.any()):
                y = y.clone()
                y[jumps] = self._target(s.pick(jumps), α)
        δ = u - y
        α_row = torch.where(s.r < s.t, α if α > 0 else 1.0, 1.0).to(δ.dtype)
        square = δ.square().flatten(1).mean(1)
        return α_row ** (2 * self.p - 1) * square / (square.detach() + self.c) ** self.p, δ

    def _target(self, rows: MapRows, α: float) -> Tensor:
        """What u is pulled to in rows with r < t, at 0 < α < 1."""
        x, t, r, v = rows.x, rows.t, rows.r, rows.v
        s = α * r + (1 - α) * t
        u_s = self._u_boot(jump(x, t, s, v), s, r, rows.cond)
        return α * v + (1 - α) * u_s
