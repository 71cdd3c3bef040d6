"""The residual gradient without bias: two next states that are independent given the state left."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import dispatch
from tensordict.utils import NestedKey
from torch import Tensor

from diffrl import keys
from diffrl.diffusion.denoisers import Denoiser
from diffrl.errors import InputError
from diffrl.objectives.chain_value import value_module
from diffrl.objectives.denoiser_loss import DenoiserLoss, rows
from diffrl.objectives.place import Place
from diffrl.objectives.registry import OBJECTIVES
from diffrl.objectives.twins import TwinSteps
from diffrl.objectives.weights import MAX_COEF, ChainTerms, weight_function
from diffrl.ranges import require_number
from diffrl.shapes import event_mean, expand_like

__all__ = ["DoubleSamplingLoss"]


def _label(options: Mapping[str, Any]) -> str:
    return {"posterior": "Double sampling", "rollouts": "Double sampling, own rollouts"}[options["source"]]


@OBJECTIVES.register(
    "double_sampling",
    also=TwinSteps,
    label=_label,
    place=Place(
        "denoiser",
        "pairs",
        "any",
        "one_step",
        "residual",
        "posterior",
        note="two independent next states; with source=rollouts by steps of the model",
    ),
)
class DoubleSamplingLoss(DenoiserLoss):
    """The squared *expected* Bellman residual, by the product of two residuals that are independent given x_t.

        r^k = A (x0^k - D(x_t)) - A' (x0^k - D(x'^k)),    k = 1, 2
        loss = mean( b w ⟨r¹, r²⟩/dim(E) + c L_den ),    L_den = ‖D(x_t) - x0¹‖²/(c_out² dim(E))

    The gradient goes through both ends of both residuals. As E[⟨r¹, r²⟩ | x_t] = ‖E[r | x_t]‖², it is that of the mean
    squared expected residual, whose minimum with Markov coupling is the exact denoiser. The square of *one* residual
    (`ValueLoss` with bootstrap="residual") adds the variance of r, which pulls the minimum away from it, and two next
    states of one x0 would add the variance of E[r | x_t, x0]. A loss of this kind may be negative.

    On the 'clean' value (A = A' = 1) r = D(x') - D(x_t). With two rollouts of the model, b = 2, c = 1 and weight "none"
    that is the loss of Consistent Diffusion Models, but for their levels and sampler, which `cdm` has.

    Sources: double sampling: Reinforcement Learning: An Introduction, 2nd ed. (Sutton & Barto, 2018), §11.5,
    http://incompleteideas.net/book/the-book-2nd.html; Consistent Diffusion Models (Daras et al., 2023),
    https://arxiv.org/abs/2302.09057, and its released code.

    Args:
        denoiser: D, kept by reference and trained in place.
        weight: name in `diffrl.objectives.weights.WEIGHTS`.
        weight_options: numbers of that weight, e.g. ``{"gamma": 0.5}`` for "p2".
        residual_coef: b ∈ [0, 1e6].
        denoising_coef: c ∈ [0, 1e6], the added denoising loss.

    Raises:
        ValueError: an argument outside its range, or nothing to learn from, b = c = 0.
    """

    fed_with = "diffrl.objectives.TwinSteps"
    out_keys = ["loss_value", "td_error"]
    bootstrap = "residual"

    def __init__(
        self,
        denoiser: Denoiser,
        *,
        weight: str = "edm",
        weight_options: Mapping[str, float] | None = None,
        residual_coef: float = 1.0,
        denoising_coef: float = 0.0,
    ) -> None:
        require_number("residual_coef", residual_coef, 0, MAX_COEF)
        require_number("denoising_coef", denoising_coef, 0, MAX_COEF)
        if residual_coef == denoising_coef == 0:
            raise InputError("residual_coef and denoising_coef are both 0: one must be > 0")
        super().__init__(value_module(denoiser), target=False)
        self.residual_coef, self.denoising_coef = residual_coef, denoising_coef
        self._weight: Callable[..., Tensor] = weight_function(weight, weight_options)

    @property
    def in_keys(self) -> list[NestedKey]:
        """Entries of the steps that the loss reads; cond, importance and evaluations are read where present."""
        state = [keys.X_T, keys.T, keys.A, keys.KAPPA]
        return [*state, keys.X0, *((keys.NEXT, name) for name in (*state, keys.TERMINATED))]

    @dispatch(auto_batch_size=False)
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """The loss of twin steps [N, 2]: the two of a row leave the same state.

        Args:
            tensordict: what `TwinSteps` draws.

        Returns:
            TensorDict with the scalars ``loss_value`` and ``td_error``, the root mean square of r.

        Raises:
            KeyError: an entry is missing.
            ValueError: rows are no pairs; the batch is empty; a network that takes labels, without any.
        """
        with self._telling_what_is_missing(tensordict):
            return self._loss(tensordict)

    def left(self, states: TensorDictBase) -> tuple[Tensor, Tensor, Tensor | None]:
        """Those of `DenoiserLoss.left`; twins leave one state."""
        return super().left(rows(states)[:, :1])

    def _loss(self, tensordict: TensorDictBase) -> TensorDictBase:
        twins = rows(tensordict)
        if twins.shape[1] != 2:
            raise InputError(
                f"batch size {list(twins.batch_size)}: double sampling takes pairs of steps from one state, [N, 2]"
            )
        x0, left, cond = twins[keys.X0], twins[:, :1], twins.get(keys.COND, None)
        self._first_look(x0[:, :1], cond)
        self._count_drawing(twins)
        D_x = self._denoise(left[keys.X_T], left[keys.T], None if cond is None else cond[:, :1])
        r = self._residuals(twins, D_x)
        terms, loss = ChainTerms(left, self.denoiser), torch.zeros_like(left[keys.T])
        if self.residual_coef > 0:
            product = event_mean(r[:, :1] * r[:, 1:], 2).unsqueeze(-1)
            loss = loss + self.residual_coef * self._weight(terms) * product
        if self.denoising_coef > 0:
            L_den = event_mean((D_x - x0[:, :1]).square(), 2).unsqueeze(-1) / terms.c_out**2
            loss = loss + self.denoising_coef * L_den
        if not tensordict.is_locked:
            tensordict[keys.LOSS] = loss.detach().expand_as(twins[keys.T]).view(tensordict[keys.T].shape)
        importance = left.get(keys.IMPORTANCE, None)
        if importance is not None:
            loss = importance * loss
        return TensorDict({"loss_value": loss.mean(), "td_error": r.detach().square().mean().sqrt()})

    @torch.no_grad()
    def target(self, states: TensorDictBase) -> Tensor:
        """What D(x_t) is pulled to, where the loss is least in D(x_t) alone: [N, *E] of twin steps [N, 2].

            y = (p (y¹ + y²)/2 + q x0¹)/(p + q),    y^k = D(x_t) + r^k/A,    p = b w A²,    q = c/c_out²

        The gradient at the states reached, D(x'), is none of a square: D(x'¹) has no point that it is pulled to.
        """
        twins = rows(states)
        left, x0 = twins[:, :1], twins[keys.X0]
        D_x = self._denoise(left[keys.X_T], left[keys.T], left.get(keys.COND, None))
        terms = ChainTerms(left, self.denoiser)
        y = (D_x + self._residuals(twins, D_x) / expand_like(twins[keys.A], x0)).mean(1, keepdim=True)
        p = expand_like(self.residual_coef * self._weight(terms) * terms.A**2, x0)
        q = expand_like(self.denoising_coef / terms.c_out**2, x0)
        return ((p * y + q * x0[:, :1]) / (p + q)).squeeze(1)

    def _residuals(self, twins: TensorDictBase, D_x: Tensor) -> Tensor:
        """r¹ and r², shape [N, 2, *E]; the clean state has no value."""
        x0, reached = twins[keys.X0], twins[keys.NEXT]
        A, A_next = expand_like(twins[keys.A], x0), expand_like(reached[keys.A], x0)
        noisy = ~reached[keys.TERMINATED].squeeze(-1)
        cond = twins.get(keys.COND, None)
        D_next = self._denoise(
            reached[keys.X_T][noisy], reached[keys.T][noisy], None if cond is None else cond[noisy]
        )
        e_next = torch.zeros_like(x0)
        e_next[noisy] = A_next[noisy] * (x0[noisy] - D_next)
        return A * (x0 - D_x) - e_next

    def _denoise(self, x_t: Tensor, t: Tensor, cond: Tensor | None) -> Tensor:
        self.network_evaluations += t.numel()
        return self.value_network.module.denoise(x_t, t, cond)
