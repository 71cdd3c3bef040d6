"""Shortcut models: a jump learns from two jumps of half its length, down to flow matching."""

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from tensordict import TensorDict
from torch import Tensor

from diffrl.diffusion.denoisers import Denoiser
from diffrl.diffusion.schedules.base import Schedule
from diffrl.errors import InputError
from diffrl.objectives.maps.flow_time import at_flow_time, flow_time, midpoint
from diffrl.objectives.maps.loss import MapLoss, MapRows, jump, require_straight, square_mean
from diffrl.objectives.maps.states import map_states
from diffrl.objectives.place import Place
from diffrl.objectives.registry import OBJECTIVES
from diffrl.ranges import require_int
from diffrl.shapes import expand_like

__all__ = ["ShortcutLoss", "ShortcutPairs"]

FINEST = 128  # M as published


class ShortcutPairs:
    """States on a dyadic grid of M steps: most with r = t, one in `bootstrap_every` with a jump of 1, 1/2, ... 2/M.

        f ∈ {1/M, ..., 1},  r = t                                    flow matching
        f ∈ {d, 2d, ..., 1},  f_r = f - d,  d ∈ {1, 1/2, ..., 2/M}    bootstrap; d first, each as often as another

    f is `flow_time` in units of that of the noisiest level: on `Flow` the time itself, on `EDM` 1 is σ_max/(1 + σ_max).
    The paper's time is 1 - f. The release has each d equally often in every batch; here d is drawn.

    Source: One Step Diffusion via Shortcut Models (Frans et al., 2025), §3.2, https://arxiv.org/abs/2410.12557, and
    its released code.

    Args:
        process: `Flow` or `EDM`.
        finest: M, a power of 2, in [2, 2^20].
        bootstrap_every: of so many rows one bootstraps, ≥ 1.

    Raises:
        ValueError: another process, or a number outside its range.
    """

    def __init__(self, process: Schedule, *, finest: int = FINEST, bootstrap_every: int = 8) -> None:
        require_straight(process)
        self.finest, self.bootstrap_every = (
            require_finest(finest),
            require_int("bootstrap_every", bootstrap_every),
        )
        self.process = process

    def __call__(self, x0: Tensor, *, cond: Tensor | None = None, generator: torch.Generator) -> TensorDict:
        """States of data x0 [B, *E]; drawn in the order which rows bootstrap, d, t, noise."""
        B, M = len(x0), self.finest

        def draw(most: Tensor) -> Tensor:
            """Whole numbers in [0, most)."""
            u = torch.rand(most.shape, generator=generator, dtype=torch.float64, device=x0.device)
            return (u * most).floor()

        one = torch.ones(B, dtype=torch.float64, device=x0.device)
        first = draw(self.bootstrap_every * one[:1])  # counted from there, B/bootstrap_every rows bootstrap
        bootstraps = (torch.arange(B, device=x0.device) + first) % self.bootstrap_every == 0
        n = torch.where(bootstraps, 2 ** draw((M.bit_length() - 1) * one), M)  # 1/d
        k = 1 + draw(n)
        f_max = flow_time(self.process, self.process.time_grid(1)[0].double().to(x0.device))
        t = at_flow_time(self.process, f_max * k / n)
        r = torch.where(bootstraps, at_flow_time(self.process, f_max * (k - 1) / n), t)
        return map_states(self.process, x0, t.to(x0.dtype), r.to(x0.dtype), cond=cond, generator=generator)


@OBJECTIVES.register(
    "shortcut",
    also=ShortcutPairs,
    label="Shortcut model",
    place=Place("map", "pairs", "shared", "one_step", "target", "own"),
)
class ShortcutLoss(MapLoss):
    """Shortcut model: the average velocity of a jump is that of two jumps of half its length.

        L = ‖u(x, t, r) - y‖²/dim(E),    y = v where r = t, else
        y = sg[(t-m) u⁻(x, t, m) + (m-r) u⁻(x_m, m, r)]/(t-r),    x_m = x - (t-m) u⁻(x, t, m)

    m is halfway from t to r in `Flow`'s time, so that y = ½(u⁻ + u⁻) there. Halves that are as short as the grid's
    finest step, 1/M, are asked for as u⁻(x, t, t) and u⁻(x_m, m, m): two Euler steps. At the exact map the gradient is
    0 row by row, but for those rows, which have an error of order 1/M. In the release the network is told d, not r, and
    flow matching goes by d = 1/M; here it is r = t, where a denoiser is asked. The release clips x_m and y to [-4, 4];
    that is left out.

    Source: One Step Diffusion via Shortcut Models (Frans et al., 2025), eqs. 4-5, https://arxiv.org/abs/2410.12557, and
    its released code, whose time runs from noise at 0 to data at 1: velocities have the other sign.

    Args:
        denoiser: D of two times, on `Flow` or `EDM`; trained in place.
        bootstrap: what u⁻ comes from: "target", a network that follows with decay 0.999 unless `Target` says, or "own".
        finest: M, as in `ShortcutPairs`.
        anneal: as in `ValueLoss`; nothing can be annealed.

    Raises:
        ValueError: an argument outside its range, another process, a denoiser without a second time.
    """

    target_decay = 0.999  # as published

    def __init__(
        self,
        denoiser: Denoiser,
        *,
        bootstrap: Literal["own", "target"] = "target",
        finest: int = FINEST,
        anneal: Mapping[str, Sequence[float]] | None = None,
    ) -> None:
        super().__init__(denoiser, bootstrap=bootstrap, anneal=anneal)
        self.finest = require_finest(finest)

    def _losses(self, s: MapRows) -> tuple[Tensor, Tensor]:
        jumps = s.r < s.t
        y = s.v.clone()
        if bool(jumps.any()):
            y[jumps] = self._two_halves(s.pick(jumps))
        δ = self._u(s.x, s.t, s.r, s.cond) - y
        return square_mean(δ), δ

    def _two_halves(self, s: MapRows) -> Tensor:
        """The average velocity of two jumps of half the length each."""
        process = self.denoiser.process
        f_max = flow_time(process, process.time_grid(1)[0].to(s.t))
        finest = flow_time(process, s.t) - flow_time(process, s.r) < 3 * f_max / self.finest  # d is 2/M
        m = midpoint(process, s.t, s.r)
        u_1 = self._u_boot(s.x, s.t, torch.where(finest, s.t, m), s.cond)
        x_m = jump(s.x, s.t, m, u_1)
        u_2 = self._u_boot(x_m, m, torch.where(finest, m, s.r), s.cond)
        return two_jumps(s.t, m, s.r, u_1, u_2)


def two_jumps(t: Tensor, m: Tensor, r: Tensor, u_1: Tensor, u_2: Tensor) -> Tensor:
    """((t-m) u_1 + (m-r) u_2)/(t-r): average velocity of a jump from t to m and one from m to r; times [N]."""
    a, b, c = (expand_like(gap, u_1) for gap in (t - m, m - r, t - r))
    return (a * u_1 + b * u_2) / c


def require_finest(finest: int) -> int:
    """Check M.

    Raises:
        ValueError: it is no power of 2 in [2, 2^20].
    """
    require_int("finest", finest, 2, 2**20)
    if finest & (finest - 1):
        raise InputError(f"finest is {finest}: give a power of 2, such as {FINEST}, since steps are halved")
    return finest
