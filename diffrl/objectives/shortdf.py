"""ShortDF: denoising whose error in one step may not exceed that of two, as a shortest path may not be improved."""

from collections.abc import Callable, Mapping

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import dispatch
from tensordict.utils import NestedKey
from torch import Tensor

from diffrl import keys
from diffrl.diffusion.denoisers import Denoiser
from diffrl.diffusion.posterior import marginal
from diffrl.diffusion.schedules.base import Schedule
from diffrl.objectives.chain_value import value_module
from diffrl.objectives.denoiser_loss import DenoiserLoss, rows
from diffrl.objectives.one_step import one_step_chains
from diffrl.objectives.place import Place
from diffrl.objectives.registry import OBJECTIVES
from diffrl.objectives.weights import MAX_COEF, ChainTerms, weight_function
from diffrl.ranges import MAX_STEPS, require_int, require_number
from diffrl.shapes import event_mean, expand_like, require_data, require_finite

__all__ = ["ShortDFLoss", "sample_shortdf_pairs"]


def sample_shortdf_pairs(
    process: Schedule,
    x0: Tensor,
    *,
    num_steps: int = 1000,
    cond: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> TensorDict:
    """One noisy state of each datum at a uniform level, and the time of a less noisy level, the clean one included.

        i ~ U{0, …, N-1},    j ~ U{i+1, …, N},    x_i = α_i x0 + σ_i ε,    x_j = α_j x0 + σ_j ε

    Args:
        process: noise schedule.
        x0: clean data, floating dtype, shape [B, *E].
        num_steps: N ≥ 1.
        cond: condition of each datum, shape [B, ...].
        generator: source of randomness; drawn in the order i, j, ε.

    Returns:
        TensorDict of batch size [B, 1]: chains of one step from x_i to x_j, cut there; A = 1 and κ = 0.

    Raises:
        TypeError: x0 is no tensor, or holds integers.
        ValueError: num_steps < 1, or more than a discrete process has.
    """
    require_data(x0, cond)
    require_finite("x0", x0)
    N = require_int("num_steps", num_steps, most=MAX_STEPS)
    options = {"generator": generator, "dtype": torch.float64, "device": x0.device}
    i = (torch.rand(len(x0), **options) * N).floor()  # type: ignore[arg-type]
    j = i + 1 + (torch.rand(len(x0), **options) * (N - i)).floor()  # type: ignore[arg-type]
    noise = torch.randn(x0.shape, generator=generator, dtype=x0.dtype, device=x0.device)

    def state(index: Tensor) -> dict[str, Tensor]:
        t = process.time(index, N).to(x0.dtype)
        x = marginal(process, x0, t, noise).unsqueeze(1)
        t = t.view(-1, 1, 1)
        return {keys.X_T: x, keys.T: t, keys.A: torch.ones_like(t), keys.KAPPA: torch.zeros_like(t)}

    reward = torch.zeros_like(x0).unsqueeze(1)
    return one_step_chains(x0.unsqueeze(1), state(i), state(j), reward=reward, terminated=False, cond=cond)


@OBJECTIVES.register(
    "shortdf",
    also=sample_shortdf_pairs,
    label="ShortDF",
    place=Place(
        "denoiser",
        "pairs",
        "shared",
        "one_step",
        "target",
        "own",
        note="beside denoising; the exact denoiser is no fixed point",
    ),
)
class ShortDFLoss(DenoiserLoss):
    """Denoising, and a hinge that relaxes d(t) ≤ d(s) + edge as Bellman and Ford do; fed with `sample_shortdf_pairs`.

        L = w ‖x0 - D(x_t)‖²/dim(E) + c mean over dims of max(d - bound, 0),    d = |D(x_t) - x0|
        bound = max(d⁻_s + edge, 0) + m,    d⁻_s = |D⁻(x_s) - x0|,    edge = |D⁻(x'_s) - x0| - |D⁻(x_s) - x0|
        x_s = α_s x0 + σ_s ε̂,    x'_s = α_s D⁻(x_t) + σ_s ε̂,    ε̂ = (x_t - α_t D⁻(x_t))/σ_t

    D⁻ is a target network, with D⁻(x) = x at clean s. Published are two networks in its place, a frozen one for edge
    and ε̂ and an average one for d⁻_s. With one network the sum telescopes to bound = |D⁻(x'_s) - x0| + m: a step of
    the model may have no greater error than a DDIM step to s and a second look from there, coordinate by coordinate.
    So x_s need not be evaluated; a state costs three evaluations. D is not clipped (published: to [-1, 1]).

    The exact denoiser is no fixed point. Given x_t, D is drawn towards the estimate D' of the two steps with a force
    P(x0 lies beyond ½ (D + D')), and so towards the end of the ODE's path rather than the mean of x0. It is published
    for a trained denoiser: ``init=runs/...``.

    Source: Optimizing for the Shortest Path in Denoising Diffusion Model (Chen et al., 2025),
    https://arxiv.org/abs/2503.03265, and its released code.

    Args:
        denoiser: D, trained in place.
        weight: name in `diffrl.objectives.weights.WEIGHTS`; published is "eps".
        weight_options: numbers of that weight, e.g. ``{"gamma": 0.5}`` for "p2".
        relax_coef: c ∈ [0, 1e6].
        margin: m ∈ [0, 1e6].

    Raises:
        ValueError: an argument outside its range.
    """

    fed_with = "diffrl.objectives.sample_shortdf_pairs"
    out_keys = ["loss_value", "td_error"]
    bootstrap = "target"

    def __init__(
        self,
        denoiser: Denoiser,
        *,
        weight: str = "edm",
        weight_options: Mapping[str, float] | None = None,
        relax_coef: float = 1.0,
        margin: float = 1e-4,
    ) -> None:
        require_number("relax_coef", relax_coef, 0, MAX_COEF)
        require_number("margin", margin, 0, MAX_COEF)
        super().__init__(value_module(denoiser), target=True)
        self.relax_coef, self.margin = relax_coef, margin
        self._weight: Callable[..., Tensor] = weight_function(weight, weight_options)

    @property
    def in_keys(self) -> list[NestedKey]:
        """Entries of the pairs that the loss reads; cond is read where present."""
        return [keys.X_T, keys.T, keys.X0, (keys.NEXT, keys.T), keys.A, (keys.NEXT, keys.A)]

    @dispatch(auto_batch_size=False)
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """The loss of pairs [B, 1].

        Args:
            tensordict: what `sample_shortdf_pairs` gives.

        Returns:
            TensorDict with the scalars ``loss_value``, ``td_error`` (the root mean square of x0 - D) and ``relaxed``,
            the share of coordinates that are above their bound.

        Raises:
            KeyError: an entry is missing.
            ValueError: the batch is empty; a network that takes labels, without any.
        """
        with self._telling_what_is_missing(tensordict):
            pairs = rows(tensordict)
            x_t, t, x0, s = (pairs[key] for key in self.in_keys[:4])
        cond = pairs.get(keys.COND, None)
        self._first_look(x0, cond)
        bound = self._bound(x_t, t, x0, s, cond)
        self.network_evaluations += t.numel()
        D_x = self.value_network.module.denoise(x_t, t, cond)
        excess = ((D_x - x0).abs() - bound).clamp(min=0)
        square = event_mean((x0 - D_x).square(), 2).unsqueeze(-1)
        relax = event_mean(excess, 2).unsqueeze(-1)
        loss = self._weight(ChainTerms(pairs, self.denoiser)) * square + self.relax_coef * relax
        if not tensordict.is_locked:
            tensordict[keys.LOSS] = loss.detach().view(tensordict[keys.T].shape)
        out = {"loss_value": loss.mean(), "td_error": square.detach().mean().sqrt()}
        return TensorDict({**out, "relaxed": (excess.detach() > 0).to(x0.dtype).mean()})

    @torch.no_grad()
    def _bound(self, x_t: Tensor, t: Tensor, x0: Tensor, s: Tensor, cond: Tensor | None) -> Tensor:
        """|D⁻(x'_s) - x0| + m, of x0's shape."""
        process, target = self.denoiser.process, self.bootstrap_network.module
        alpha_t, sigma_t, alpha_s, sigma_s = (
            expand_like(c, x_t)
            for u in (t, s)
            for c in (process.alpha(u).to(x_t.dtype), process.sigma(u).to(x_t.dtype))
        )
        D_t = target.denoise(x_t, t, cond)
        x_s = alpha_s * D_t + sigma_s * (x_t - alpha_t * D_t) / sigma_t
        noisy = s != process.t_clean  # no network is asked about noise 0
        asked = expand_like(noisy, x_t)
        D_s = target.denoise(torch.where(asked, x_s, x_t), torch.where(noisy, s, t), cond)
        self.network_evaluations += 2 * t.numel()
        return (torch.where(asked, D_s, x_s) - x0).abs() + self.margin
