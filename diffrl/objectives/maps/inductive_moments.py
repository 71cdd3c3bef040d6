"""Inductive moment matching: jumps from two times to one are compared as distributions, by their kernel distance."""

from collections.abc import Mapping, Sequence

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.utils import NestedKey
from torch import Tensor

from diffrl import keys
from diffrl.diffusion.denoisers import Denoiser
from diffrl.diffusion.schedules.base import Schedule
from diffrl.errors import InputError
from diffrl.objectives.denoiser_loss import rows
from diffrl.objectives.maps.loss import MapLoss, MapRows, jump, map_rows, require_straight
from diffrl.objectives.maps.states import map_states
from diffrl.objectives.place import Place
from diffrl.objectives.registry import OBJECTIVES
from diffrl.ranges import require_int, require_number
from diffrl.shapes import expand_like

__all__ = ["InductiveMomentLoss", "MomentGroups"]

NEAR = 1e-8  # squares of distances do not count as less
GAP = 1e-6  # added to t - r in the kernel's width


class MomentGroups:
    """Groups of states that share three times, t > s ≥ r, for `InductiveMomentLoss`.

        t' ~ U(least, most),    r' ~ U(least, t'),    η_s = max(η_t - (η_max - η_min)/2^halvings, η_r)
        η = t'/(1-t') = σ/(α σd)

    t' is the time of a straight path between data and noise of the data's own standard deviation σd, in which the paper
    works; σd is that of the denoiser. Each state has its datum and noise, and the one at s would have the same. A group
    is M rows that follow each other; the paper's share their label, too, which a batch here does not arrange.

    Source: Inductive Moment Matching (Zhou et al., 2025), §4, https://arxiv.org/abs/2503.07565; numbers as in
    https://github.com/EDAPINENUT/ExplicitShortCut.

    Args:
        process: `Flow` or `EDM`.
        denoiser: what is trained, for σd.
        group_size: M, ≥ 1; a batch is a whole number of groups.
        least: lower end of t' and r', in [0, 1).
        most: upper end of t', in (least, 1).
        halvings: of the range of η in the gap from t to s, in [0, 40].

    Raises:
        ValueError: another process, or a number outside its range.
    """

    def __init__(
        self,
        process: Schedule,
        denoiser: Denoiser,
        *,
        group_size: int = 4,
        least: float = 0.0,
        most: float = 0.994,
        halvings: int = 12,
    ) -> None:
        require_straight(process)
        self.group_size = require_int("group_size", group_size)
        require_number("least", least, 0, 1, "[)")
        require_number("most", most, least, 1, "()")
        require_int("halvings", halvings, 0, 40)
        self.process, self.sigma_data = process, denoiser.sigma_data
        self.least, self.most = least, most
        self.gap: float = (most / (1 - most) - least / (1 - least)) / 2**halvings

    def __call__(self, x0: Tensor, *, cond: Tensor | None = None, generator: torch.Generator) -> TensorDict:
        """States of data x0 [B, *E], B a multiple of M; drawn in the order t', r', noise.

        Raises:
            ValueError: B is no multiple of M.
        """
        M, B = self.group_size, len(x0)
        if B % M:
            raise InputError(
                f"the batch has {B} data, no whole number of groups: give a multiple of group_size={M}"
            )
        u = torch.rand(2, B // M, generator=generator, dtype=torch.float64, device=x0.device)
        t = self.least + (self.most - self.least) * (1 - u[0])  # in (least, most]
        r = self.least + (t - self.least) * u[1]
        η_t, η_r = t / (1 - t), r / (1 - r)
        η_s = torch.maximum(η_t - self.gap, η_r)
        times = (self.process.t_from_log_snr(-2 * (η * self.sigma_data).log()) for η in (η_t, η_s, η_r))
        t, s, r = (time.to(x0.dtype).repeat_interleave(M) for time in times)
        states = map_states(self.process, x0, t, r, cond=cond, generator=generator)
        states[keys.NEXT, keys.T] = s.view(-1, 1, 1)
        states[keys.GROUP] = torch.arange(B // M, device=x0.device).repeat_interleave(M).view(-1, 1, 1)
        return states


@OBJECTIVES.register(
    "inductive_moments",
    also=MomentGroups,
    label="Inductive moment matching",
    place=Place("map", "pairs", "shared", "one_step", "own", "forward", note="compares laws, by a kernel"),
)
class InductiveMomentLoss(MapLoss):
    """Inductive moment matching (IMM): TD(0) of distributions, on the ends of jumps from t and from s to r.

        L = ω MMD²,    MMD² = 1/M² Σ_ij [k(X_i, X_j) + k(Y_i, Y_j) - 2 k(X_i, Y_j)]    over a group
        X = X_{t→r}(x),    Y = sg[X_{s→r}(x_s)],    x_s = x - (t-s) v,    Y = x_s where s = r
        k(X, Y) = exp(-max(‖X - Y‖, 1e-4)/(dim(E) σd (t-r)))
        ω = (1-t)^a/((1-t)² + t²)/(t(1-t)) sigmoid(b - λ_t),    λ_t = 2 ln((1-t)/t)

    Times are t' of `MomentGroups` here, and states those of that path. With one row a group it is a consistency loss in
    another metric. Where r = t it is 0: it knows no flow matching, and D(x, t, t) is trained by r near t alone. The
    gradient is not 0 on average at the exact map: of the pairs (i, j) those with i ≠ j cancel, those with i = j leave

        -2ω/M E[∂k(X, Y)/∂X · ∂X/∂θ],    X and Y of one datum and one noise

    Source: Inductive Moment Matching (Zhou et al., 2025), §4, https://arxiv.org/abs/2503.07565; a, b and k as in
    https://github.com/EDAPINENUT/ExplicitShortCut.

    Args:
        denoiser: D of two times, on `Flow` or `EDM`, with its sigma_data; trained in place.
        a: power of 1 - t' in ω, in [0, 10].
        b: shift in ω's sigmoid, in [-50, 50].
        anneal: as in `ValueLoss`; nothing can be annealed.

    Raises:
        ValueError: an argument outside its range, another process, a denoiser without a second time, or groups of
            different sizes in a batch.
    """

    fed_with = "diffrl.objectives.MomentGroups"

    def __init__(
        self,
        denoiser: Denoiser,
        *,
        a: float = 2.0,
        b: float = 4.0,
        anneal: Mapping[str, Sequence[float]] | None = None,
    ) -> None:
        require_number("a", a, 0, 10)
        require_number("b", b, -50, 50)
        super().__init__(denoiser, anneal=anneal)
        self.a, self.b = a, b

    @property
    def in_keys(self) -> list[NestedKey]:
        """Those of `MapLoss`, s and the group."""
        return [*super().in_keys, (keys.NEXT, keys.T), keys.GROUP]

    def target(self, states: TensorDictBase) -> Tensor:
        """The D of which Y is the map; as a group is compared as a law, no row is pulled to its own Y alone."""
        s = map_rows(rows(states))
        with torch.no_grad():
            y = self._u(s.x, s.t, s.r, s.cond)
            y = y + self._losses(s)[1] / expand_like(s.t - s.r, y)
        return s.x - expand_like(s.t, y) * y

    def _losses(self, s: MapRows) -> tuple[Tensor, Tensor]:
        assert s.s is not None and s.group is not None  # among in_keys
        X = jump(s.x, s.t, s.r, self._u(s.x, s.t, s.r, s.cond))
        Y = jump(s.x, s.t, s.s, s.v)
        far = s.s > s.r
        if bool(far.any()):
            at = s.pick(far)
            assert at.s is not None
            Y[far] = jump(Y[far], at.s, at.r, self._u_boot(Y[far], at.s, at.r, at.cond))
        order, M = _groups(s.group)
        t, r = (self._own_time(time) for time in (s.t, s.r))
        scale = (1 - r) / self.denoiser.process.alpha(s.r) / ((t - r) * self.denoiser.sigma_data + GAP)
        X_g, Y_g = (z[order].unflatten(0, (-1, M)).flatten(2) for z in (X, Y))
        distance = mmd_square(X_g, Y_g, scale[order[::M]])
        ω = (
            (1 - t) ** self.a
            / ((1 - t) ** 2 + t**2)
            / (t * (1 - t))
            * torch.sigmoid(self.b - 2 * ((1 - t) / t).log())
        )
        loss = torch.empty_like(ω)
        loss[order] = distance.repeat_interleave(M)
        return ω * loss, X - Y

    def _own_time(self, t: Tensor) -> Tensor:
        """The time t' of `MomentGroups`, at which t'/(1-t') = σ/(α σd)."""
        process, σd = self.denoiser.process, self.denoiser.sigma_data
        alpha, sigma = process.alpha(t) * σd, process.sigma(t)
        return sigma / (alpha + sigma)


def mmd_square(X: Tensor, Y: Tensor, width: Tensor) -> Tensor:
    """MMD² of groups, with all pairs, k(x, y) = exp(-width max(‖x - y‖, 1e-4)/D): X, Y [G, M, D], width [G] → [G]."""

    def k(x: Tensor, y: Tensor) -> Tensor:
        square = (x.unsqueeze(2) - y.unsqueeze(1)).square().sum(-1)
        return (-width.view(-1, 1, 1) * square.clamp(min=NEAR).sqrt() / x.shape[-1]).exp()

    return (k(X, X) + k(Y, Y) - 2 * k(X, Y)).mean((1, 2))


def _groups(group: Tensor) -> tuple[Tensor, int]:
    """The order that puts rows of one group next to each other, and the size of groups.

    Raises:
        ValueError: sizes differ.
    """
    sizes = torch.unique(group, return_counts=True)[1]
    if not bool((sizes == sizes[0]).all()):
        raise InputError("groups of different sizes in a batch: give whole groups of one size")
    return group.argsort(stable=True), int(sizes[0])
