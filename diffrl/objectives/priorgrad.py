"""PriorGrad: noise that has the scale of the data, or of their class, and an error that counts in its units."""

from collections.abc import Callable, Mapping

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import dispatch
from tensordict.utils import NestedKey
from torch import Generator, Tensor

from diffrl import keys
from diffrl.diffusion.denoisers import Denoiser
from diffrl.diffusion.priors import Prior
from diffrl.diffusion.schedules.base import Schedule
from diffrl.errors import InputError
from diffrl.objectives.chain_value import value_module
from diffrl.objectives.denoiser_loss import DenoiserLoss, rows
from diffrl.objectives.denoising import sample_log_normal_states
from diffrl.objectives.place import Place
from diffrl.objectives.registry import OBJECTIVES
from diffrl.objectives.weights import ChainTerms, weight_function
from diffrl.ranges import require_number
from diffrl.shapes import event_mean, require_data

__all__ = ["PriorGradLoss", "PriorStates"]


class PriorStates:
    """One noisy state of each datum, with the noise of the denoiser's prior, at a log-normal noise level.

        x_t = α_t x0 + σ_t S^½ z,    ln(σ_t/α_t) ~ N(P_mean, P_std²)

    Args:
        process: noise schedule.
        denoiser: whose prior it is.
        P_mean: mean of ln(σ_t/α_t), in [-15, 15].
        P_std: its standard deviation, in [0, 5].

    Raises:
        ValueError: P_mean or P_std outside its range.
    """

    draws_noise_of_prior = True

    def __init__(
        self, process: Schedule, denoiser: Denoiser, P_mean: float = -1.2, P_std: float = 1.2
    ) -> None:
        require_number("P_mean", P_mean, -15, 15)
        require_number("P_std", P_std, 0, 5)
        self.process, self.denoiser, self.P_mean, self.P_std = process, denoiser, P_mean, P_std

    def __call__(self, x0: Tensor, *, cond: Tensor | None, generator: Generator) -> TensorDict:
        """States of batch size [B, 1], see `sample_log_normal_states`; drawn in the order z, σ_t."""
        require_data(x0, cond)
        z = torch.randn(x0.shape, generator=generator, dtype=x0.dtype, device=x0.device)
        noise = _prior(self.denoiser).of(cond, x0)[1] * z
        law = {"P_mean": self.P_mean, "P_std": self.P_std}
        return sample_log_normal_states(self.process, x0, cond=cond, noise=noise, generator=generator, **law)


@OBJECTIVES.register(
    "priorgrad",
    also=PriorStates,
    label="PriorGrad",
    place=Place(
        "denoiser",
        "states",
        "none",
        "end",
        "nothing",
        "none",
        note="of a process whose noise is scaled like the data",
    ),
)
class PriorGradLoss(DenoiserLoss):
    """Denoising in units of the prior's scale; for a denoiser with a prior, to be fed with `PriorStates`.

        L = mean w (x0 - D)ᵀ S⁻¹ (x0 - D)/dim(E),    σ²/α² S⁻¹ (x0 - D)² = S⁻¹ (ε - ε̂)², ε = S^½ z

    S changes the noise and the weight. The fixed point is E[x0 | x_t] of this process, which is another function than
    that of standard noise, but S⁻¹ moves it nowhere: coordinates are learnt each for itself. With S = I and m = 0 it is
    `edm`. With prediction_type=eps it is published in this form.

        python -m diffrl train objective=priorgrad denoiser.prior=class denoiser.sigma_data=1 data.conditional=true

    Tables have no value error, as the exact denoisers of the library know standard noise. Other objectives, policies
    and guidance (of "class") refuse such a denoiser.

    Source: PriorGrad: Improving Conditional Denoising Diffusion Models with Data-Dependent Adaptive Prior (Lee et al.,
    2022), section 3, https://arxiv.org/abs/2106.06406.

    Args:
        denoiser: D, with prior="data" or "class"; trained in place.
        weight: name in `diffrl.objectives.weights.WEIGHTS`.
        weight_options: numbers of that weight, e.g. ``{"gamma": 0.5}`` for "p2".

    Raises:
        ValueError: an argument outside its range, or a denoiser with the standard prior.
    """

    fed_with = "diffrl.objectives.PriorStates"
    out_keys = ["loss_value", "td_error"]

    def __init__(
        self,
        denoiser: Denoiser,
        *,
        weight: str = "edm",
        weight_options: Mapping[str, float] | None = None,
    ) -> None:
        _prior(denoiser)
        super().__init__(value_module(denoiser), target=False)
        self._weight: Callable[..., Tensor] = weight_function(weight, weight_options)

    @property
    def in_keys(self) -> list[NestedKey]:
        """Entries of the states that the loss reads; cond is read where present."""
        return [keys.X_T, keys.T, keys.X0, keys.A, (keys.NEXT, keys.A), (keys.NEXT, keys.T)]

    @dispatch(auto_batch_size=False)
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """The loss of states [B, 1].

        Args:
            tensordict: what `PriorStates` draws.

        Returns:
            TensorDict with the scalars ``loss_value`` and ``td_error``, the root mean square of S^-½ (x0 - D).

        Raises:
            KeyError: an entry is missing.
            ValueError: the batch is empty; a network that takes labels, without any.
        """
        with self._telling_what_is_missing(tensordict):
            states = rows(tensordict)
            x_t, t, x0 = (states[key] for key in self.in_keys[:3])
        cond = states.get(keys.COND, None)
        labels = None if cond is None else cond.flatten(0, 1)
        mean, std = _prior(self.denoiser).of(labels, x0.flatten(0, 1))
        u0 = (x0.flatten(0, 1) - mean) / std
        self._first_look(u0, cond)
        self.network_evaluations += t.numel()
        D_u = (self.value_network.module.denoise(x_t, t, cond).flatten(0, 1) - mean) / std
        square = event_mean((u0 - D_u).square(), 1).view_as(t)
        loss = self._weight(ChainTerms(states, self.denoiser)) * square
        if not tensordict.is_locked:
            tensordict[keys.LOSS] = loss.detach().view(tensordict[keys.T].shape)
        return TensorDict({"loss_value": loss.mean(), "td_error": square.detach().mean().sqrt()})


def _prior(denoiser: Denoiser) -> Prior:
    prior = getattr(denoiser, "prior", None)
    if not isinstance(prior, Prior):
        raise InputError("objective priorgrad needs a prior like the data: set denoiser.prior=data or class")
    return prior
