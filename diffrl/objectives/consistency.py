"""Consistency training, plain (CT) and with a TD term (TD-CT), on pairs of states that share one noise."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import dispatch
from tensordict.utils import NestedKey
from torch import Tensor

from diffrl import keys
from diffrl.diffusion.denoisers import Denoiser
from diffrl.errors import InputError
from diffrl.objectives.annealing import Ranges
from diffrl.objectives.chain_value import value_module
from diffrl.objectives.consistency_metrics import METRICS, Distance, distance, l2
from diffrl.objectives.consistency_pairs import ConsistencyPairs
from diffrl.objectives.denoiser_loss import DenoiserLoss, rows
from diffrl.objectives.place import Place
from diffrl.objectives.registry import OBJECTIVES
from diffrl.objectives.weights import MAX_COEF, WeightTerms, weight_function
from diffrl.ranges import require_number
from diffrl.registry import options_of
from diffrl.shapes import expand_like

__all__ = [
    "CT_WEIGHTS",
    "METRICS",
    "ConsistencyLoss",
    "ct_loss",
    "td_ct_loss",
]

CT_WEIGHTS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "uniform": lambda sigma, sigma_data: torch.ones_like(sigma),
    "karras": lambda sigma, sigma_data: sigma**-2 + sigma_data**-2,
}
"""w_CT(σ_t, σ_data), the weight of the consistency term; "karras" is named as in the code of Consistency Models."""


class ConsistencyLoss(DenoiserLoss):
    """Consistency training with a TD term, to be fed with `sample_consistency_pairs`.

        L_CT = w_CT(σ_t) d(f(x_t), f⁻(x_t'))
        L_TD = w ‖δ‖²/dim(E),    δ = A_t (x0 - f(x_t)) - A_t' (x0 - f⁻(x_t'))
        L = mean( valid ? b L_TD + c L_CT : (b + c) L_CT )
        f⁻(x_t') stands for (1-s) x0 + s f⁻(x_t')

    b = 0, c = 1 is plain consistency training (`ct_loss`): with d = l2 and w_CT uniform, TD(0) of the 'clean'
    value under shared noise. b = 1, c = 0.5 is TD-CT (`td_ct_loss`). f⁻ carries no gradient and is evaluated
    once for both terms.

    Sources: Temporal Difference Learning for Diffusion Models (2026), https://arxiv.org/abs/2606.15048;
    Consistency Models (Song et al., 2023), eq. 10, https://arxiv.org/abs/2303.01469.

    Args:
        denoiser: f, in the boundary form, prediction_type "consistency"; kept by reference, trained in place.
        td_coef: b ∈ [0, 1e6].
        consistency_coef: c ∈ [0, 1e6].
        td_weight: w, a name in `diffrl.objectives.weights.WEIGHTS`; the released code has "sum_sq" and "sum".
        metric: d, a name in `METRICS`; "lpips", which needs `metric_weights`; or a function of two predictions
            [B, K, *E] that gives [B, K].
        metric_weights: folder of the weights of "lpips", see `diffrl.objectives.perceptual.LPIPS`.
        ct_weight: w_CT, "uniform" or "karras" (σ_t⁻² + σ_data⁻²).
        bootstrap: f⁻ is a "target" network that lags behind, or the network's "own" prediction.
        bootstrap_share: s ∈ [0, 1]; 0 regresses on the datum, and f⁻ is not evaluated.
        anneal: options that change along the training, as in `ValueLoss`: bootstrap_share, td_coef, consistency_coef.

    Raises:
        ValueError: an argument outside its range, or a denoiser in another form.
    """

    fed_with = "diffrl.objectives.sample_consistency_pairs"
    out_keys = ["loss_value", "td_error"]
    annealable: ClassVar[Ranges] = {
        **{"bootstrap_share": (0, 1), "td_coef": (0, MAX_COEF), "consistency_coef": (0, MAX_COEF)}
    }

    def __init__(
        self,
        denoiser: Denoiser,
        *,
        td_coef: float,
        consistency_coef: float,
        td_weight: str = "sum_sq",
        metric: str | Distance = "pseudo_huber",
        metric_weights: str | None = None,
        ct_weight: str = "uniform",
        bootstrap: Literal["target", "own"] = "target",
        bootstrap_share: float = 1.0,
        anneal: Mapping[str, Sequence[float]] | None = None,
    ) -> None:
        if getattr(denoiser, "prediction_type", "consistency") != "consistency":
            raise InputError(
                "consistency training needs f(x, σ_min) = x: set denoiser.prediction_type=consistency, "
                f"not {denoiser.prediction_type}"
            )
        require_number("td_coef", td_coef, 0, MAX_COEF)
        require_number("consistency_coef", consistency_coef, 0, MAX_COEF)
        require_number("bootstrap_share", bootstrap_share, 0, 1)
        if not td_coef + consistency_coef > 0:
            raise InputError(f"td_coef is {td_coef} and consistency_coef {consistency_coef}: one must be > 0")
        if ct_weight == "edm":
            raise InputError(
                "ct_weight 'edm' is called 'karras' now: weight 'edm' is another one, of TD errors"
            )
        if ct_weight not in CT_WEIGHTS:
            raise InputError(f"ct_weight is {ct_weight!r}: give one of {', '.join(CT_WEIGHTS)}")
        if bootstrap not in ("target", "own"):
            raise InputError(f"bootstrap is {bootstrap!r}: give 'target' or 'own'")
        super().__init__(value_module(denoiser), target=bootstrap == "target", anneal=anneal)
        self.bootstrap_share = bootstrap_share
        self.td_coef, self.consistency_coef, self.bootstrap = td_coef, consistency_coef, bootstrap
        self._td_weight, self._metric = weight_function(td_weight), distance(metric, metric_weights)
        self._ct_weight = CT_WEIGHTS[ct_weight]
        self.set_progress(0, 1)

    @property
    def in_keys(self) -> list[NestedKey]:
        """Entries of the pairs that the loss reads; cond is read where present."""
        state = [keys.X_T, keys.T, keys.A, keys.KAPPA]
        return [*state, keys.X0, keys.VALID, *((keys.NEXT, name) for name in state)]

    @dispatch(auto_batch_size=False)
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """The loss of a batch of pairs [B, 1]; as each pair stands for itself, another batch size means the same.

        Args:
            tensordict: what `sample_consistency_pairs` gives.

        Returns:
            TensorDict with the scalars ``loss_value`` and ``td_error``, the root mean square of f(x_t) -
            f⁻(x_t'), which is the TD error of the 'clean' value.

        Raises:
            KeyError: an entry is missing.
            ValueError: the batch is empty; a network that takes labels, without any.
        """
        with self._telling_what_is_missing(tensordict):
            return self._loss(rows(tensordict))

    def _loss(self, pairs: TensorDictBase) -> TensorDictBase:
        x_t, t, A, _, x0, valid, _, t_next, A_next, _ = (pairs[key] for key in self.in_keys)
        cond = pairs.get(keys.COND, None)
        self._first_look(x0, cond)
        self._count_drawing(pairs)
        f = self.value_network.module.denoise(x_t, t, cond)
        self.network_evaluations += t.numel()
        f_next = self._target(pairs)
        b, c = self.td_coef, self.consistency_coef
        L_CT = self._ct_weight(t, self.denoiser.sigma_data) * self._metric(f, f_next).unsqueeze(-1)
        loss = c * L_CT
        if b > 0:
            delta = expand_like(A, x0) * (x0 - f) - expand_like(A_next, x0) * (x0 - f_next)
            c_out, c_out_next = self.denoiser.scalings(torch.cat([t, t_next])).c_out.chunk(2)
            w = self._td_weight(WeightTerms(A, A_next, c_out, c_out_next, t**-2))
            loss = torch.where(valid, b * w * l2(delta).unsqueeze(-1) + c * L_CT, (b + c) * L_CT)
        return TensorDict(
            {"loss_value": loss.mean(), "td_error": (f.detach() - f_next).square().mean().sqrt()}
        )

    def target(self, states: TensorDictBase) -> Tensor:
        """What f(x_t) is pulled to by the consistency term, without gradient: [N, *E] of pairs [*b, 1]."""
        return self._target(rows(states)).flatten(0, 1)

    @torch.no_grad()
    def _target(self, pairs: TensorDictBase) -> Tensor:
        """(1-s) x0 + s f⁻(x_t')."""
        x0, s = pairs[keys.X0], self.bootstrap_share
        if s == 0:
            return x0
        x_next, t_next = (pairs[keys.NEXT, key] for key in (keys.X_T, keys.T))
        f_next = self.bootstrap_network.module.denoise(x_next, t_next, pairs.get(keys.COND, None))
        self.network_evaluations += t_next.numel()
        return torch.lerp(x0, f_next, s) if s < 1 else f_next


@OBJECTIVES.register(
    "ct",
    also=ConsistencyPairs,
    label="CT",
    place=Place("to_clean", "pairs", "shared", "one_step", "target", "forward"),
)
@options_of(ConsistencyLoss, drop=("td_coef", "consistency_coef", "td_weight"))
def ct_loss(denoiser: Denoiser, **options: Any) -> ConsistencyLoss:
    """Plain consistency training: neighbouring states of one noise get the same prediction.

        L = w_CT(σ_t) d(f(x_t), f⁻(x_t'))

    Args:
        denoiser: f, of prediction_type "consistency"; trained in place.
        options: those of `ConsistencyLoss` that its TD term does not use.
    """
    return ConsistencyLoss(denoiser, td_coef=0.0, consistency_coef=1.0, **options)


@OBJECTIVES.register(
    "td_ct",
    also=ConsistencyPairs,
    label="TD-CT",
    place=Place(
        "to_clean",
        "pairs",
        "shared",
        "one_step",
        "target",
        "forward",
        note="the value of consistency training and that of TD at once",
    ),
)
@options_of(ConsistencyLoss, drop=("td_coef",), consistency_coef=0.5)
def td_ct_loss(denoiser: Denoiser, **options: Any) -> ConsistencyLoss:
    """TD-CT: consistency training with a TD term, which is left out where a pair ends at σ_min.

        L = valid ? L_TD + c L_CT : (1 + c) L_CT,    with L_TD and L_CT of `ConsistencyLoss`

    Args:
        denoiser: f, of prediction_type "consistency"; trained in place.
        options: those of `ConsistencyLoss` but td_coef, which is 1.
    """
    return ConsistencyLoss(denoiser, td_coef=1.0, **options)
