"""Physics-informed denoising: the clean estimate is held to an equation that the data fulfil."""

from collections.abc import Callable, Mapping
from typing import Literal

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import dispatch
from tensordict.utils import NestedKey
from torch import Tensor

from diffrl import keys
from diffrl.diffusion.denoisers import Denoiser
from diffrl.diffusion.learned_variance import learned_log_variance
from diffrl.diffusion.posterior import posterior
from diffrl.errors import InputError
from diffrl.objectives.chain_value import value_module
from diffrl.objectives.denoiser_loss import DenoiserLoss, rows
from diffrl.objectives.place import Place
from diffrl.objectives.registry import OBJECTIVES
from diffrl.objectives.weights import MAX_COEF, ChainTerms, named_function, weight_function
from diffrl.ranges import require_number
from diffrl.shapes import event_mean, expand_like

__all__ = ["RESIDUALS", "PhysicsResidualLoss"]


def sphere(x0: Tensor, radius: float = 1.0) -> Tensor:
    """‖x0‖² - r², of points on a sphere: [N, *E] → [N, 1]."""
    return x0.flatten(1).square().sum(1, keepdim=True) - radius**2


def ball(x0: Tensor, radius: float = 1.0) -> Tensor:
    """max(‖x0‖² - r², 0), of points in a ball, an inequality: [N, *E] → [N, 1]."""
    return sphere(x0, radius).clamp(min=0)


def total(x0: Tensor, total: float = 0.0) -> Tensor:
    """Σ x0 - c, of points with a given sum, a linear equation: [N, *E] → [N, 1]."""
    return x0.flatten(1).sum(1, keepdim=True) - total


RESIDUALS: dict[str, Callable[..., Tensor]] = {"sphere": sphere, "ball": ball, "total": total}
"""Name → R, a differentiable function of x0 [N, *E] and of numbers of its own → [N, M], 0 where the equation holds.

One of your own is entered here, ``RESIDUALS["mine"] = my_residual``. On a command line: ``objective.residual=sphere
'objective.residual_options={radius: 0.8}'``.
"""


@OBJECTIVES.register(
    "physics_residual",
    label="Physics residual",
    place=Place(
        "denoiser", "chains", "any", "end", "nothing", "none", note="held to an equation of the data besides"
    ),
)
class PhysicsResidualLoss(DenoiserLoss):
    """Monte Carlo, and the log-likelihood of a residual of 0 for the clean estimate.

        L = mean_i w_i A_i² ‖x0 - D(x_i)‖²/dim(E) + c mean_i ‖R(x̂_i)‖²/(2 β̃_i M)

    That is -c log N(0; R, β̃_i) but for a constant; β̃_i is the variance of x_{i+1} given x_i and x0, and of the last
    step that of `learned_log_variance`. x̂_i is D(x_i) ("mean"), or D at the end of one deterministic step from x_i to
    the least noisy level of the row ("sample"), at a second evaluation, with gradient through both.

    If R is linear and holds for the data, R(E[x0 | x_i]) = 0: with "mean" the exact denoiser has least loss. Of any
    other R it has not, R(E[x0 | x]) ≠ E[R(x0) | x] = 0, and D is pulled away from it. "sample" is meant against that,
    as x̂_i is nearly a datum where the levels end near clean data.

    Source: Physics-Informed Diffusion Models (Bastek et al., 2025), https://arxiv.org/abs/2403.14404, and its released
    code, whose circle has c = 0.1 for "mean" and 0.005 for "sample", on 100 levels.

    Args:
        denoiser: D, trained in place.
        residual: name in `RESIDUALS`.
        residual_options: numbers of that residual, e.g. ``{"radius": 0.8}`` for "sphere".
        residual_coef: c ∈ [0, 1e6].
        estimate: "mean" or "sample".
        weight: name in `diffrl.objectives.weights.WEIGHTS`; published is "p2".
        weight_options: numbers of that weight, e.g. ``{"gamma": 0.5}`` for "p2".

    Raises:
        ValueError: an argument outside its range.
    """

    fed_with = "diffrl.sample_chain(process, x0, num_steps=18)"
    out_keys = ["loss_value", "td_error"]

    def __init__(
        self,
        denoiser: Denoiser,
        *,
        residual: str = "sphere",
        residual_options: Mapping[str, float] | None = None,
        residual_coef: float = 0.1,
        estimate: Literal["mean", "sample"] = "mean",
        weight: str = "edm",
        weight_options: Mapping[str, float] | None = None,
    ) -> None:
        require_number("residual_coef", residual_coef, 0, MAX_COEF)
        if estimate not in ("mean", "sample"):
            raise InputError(f"estimate is {estimate!r}: give 'mean' or 'sample'")
        super().__init__(value_module(denoiser), target=False)
        self.residual_coef, self.estimate = residual_coef, estimate
        self._residual = named_function("residual", RESIDUALS, residual, residual_options)
        self._weight: Callable[..., Tensor] = weight_function(weight, weight_options)

    @property
    def in_keys(self) -> list[NestedKey]:
        """Entries of the chain that the loss reads; cond and importance are read where present."""
        return [keys.X_T, keys.T, keys.A, keys.X0, (keys.NEXT, keys.T), (keys.NEXT, keys.A)]

    @dispatch(auto_batch_size=False)
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """The loss of a batch of chains [*b, K].

        Args:
            tensordict: what `diffrl.sample_chain` gives.

        Returns:
            TensorDict with the scalars ``loss_value``, ``td_error`` (the root mean square of A (x0 - D)) and
            ``residual``, the mean of |R|.

        Raises:
            KeyError: an entry is missing.
            ValueError: the batch is empty; a network that takes labels, without any.
        """
        with self._telling_what_is_missing(tensordict):
            return self._loss(tensordict)

    def _loss(self, tensordict: TensorDictBase) -> TensorDictBase:
        chain = rows(tensordict)
        x_t, t, A, x0, s, _ = (chain[key] for key in self.in_keys)
        cond = chain.get(keys.COND, None)
        self._first_look(x0, cond)
        D_x = self._denoise(x_t, t, cond)
        square = event_mean((expand_like(A, x0) * (x0 - D_x)).square(), 2).unsqueeze(-1)
        R = self._residual(
            self._sample(x_t, t, D_x, cond) if self.estimate == "sample" else D_x.flatten(0, 1)
        )
        low = torch.full_like(R[:, :1], -1.0)
        beta_tilde = learned_log_variance(
            self.denoiser.process, t.flatten().double(), s.flatten().double(), low
        ).exp()
        of_residual = (R.square() / (2 * beta_tilde)).mean(1).view_as(t)
        loss = self._weight(ChainTerms(chain, self.denoiser)) * square + self.residual_coef * of_residual
        loss = self._by_importance(tensordict, chain, loss)
        out = {"loss_value": loss.mean(), "td_error": square.detach().mean().sqrt()}
        return TensorDict({**out, "residual": R.detach().abs().mean()})

    def _sample(self, x_t: Tensor, t: Tensor, D_x: Tensor, cond: Tensor | None) -> Tensor:
        """D at the least noisy level of each row, where a deterministic step leads: [N, *E]."""
        end = t[:, -1:].expand_as(t)
        A, kappa, _ = posterior(self.denoiser.process, t, end, 0.0)  # A = 0 and κ = 1 at the end itself
        x_end = expand_like(A.to(x_t), x_t) * D_x + expand_like(kappa.to(x_t), x_t) * x_t
        return self._denoise(x_end, end, cond).flatten(0, 1)

    def _denoise(self, x_t: Tensor, t: Tensor, cond: Tensor | None) -> Tensor:
        self.network_evaluations += t.numel()
        D_x: Tensor = self.value_network.module.denoise(x_t, t, cond)
        return D_x
