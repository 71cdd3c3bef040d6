"""TD(λ) for flow maps: along a chain, the jump to a second time r learns from jumps of later states, and from x_r."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.utils import NestedKey
from torch import Tensor

from diffrl import keys
from diffrl.diffusion.denoisers import Denoiser
from diffrl.diffusion.schedules.base import Schedule
from diffrl.diffusion.trajectories import ChainSampler
from diffrl.errors import InputError
from diffrl.objectives.annealing import Ranges, written
from diffrl.objectives.maps.loss import TwoTimeLoss, jump, require_straight
from diffrl.objectives.place import Place
from diffrl.objectives.registry import OBJECTIVES
from diffrl.objectives.stand_ins import OverChains
from diffrl.ranges import require_number
from diffrl.rl.returns import lambda_returns
from diffrl.shapes import event_mean, expand_like

__all__ = ["MAP_WEIGHTS", "MapChains", "TDMapLoss"]

MAP_WEIGHTS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "edm": lambda denoiser, t: t**2 / (denoiser.scalings(t).c_out ** 2).clamp(min=1e-8),
    "u": lambda denoiser, t: torch.ones_like(t),
}
"""w on ‖δ‖², a difference of average velocities. "edm" is 1/c_out² on that of clean estimates, t δ, as in `WEIGHTS`."""


class MapChains(OverChains):
    """Chains that each have a second time r, one of the times that the chain reaches.

        r_i = t_m for i < m, m uniform in {1, …, K};    r_i = t_i for all i in a share 1 - different of the chains

    States at and past t_m are marked as not `valid`: no jump leads from them to r. So all pairs i < m are equally
    frequent, clean ends r = 0 (m = K) among them, and so are all levels at r = t.

    Args:
        process: noise schedule, `Flow` or `EDM`; that of the sampler's chain.
        sampler: draws the chains, or windows of K steps, of any coupling.
        different: share of chains with r < t, in [0, 1]. The others are flow matching: no jump needs D(x, t, t), but
            without them the network is no denoiser, whose value error is reported.

    Raises:
        ValueError: another process, or a number outside its range.
    """

    def __init__(self, process: Schedule, *, sampler: ChainSampler, different: float = 0.75) -> None:
        require_straight(process)
        self.different = require_number("different", different, 0, 1)
        super().__init__(sampler)

    def __call__(self, x0: Tensor, *, cond: Tensor | None = None, generator: torch.Generator) -> TensorDict:
        """Chains [B, K] of data x0 [B, *E]; drawn in the order chains, m, which have r < t."""
        chain = self.sampler(x0, cond=cond, generator=generator)
        B, K = chain.batch_size
        m = 1 + torch.randint(K, (B, 1, 1), generator=generator, device=x0.device)
        differs = torch.rand(B, 1, 1, generator=generator, device=x0.device) < self.different
        before = torch.arange(K, device=x0.device).view(1, K, 1) < m
        t, t_m = chain[keys.T], chain[keys.NEXT, keys.T].gather(1, m - 1)
        chain[keys.R] = torch.where(differs & before, t_m, t)
        chain[keys.VALID] = before | ~differs
        return chain


def _label(options: Mapping[str, Any]) -> str:
    options = {**options, **(options.get("anneal") or {})}
    return f"TD map(λ={written(options['lmbda'])})"


@OBJECTIVES.register(
    "td_map",
    also=MapChains,
    label=_label,
    place=Place(
        learns="map",
        states="chains",
        coupling="any",
        look="one_step",
        bootstrap="target",
        next_state="forward",
    ),
)
class TDMapLoss(TwoTimeLoss):
    """TD(λ) for maps: X_{t→r} of a state x_i learns from the maps of later states of its chain, and from x_m at r.

        G_i = (1-λ) Σ_{n=1}^{m-i-1} λ^{n-1} X⁻_{t_{i+n}→r}(x_{i+n}) + λ^{m-i-1} x_m,    r = t_m < t_i
        δ_i = u(x_i, t_i, r) - (x_i - G_i)/(t_i - r),    at r = t_i instead u(x_i, t_i, t_i) - v
        loss = mean_i w_i ‖δ_i‖²/dim(E),    X_{t→r}(x) = x - (t-r) u(x, t, r)

    The mean is over all states; those that are not `valid` count 0. δ is (X - G)/(r - t): in units of u jumps of any
    length count alike, as in the other losses of maps, and t δ is an error of D. What is learnt depends on the coupling
    η of the chain:

    | chain | λ = 1 | λ = 0 |
    |---|---|---|
    | η = 1 | E[x_r given x_t] | the same |
    | η = 0 | E[x_r given x_t] | consistency training of the whole map: the ODE's, as the chain gets finer |

    E[x_r given x_t] = κ x + A E[x0 given x], with A and κ of `posterior` from t to r at that η: the mean of one step of
    DDIM(η), linear in the one-time denoiser, and no map of an ODE. Between the ends a fine chain with λ < 1 leads to
    the mean of a diffusion: of N(0, 1) data on `EDM` X_{t→r}(x) = ((1+r²)/(1+t²))^((1+η²)/2) x, of which the ODE's has
    the power ½. At r = 0 it is `ValueLoss` on the 'clean' value, with the same weight "edm".

    Source: ours; λ-returns as in Reinforcement Learning: An Introduction, 2nd ed. (Sutton & Barto, 2018), §12.1,
    http://incompleteideas.net/book/the-book-2nd.html; λ = 0, η = 0 as consistency training (Song et al., 2023),
    https://arxiv.org/abs/2303.01469, with a second time.

    Args:
        denoiser: D of two times, on `Flow` or `EDM`; trained in place.
        lmbda: λ ∈ [0, 1].
        bootstrap: what X⁻ comes from: "target", a target network, at a second evaluation of states that are
            bootstrapped from, or "own", the network's own predictions, gradient stopped, at none.
        map_weight: w, "edm", t²/max(c_out², 1e-8), with which δ is in units of the network's output: u itself on `Flow`
            with prediction_type "velocity"; or "u", 1, which is (c_out/t)² of that: on `EDM` little at high noise.
        anneal: options that change along the training, as in `ValueLoss`: lmbda.

    Raises:
        ValueError: an argument outside its range, another process, a denoiser without a second time; an r that is not
            reached by steps that follow each other.
    """

    fed_with = "diffrl.objectives.MapChains"
    annealable: ClassVar[Ranges] = {"lmbda": (0, 1)}

    def __init__(
        self,
        denoiser: Denoiser,
        *,
        lmbda: float = 0.0,
        bootstrap: Literal["own", "target"] = "target",
        map_weight: str = "edm",
        anneal: Mapping[str, Sequence[float]] | None = None,
    ) -> None:
        if map_weight not in MAP_WEIGHTS:
            raise InputError(f"map_weight is {map_weight!r}: give one of {', '.join(MAP_WEIGHTS)}")
        require_number("lmbda", lmbda, 0, 1)
        super().__init__(denoiser, bootstrap=bootstrap, anneal=anneal)
        self.lmbda, self.map_weight = lmbda, map_weight
        self.set_progress(0, 1)

    @property
    def in_keys(self) -> list[NestedKey]:
        """Entries of the chains that the loss reads; cond, importance and valid are read where present."""
        return [keys.X_T, keys.T, keys.R, keys.X0, (keys.NEXT, keys.X_T), (keys.NEXT, keys.T)]

    def _of_states(self, states: TensorDictBase) -> tuple[Tensor, Tensor]:
        x, t, r, x0 = (states[key] for key in (keys.X_T, keys.T, keys.R, keys.X0))
        jumps, inner = (mask.squeeze(-1) for mask in _jumps(states))
        valid = states.get(keys.VALID, None)
        used = torch.ones_like(jumps) if valid is None else jumps | valid.squeeze(-1)
        u = self._at(used, states, self._u)
        G = self._returns(states, inner, u.detach())
        gap = expand_like(torch.where(r < t, t - r, t), x)
        y = (x - torch.where(expand_like(r < t, x), G, x0)) / gap
        δ = torch.where(expand_like(used, x), u - y, 0)
        w = MAP_WEIGHTS[self.map_weight](self.denoiser, t).to(x.dtype).squeeze(-1)
        return w * event_mean(δ.square(), 2), δ[used]

    def _returns(self, states: TensorDictBase, inner: Tensor, u: Tensor) -> Tensor:
        """G [B, K, *E] of states from which a jump leads; `inner` [B, K] are those with another one to follow."""
        x, t, r, V = states[keys.X_T], states[keys.T], states[keys.R], states[keys.NEXT, keys.X_T]
        if self.lmbda < 1:
            if self.bootstrap == "target":
                u = self._at(inner.roll(1, 1), states, self._u_boot)
            V = torch.where(expand_like(inner, x), jump(x, t, r, u).roll(-1, 1), V)
        ends = ~inner.unsqueeze(-1)
        return lambda_returns(None, V, torch.zeros_like(ends), ends, lmbda=self.lmbda)

    def _at(self, where: Tensor, states: TensorDictBase, velocity: Callable[..., Tensor]) -> Tensor:
        """Average velocities [B, K, *E] of those states of a mask [B, K], 0 elsewhere."""
        x, t, r, cond = (states.get(key, None) for key in (keys.X_T, keys.T, keys.R, keys.COND))
        u = torch.zeros_like(x)
        if bool(where.any()):
            given = (x[where], t[where].squeeze(-1), r[where].squeeze(-1))
            u[where] = velocity(*given, None if cond is None else cond[where])
        return u


def _jumps(states: TensorDictBase) -> tuple[Tensor, Tensor]:
    """From which states of chains a jump leads to r, and from which of those the next step does not end there yet.

    Returns:
        Masks [B, K, 1].

    Raises:
        ValueError: r is no level that such a chain reaches.
    """
    t, r, t_next = states[keys.T], states[keys.R], states[keys.NEXT, keys.T]
    jumps = r < t
    inner = jumps & (t_next > r)
    follows = torch.zeros_like(inner)
    follows[:, :-1] = (t_next[:, :-1] == t[:, 1:]) & (r[:, :-1] == r[:, 1:])
    if not bool((~jumps | (t_next == r) | (inner & follows)).all()) or bool((r > t).any()):
        raise InputError(
            "r is no level that the chain reaches from t by steps that follow each other: draw the chains by "
            f"{TDMapLoss.fed_with}, or give single steps [N, 1] with r the time of the state reached, or t itself"
        )
    return jumps, inner
