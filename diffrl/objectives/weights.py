"""Weights on the squared TD error δ²: one function for each name, all of the same few quantities."""

import inspect
from collections.abc import Callable, Mapping
from functools import cached_property, partial
from typing import Any, NamedTuple

import torch
from tensordict import TensorDictBase
from torch import Tensor

from diffrl import keys
from diffrl.diffusion.denoisers import Denoiser
from diffrl.errors import InputError
from diffrl.ranges import require_number

__all__ = ["MAX_COEF", "WEIGHTS", "ChainTerms", "WeightTerms", "named_function", "weight_function"]

MAX_COEF = 1e6
"""Largest coefficient of a loss or number of a weight: more is a slip, and overflows soon."""


class WeightTerms(NamedTuple):
    """What a weight may depend on, each of shape [*b, 1]."""

    A: Tensor
    """A_t, coefficient of x0 in the value of the state left."""
    A_next: Tensor
    """A_t' of the state reached; 0 if it is clean."""
    c_out: Tensor
    """Scale of the network's output at the state left."""
    c_out_next: Tensor
    """The same at the state reached; anything finite if it is clean."""
    snr: Tensor
    """α_t²/σ_t² of the state left; 0 if it is pure noise."""


class ChainTerms:
    """`WeightTerms` of the states of a chain, computed as far as a weight asks for them; c_out may be known already."""

    def __init__(
        self, chain: TensorDictBase | Mapping[str, Any], denoiser: Denoiser, c_out: Tensor | None = None
    ) -> None:
        reached = chain[keys.NEXT]
        self._t, self._t_next, self._denoiser = chain[keys.T], reached[keys.T], denoiser
        self.A, self.A_next = chain[keys.A], reached[keys.A]
        if c_out is not None:
            self.c_out = c_out

    @cached_property
    def c_out(self) -> Tensor:
        return self._denoiser.scalings(self._t).c_out

    @property
    def c_out_next(self) -> Tensor:
        return self._denoiser.scalings(self._t_next).c_out

    @property
    def snr(self) -> Tensor:
        process = self._denoiser.process
        return (process.alpha(self._t) / process.sigma(self._t)).square()


# Made for TD. Source: Temporal Difference Learning for Diffusion Models (2026), eq. of the TD loss and its
# released code, https://arxiv.org/abs/2606.15048.


def pairwise(w: WeightTerms) -> Tensor:
    """1/(A_t² c_out(t)² + A_t'² c_out(t')²), the paper's text: it measures δ in units of the network's output.

    Those of both states, as if their errors were independent.
    """
    return 1 / ((w.A * w.c_out) ** 2 + (w.A_next * w.c_out_next) ** 2)


def edm(w: WeightTerms) -> Tensor:
    """1/max(A_t² c_out(t)², 1e-8), the released EDM code: it measures δ in units of the network's output.

    In standard denoising that is the plain squared error of what the network predicts: EDM's F, ε, v, a velocity; but
    where A_t c_out < 1e-4 the floor binds, and it is less. With EDM's defaults that is nowhere up to 500 levels; of
    1000 levels it is one under Markov coupling and 35 under shared noise, all near σ_min.
    """
    return 1 / ((w.A * w.c_out) ** 2).clamp(min=1e-8)


def sum_sq(w: WeightTerms) -> Tensor:
    """1/max(A_t² + A_t'², 0.01), the released code of TD-CT in torch."""
    return 1 / (w.A**2 + w.A_next**2).clamp(min=0.01)


def sum_(w: WeightTerms) -> Tensor:
    """1/max(A_t + A_t', 0.01), the released code of TD-CT in jax."""
    return 1 / (w.A + w.A_next).clamp(min=0.01)


def none(w: WeightTerms) -> Tensor:
    """1 on δ²: no weight, to see what weights are good for."""
    return torch.ones_like(w.A)


# Made for standard denoising, and published for ‖ε - ε̂‖² or ‖x0 - D‖². In a variance-preserving process
# ‖ε - ε̂‖² = SNR ‖x0 - D‖² and ‖v - v̂‖² = (SNR + 1) ‖x0 - D‖²; any other process is one, but for a factor on x_t
# that D does not see.


def _per_x0(w: WeightTerms, w_x0: Tensor) -> Tensor:
    """The weight on δ² = A² ‖x0 - D‖² of standard denoising that is w_x0 on ‖x0 - D‖²: w_x0/max(A², 1e-12).

    Pure noise gets w_x0 = 1: it has to be trained too, and weights made for ε give it 0 or nothing. The floor
    binds for A < 1e-6, where the value hardly depends on D.
    """
    return torch.where(w.snr > 0, w_x0, 1.0) / (w.A**2).clamp(min=1e-12)


def x0(w: WeightTerms) -> Tensor:
    """1 on the error of the clean estimate, ‖x0 - D‖²."""
    return _per_x0(w, torch.ones_like(w.snr))


def eps(w: WeightTerms) -> Tensor:
    """1 on the error of the noise, ‖ε - ε̂‖², called the simple loss; SNR on ‖x0 - D‖².

    Source: Denoising Diffusion Probabilistic Models (Ho et al., 2020), eq. 14, https://arxiv.org/abs/2006.11239.
    """
    return _per_x0(w, w.snr)


def v(w: WeightTerms) -> Tensor:
    """1 on the error of v, ‖v - v̂‖²; SNR + 1 on ‖x0 - D‖².

    Source: Progressive Distillation for Fast Sampling of Diffusion Models (Salimans & Ho, 2022), section 4,
    https://arxiv.org/abs/2202.00512.
    """
    return _per_x0(w, w.snr + 1)


def trunc_snr(w: WeightTerms) -> Tensor:
    """max(SNR, 1) on ‖x0 - D‖².

    Source: Progressive Distillation for Fast Sampling of Diffusion Models (Salimans & Ho, 2022), section 4,
    https://arxiv.org/abs/2202.00512.
    """
    return _per_x0(w, w.snr.clamp(min=1))


def min_snr(w: WeightTerms, gamma: float = 5.0) -> Tensor:
    """min(SNR, g) on ‖x0 - D‖²; min(SNR, g)/SNR on ‖ε - ε̂‖². g is the option `gamma`, by the paper's letter.

    Source: Efficient Diffusion Training via Min-SNR Weighting Strategy (Hang et al., 2023),
    https://arxiv.org/abs/2303.09556.
    """
    return _per_x0(w, w.snr.clamp(max=gamma))


def p2(w: WeightTerms, gamma: float = 1.0, k: float = 1.0) -> Tensor:
    """1/(k + SNR)^g on ‖ε - ε̂‖². g is the option `gamma`, by the paper's letter: 0 is `eps`, 0.5 was published too.

    Source: Perception Prioritized Training of Diffusion Models (Choi et al., 2022),
    https://arxiv.org/abs/2204.00227.
    """
    return _per_x0(w, w.snr / (k + w.snr) ** gamma)


def debias(w: WeightTerms) -> Tensor:
    """1/√SNR on ‖ε - ε̂‖²; √SNR on ‖x0 - D‖².

    Source: Debias the Training of Diffusion Models (Yu et al., 2023), https://arxiv.org/abs/2310.08442.
    """
    return _per_x0(w, w.snr.sqrt())


WEIGHTS: dict[str, Callable[..., Tensor]] = {
    "pairwise": pairwise,
    "edm": edm,
    "sum_sq": sum_sq,
    "sum": sum_,
    "none": none,
    "x0": x0,
    "eps": eps,
    "v": v,
    "snr": eps,
    "trunc_snr": trunc_snr,
    "min_snr": min_snr,
    "p2": p2,
    "debias": debias,
}
"""Name → function of `WeightTerms` and of the weight's own numbers; "snr" is another name of "eps".

On a command line: ``objective.weight=p2 'objective.weight_options={gamma: 0.5}'``.
"""


def weight_function(name: str, options: Mapping[str, float] | None = None) -> Callable[[WeightTerms], Tensor]:
    """The weight of that name.

    Args:
        name: in `WEIGHTS`.
        options: numbers of its own in [0, 1e6], e.g. ``{"gamma": 0.5}`` for "p2".

    Raises:
        ValueError: there is none, it has no such number, or a number is outside its range.
    """
    return named_function("weight", WEIGHTS, name, options)


def named_function(
    kind: str, table: Mapping[str, Callable[..., Tensor]], name: str, options: Mapping[str, float] | None
) -> Callable[..., Tensor]:
    """A function of a table by its name, with numbers of its own set.

    Args:
        kind: what it is, which is also the name of the option.
        table: functions whose first argument is no number.
        name: in the table.
        options: its numbers, each in [0, 1e6].

    Raises:
        ValueError: there is none, it has no such number, or a number is outside its range.
    """
    if name not in table:
        raise InputError(f"{kind} is {name!r}: give one of {', '.join(table)}")
    options = options or {}
    if not isinstance(options, Mapping):
        raise InputError(f"{kind}_options is {options!r}: give names and numbers, such as {{gamma: 0.5}}")
    known = list(inspect.signature(table[name]).parameters)[1:]
    for option in options:
        if option not in known:
            raise InputError(f"{kind} {name!r} has no number {option!r}: it has {', '.join(known) or 'none'}")
        require_number(f"{kind}_options.{option}", options[option], 0, MAX_COEF)
    return partial(table[name], **options)
