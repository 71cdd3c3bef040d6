"""States for Easy Consistency Tuning: pairs that share one noise, whose gap shrinks by stages of the training."""

import math
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor

from diffrl import keys
from diffrl.diffusion.schedules.base import Schedule
from diffrl.diffusion.schedules.edm import EDM
from diffrl.errors import InputError
from diffrl.objectives.one_step import cut_pairs
from diffrl.objectives.transitions import Transition
from diffrl.ranges import MAX_STEPS, require_int, require_number
from diffrl.registry import options_of
from diffrl.shapes import expand_like, require_data, require_finite

__all__ = ["ECTPairs", "sample_ect_pairs", "t_to_r"]

SMALLEST_GAP = (
    1e-6  # of a pair, as a share of t: float32 takes a smaller one for none, and the loss divides by it
)


def t_to_r(t: Tensor, stage: int, q: float = 2.0, k: float = 8.0, b: float = 1.0) -> Tensor:
    """The less noisy level of a pair, r = max(0, t (1 - n(t)/q^(stage+1))), n(t) = 1 + k σ(-b t), σ the sigmoid.

    At stage 0 of the defaults r is 0 up to t = ln 7, so that most pairs are plain denoising; with the stage r → t.

    Source: Consistency Models Made Easy (Geng et al., 2024), https://arxiv.org/abs/2406.14548, and its released code,
    the version for CIFAR-10.
    """
    decay = q ** -float(stage + 1)
    return (t * (1 - decay * (1 + k * torch.sigmoid(-b * t)))).clamp(min=0)


def sample_ect_pairs(
    process: EDM,
    x0: Tensor,
    *,
    stage: int,
    P_mean: float = -1.1,
    P_std: float = 2.0,
    q: float = 2.0,
    k: float = 8.0,
    b: float = 1.0,
    cond: Tensor | None = None,
    sigma: Tensor | None = None,
    noise: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> TensorDict:
    """Pairs of states of one datum and one noise, at a log-normal noise level and at a lower one.

        ln t ~ N(P_mean, P_std²),    x_t = x0 + t ε,    x_r = x0 + r ε,    r = `t_to_r`(t)
        valid: r > 0

    Their value is the denoiser itself, A = 1 and κ = 0. Where r = 0 the second state is the datum, and the pair is not
    valid: what is compared there is x0. The levels are those of the law, on no grid and with no end.

    Args:
        process: EDM.
        x0: clean data, floating dtype, shape [B, *E].
        stage: ≥ 0; see `t_to_r`.
        P_mean: mean of ln t, in [-15, 15].
        P_std: its standard deviation, in [0, 5].
        q: factor by which the gap shrinks from stage to stage, > 1.
        k: how much wider the gap is near t = 0, ≥ 0.
        b: how fast that ends as t grows, ≥ 0.
        cond: condition, shape [B, ...].
        sigma: t to use, shape [B].
        noise: ε to use, of x0's shape.
        generator: source of randomness; drawn in the order t, ε.

    Returns:
        TensorDict of batch size [B, 1], with the entry ``valid`` beside those of a chain.

    Raises:
        ValueError: another process, a number outside its range, or a tensor of another shape.
        TypeError: x0 is no tensor, or holds integers.
    """
    require_data(x0, cond)
    require_finite("x0", x0)
    _check(process, q, k, b, P_mean, P_std)
    require_int("stage", stage, 0)
    for name, tensor, shape in (("sigma", sigma, x0.shape[:1]), ("noise", noise, x0.shape)):
        if tensor is not None and tensor.shape != shape:
            raise InputError(f"{name} has shape {tuple(tensor.shape)}, expected {tuple(shape)}")

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=x0.dtype, device=x0.device)

    t = ((P_mean + P_std * randn(len(x0))).exp() if sigma is None else sigma).view(-1, 1, 1)
    r = t_to_r(t, stage, q, k, b)
    datum, noise = x0.unsqueeze(1), (randn(*x0.shape) if noise is None else noise).unsqueeze(1)

    def state(level: Tensor) -> dict[str, Tensor]:
        one = torch.ones_like(level)
        x = datum + expand_like(level, datum) * noise
        return {keys.X_T: x, keys.T: level, keys.A: one, keys.KAPPA: torch.zeros_like(one)}

    return cut_pairs(datum, state(t), state(r), valid=r > 0, cond=cond)


class ECTPairs:
    """Pairs for a whole run, by stages of equal length; see `sample_ect_pairs`.

    The released run of 200,000 steps has 8 stages with q = 2, that of an hour one stage with q = 256.

    Args:
        process: EDM.
        stages: how many, ≥ 1, with q^stages ≤ 1e6.
        P_mean: mean of ln t.
        P_std: its standard deviation.
        q: > 1; see `t_to_r`.
        k: ≥ 0.
        b: ≥ 0.
        options: those of `diffrl.objectives.transitions.Transition`: where the second state of a pair comes from.

    Attributes:
        stage: the present one, from 0.

    Raises:
        ValueError: an argument outside its range.
    """

    @options_of(Transition)
    def __init__(
        self,
        process: EDM,
        *,
        stages: int = 8,
        P_mean: float = -1.1,
        P_std: float = 2.0,
        q: float = 2.0,
        k: float = 8.0,
        b: float = 1.0,
        **options: Any,
    ) -> None:
        _check(process, q, k, b, P_mean, P_std)
        self.stages = require_int("stages", stages, most=MAX_STEPS)
        if stages * math.log(q) > -math.log(SMALLEST_GAP):
            raise InputError(
                f"stages is {stages}, q is {q:g}: the gap of a pair, t/q^{stages}, is then less than floats resolve: "
                "lower one of them (published: q = 2 with 8 stages, q = 256 with one)"
            )
        self.process, self.P_mean, self.P_std = process, P_mean, P_std
        self.q, self.k, self.b = q, k, b
        self.transition = Transition(process, **options)
        self.set_progress(0, 1)

    def set_progress(self, step: int, grad_steps: int) -> None:
        """Stand at gradient step `step`, counted from 0, of `grad_steps`."""
        self.stage = min(step * self.stages // grad_steps, self.stages - 1)

    def __call__(self, x0: Tensor, *, cond: Tensor | None, generator: torch.Generator) -> TensorDict:
        """Pairs of data x0 [B, *E] of the present stage."""
        law: dict[str, Any] = {
            "P_mean": self.P_mean,
            "P_std": self.P_std,
            "q": self.q,
            "k": self.k,
            "b": self.b,
        }
        pairs = sample_ect_pairs(self.process, x0, stage=self.stage, cond=cond, generator=generator, **law)
        return self.transition(pairs, generator=generator)


def _check(process: Schedule, q: float, k: float, b: float, P_mean: float, P_std: float) -> None:
    if not isinstance(process, EDM):
        raise InputError(f"the process is {type(process).__name__}: ECT is defined for EDM")
    require_number("q", q, 1, ends="()")
    require_number("k", k, 0)
    require_number("b", b, 0)
    require_number("P_mean", P_mean, -15, 15)
    require_number("P_std", P_std, 0, 5)
