"""The hybrid loss of Improved DDPM: denoising for the mean of a reverse step, the bound for its variance."""

from collections.abc import Callable, Mapping

from tensordict import TensorDict, TensorDictBase
from tensordict.nn import dispatch
from tensordict.utils import NestedKey
from torch import Tensor

from diffrl import keys
from diffrl.diffusion.denoisers import Denoiser
from diffrl.diffusion.learned_variance import learned_log_variance, step_kl
from diffrl.errors import InputError
from diffrl.objectives.chain_value import value_module
from diffrl.objectives.denoiser_loss import DenoiserLoss, rows
from diffrl.objectives.place import Place
from diffrl.objectives.registry import OBJECTIVES
from diffrl.objectives.weights import MAX_COEF, ChainTerms, weight_function
from diffrl.ranges import require_number
from diffrl.shapes import event_mean, expand_like

__all__ = ["HybridLoss"]


@OBJECTIVES.register(
    "hybrid",
    label="Hybrid loss",
    place=Place(
        "denoiser",
        "chains",
        "any",
        "end",
        "nothing",
        "none",
        note="learns the variance of the reverse step too",
    ),
)
class HybridLoss(DenoiserLoss):
    """Monte Carlo for D, and the variational bound for the second output v, in which D is held.

        L = mean_i w_i A_i² ‖x0 - D(x_i)‖²/dim(E) + c K mean_i L_i/dim(E)
        L_i = KL( q(x_{i+1} | x_i, x0) ‖ N(A D⁻ + κ x_i, Σ) ),    Σ by v; of the last step -log N(x0; D⁻, Σ)

    D⁻ is D without gradient, so that c L_vlb trains v alone: D's fixed point is that of Monte Carlo, E[x0 | x_i]. With
    it v's is Σ* = β̃ + A² Var(x0 | x_i), the exact variance of the reverse step, coordinate by coordinate. L_i is that
    of the Markov coupling, whatever that of the chain is. K is the number of steps of a row, so that of whole chains
    K mean_i is their sum, L_vlb; a window has a share of it.

    With prediction_type=eps the first term is the simple loss, as published. The published code counts L_vlb in bits,
    which is 1.44 times as many; c is the paper's λ. It needs a network with variance=true, and is made for the sampler
    `ancestral_learned`:

        python -m diffrl train objective=hybrid network.variance=true sampler=ancestral_learned

    Source: Improved Denoising Diffusion Probabilistic Models (Nichol & Dhariwal, 2021), eqs. 15-16 and section 3.1,
    https://arxiv.org/abs/2102.09672.

    Args:
        denoiser: D, whose network predicts a variance; trained in place.
        weight: name in `diffrl.objectives.weights.WEIGHTS`.
        weight_options: numbers of that weight, e.g. ``{"gamma": 0.5}`` for "p2".
        vlb_coef: c ∈ [0, 1e6].

    Raises:
        ValueError: an argument outside its range, or a network that predicts no variance.
    """

    fed_with = "diffrl.sample_chain(process, x0, num_steps=18)"
    out_keys = ["loss_value", "td_error"]

    def __init__(
        self,
        denoiser: Denoiser,
        *,
        weight: str = "edm",
        weight_options: Mapping[str, float] | None = None,
        vlb_coef: float = 0.001,
    ) -> None:
        require_number("vlb_coef", vlb_coef, 0, MAX_COEF)
        if not getattr(denoiser, "predicts_variance", False):
            raise InputError(
                "objective hybrid trains a variance too: build the network with network.variance=true"
            )
        super().__init__(value_module(denoiser), target=False)
        self.vlb_coef = vlb_coef
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
            ``loss_vlb``, the mean of L_i/dim(E) in nats.

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
        self.network_evaluations += t.numel()
        D_x, v = self.denoiser.with_variance(
            x_t.flatten(0, 1), t.flatten(), None if cond is None else cond.flatten(0, 1)
        )
        square = event_mean((expand_like(A, x0) * (x0 - D_x.view_as(x0))).square(), 2).unsqueeze(-1)
        L_vlb = self._bound(D_x.detach(), v, x0.flatten(0, 1), t.flatten(), s.flatten()).view_as(t)
        K = t.shape[1]
        loss = self._weight(ChainTerms(chain, self.denoiser)) * square + self.vlb_coef * K * L_vlb
        loss = self._by_importance(tensordict, chain, loss)
        out = {"loss_value": loss.mean(), "td_error": square.detach().mean().sqrt()}
        return TensorDict({**out, "loss_vlb": L_vlb.detach().mean()})

    def _bound(self, D_x: Tensor, v: Tensor, x0: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """L_i/dim(E) of states [N, *E], shape [N]."""
        process = self.denoiser.process
        t, s = t.double(), s.double()
        log_variance = learned_log_variance(process, t, s, v)
        return event_mean(step_kl(process, t, s, x0, D_x, log_variance), 1)
