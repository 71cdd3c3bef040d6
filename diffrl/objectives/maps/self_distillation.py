"""Flow maps by self-distillation: flow matching where r = t, and one of three conditions of a map where r < t."""

from abc import abstractmethod
from typing import Literal

import torch
from tensordict import TensorDict
from tensordict.utils import NestedKey
from torch import Tensor

from diffrl import keys
from diffrl.diffusion.schedules.base import Schedule
from diffrl.errors import InputError
from diffrl.objectives.maps.flow_time import at_flow_time, flow_time
from diffrl.objectives.maps.loss import MapLoss, MapRows, jump, square_mean
from diffrl.objectives.maps.shortcut import two_jumps
from diffrl.objectives.maps.states import UniformPairs
from diffrl.objectives.place import Place
from diffrl.objectives.registry import OBJECTIVES
from diffrl.shapes import expand_like

__all__ = [
    "EulerianMapLoss",
    "LagrangianMapLoss",
    "ProgressiveMapLoss",
    "ProgressivePairs",
    "SelfDistillationLoss",
    "SelfDistillationPairs",
]


class SelfDistillationPairs(UniformPairs):
    """`UniformPairs` with the settings of self-distillation: r < t in a quarter of the rows.

    Source: How to build a consistency model: Learning flow maps via self-distillation (Boffi et al., 2025),
    https://arxiv.org/abs/2505.18825, and its released code.

    Args:
        process: `Flow` or `EDM`.
        different: share of rows with r < t, in [0, 1].
    """

    def __init__(self, process: Schedule, *, different: float = 0.25) -> None:
        super().__init__(process, different=different)


class ProgressivePairs(SelfDistillationPairs):
    """`SelfDistillationPairs` with a time m between r and t, where progressive self-distillation cuts the jump in two.

        f_m = f_t - γ (f_t - f_r),    γ ~ U(0, 1) or ½,    f `flow_time`

    Source: as `SelfDistillationPairs`; its PSD-U and PSD-M.

    Args:
        process: `Flow` or `EDM`.
        different: share of rows with r < t, in [0, 1].
        cut: "uniform" or "midpoint", for γ.

    Raises:
        ValueError: another process, another cut, or a number outside its range.
    """

    def __init__(
        self,
        process: Schedule,
        *,
        different: float = 0.25,
        cut: Literal["uniform", "midpoint"] = "uniform",
    ) -> None:
        super().__init__(process, different=different)
        if cut not in ("uniform", "midpoint"):
            raise InputError(f"cut is {cut!r}: give 'uniform' or 'midpoint'")
        self.cut = cut

    def __call__(self, x0: Tensor, *, cond: Tensor | None = None, generator: torch.Generator) -> TensorDict:
        """States of data x0 [B, *E]; γ is drawn last."""
        states = super().__call__(x0, cond=cond, generator=generator)
        t, r = states[keys.T], states[keys.R]
        if self.cut == "uniform":
            γ = torch.rand(t.shape, generator=generator, dtype=t.dtype, device=t.device)
        else:
            γ = torch.full_like(t, 0.5)
        f_t, f_r = flow_time(self.process, t), flow_time(self.process, r)
        m = at_flow_time(self.process, f_t - γ * (f_t - f_r))
        states[keys.NEXT, keys.T] = torch.maximum(torch.minimum(m, t), r)  # rounding must not lead out
        return states


class SelfDistillationLoss(MapLoss):
    """What the three have in common.

        L = ‖δ‖²/dim(E),    δ = u(x, t, t) - v where r = t, else that of the condition

    In the release norms are sums, and a learnt weight for each (t, r) goes with them for images; neither is here. At
    the exact map δ is 0 in every row with r < t, and 0 on average where r = t.

    Source: How to build a consistency model: Learning flow maps via self-distillation (Boffi et al., 2025),
    https://arxiv.org/abs/2505.18825, and its released code; its s and t are t and r here, its v_{s,t} is u with the
    other sign.

    Args:
        denoiser: D of two times, on `Flow` or `EDM`; trained in place.
        bootstrap: what u⁻ comes from: "own", the network itself without gradient, or "target", a target network.
        anneal: as in `ValueLoss`; nothing can be annealed.

    Raises:
        ValueError: an argument outside its range, another process, a denoiser without a second time.
    """

    def _losses(self, s: MapRows) -> tuple[Tensor, Tensor]:
        jumps, δ = s.r < s.t, torch.zeros_like(s.x)
        if bool((~jumps).any()):
            here = s.pick(~jumps)
            δ[~jumps] = self._u(here.x, here.t, here.t, here.cond) - here.v
        if bool(jumps.any()):
            δ[jumps] = self._off_diagonal(s.pick(jumps))
        return square_mean(δ), δ

    @abstractmethod
    def _off_diagonal(self, s: MapRows) -> Tensor:
        """δ of rows with r < t."""


@OBJECTIVES.register(
    "lagrangian_map",
    also=SelfDistillationPairs,
    label="Lagrangian self-distillation",
    place=Place(
        "map", "pairs", "shared", "instant", "own", "own", note="the derivative at the end of the jump"
    ),
)
class LagrangianMapLoss(SelfDistillationLoss):
    """Lagrangian self-distillation (LSD): the end of a jump moves with r as the velocity at that end says.

        δ = ∂_r X_{t→r}(x) - sg[u⁻(X, r, r)],    ∂_r X_{t→r} = u - (t-r) ∂_r u,    where r < t

    It bootstraps on the velocity of flow matching, not on shorter jumps, and needs no derivative in x.

    Args:
        denoiser: D of two times, on `Flow` or `EDM`; trained in place.
        bootstrap: what u⁻ comes from, "own" or "target".
        anneal: as in `ValueLoss`; nothing can be annealed.

    Raises:
        ValueError: as in `SelfDistillationLoss`; in a batch, a row with r = 0, where no denoiser tells a velocity.
    """

    def _off_diagonal(self, s: MapRows) -> Tensor:
        if bool((s.r == 0).any()):
            raise InputError("r is 0 in some row: LSD asks for the velocity there, so draw r above 0")
        u, u_r = self._u_along(s, torch.zeros_like(s.x), dt=0.0, dr=1.0)
        X = jump(s.x, s.t, s.r, u.detach())
        dX = u - expand_like(s.t - s.r, u) * u_r
        return dX - self._u_boot(X, s.r, s.r, s.cond)


@OBJECTIVES.register(
    "progressive_map",
    also=ProgressivePairs,
    label="Progressive self-distillation",
    place=Place("map", "pairs", "shared", "one_step", "own", "own"),
)
class ProgressiveMapLoss(SelfDistillationLoss):
    """Progressive self-distillation (PSD): a jump is two jumps, with a stop at m.

        δ = u(x, t, r) - sg[(t-m) u⁻(x, t, m) + (m-r) u⁻(x_m, m, r)]/(t-r),    where r < t
        x_m = x - (t-m) u⁻(x, t, m)

    This is X_{t→r} - X_{m→r} ∘ X_{t→m}, divided by t - r as in the release. With m at the midpoint it is a shortcut
    model's, of any jump.

    Args:
        denoiser: D of two times, on `Flow` or `EDM`; trained in place.
        bootstrap: what u⁻ comes from, "own" or "target".
        anneal: as in `ValueLoss`; nothing can be annealed.

    Raises:
        ValueError: as in `SelfDistillationLoss`.
    """

    fed_with = "diffrl.objectives.ProgressivePairs"

    @property
    def in_keys(self) -> list[NestedKey]:
        """Those of `MapLoss`, and m."""
        return [*super().in_keys, (keys.NEXT, keys.T)]

    def _off_diagonal(self, s: MapRows) -> Tensor:
        m = s.s
        assert m is not None  # one of in_keys
        u_1 = self._u_boot(s.x, s.t, m, s.cond)
        u_2 = self._u_boot(jump(s.x, s.t, m, u_1), m, s.r, s.cond)
        return self._u(s.x, s.t, s.r, s.cond) - two_jumps(s.t, m, s.r, u_1, u_2)


@OBJECTIVES.register(
    "eulerian_map",
    also=SelfDistillationPairs,
    label="Eulerian self-distillation",
    place=Place(
        "map", "states", "shared", "instant", "own", "own", note="the derivative at the start of the jump"
    ),
)
class EulerianMapLoss(SelfDistillationLoss):
    """Eulerian self-distillation (ESD): where a jump ends does not change as its start moves along the ODE.

        δ = -∂_t X_{t→r}(x) - sg[∇X_{t→r}(x)·u⁻(x, t, t)],    where r < t
        -∂_t X = u + (t-r) ∂_t u,    ∇X·w = w - (t-r) w·∂_x u⁻

    u⁻ in w·∂_x u⁻ is u⁻(x, t, r), and w = u⁻(x, t, t). The gradient goes through ∂_t X alone; with one through u alone,
    and with the data's v for the first w, it would be improved MeanFlow. The paper reports it as unstable.

    Args:
        denoiser: D of two times, on `Flow` or `EDM`; trained in place.
        bootstrap: what u⁻ comes from, "own" or "target".
        anneal: as in `ValueLoss`; nothing can be annealed.

    Raises:
        ValueError: as in `SelfDistillationLoss`.
    """

    def _off_diagonal(self, s: MapRows) -> Tensor:
        w = self._u_boot(s.x, s.t, s.t, s.cond)
        _, u_w = self._u_boot_along(s, w, dt=0.0)
        u, u_t = self._u_along(s, torch.zeros_like(s.x), dt=1.0)
        h = expand_like(s.t - s.r, u)
        return u + h * u_t - (w - h * u_w)
