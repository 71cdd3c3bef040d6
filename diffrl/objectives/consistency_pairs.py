"""States for consistency training: pairs at neighbouring noise levels that share one noise, on grids that grow."""

import math
from typing import Any, Literal

import torch
from tensordict import TensorDict
from torch import Tensor

from diffrl import keys
from diffrl.diffusion.posterior import posterior
from diffrl.diffusion.schedules.edm import EDM
from diffrl.errors import InputError
from diffrl.objectives.one_step import cut_pairs
from diffrl.objectives.transitions import Transition
from diffrl.ranges import MAX_STEPS, require_int, require_number
from diffrl.registry import options_of
from diffrl.shapes import expand_like, require_data, require_finite

__all__ = ["ConsistencyPairs", "num_scales", "sample_consistency_pairs", "target_decay"]


def num_scales(step: int, grad_steps: int, s_0: int = 2, s_1: int = 150) -> int:
    """How many noise levels the grid has at gradient step j of J: from 2 to s_1 + 1.

        N(j) = s(j) + 1
        s(j) = max(1, ⌈√(j/J ((s_1 + 1)² - s_0²) + s_0²) - 1⌉)

    Source: Consistency Models (Song et al., 2023), appendix C, https://arxiv.org/abs/2303.01469; the maximum:
    Temporal Difference Learning for Diffusion Models (2026), https://arxiv.org/abs/2606.15048.
    """
    s = max(1, math.ceil(math.sqrt(step / grad_steps * ((s_1 + 1) ** 2 - s_0**2) + s_0**2) - 1))
    return s + 1


def target_decay(step: int, grad_steps: int, s_0: int = 2, s_1: int = 150, mu_0: float = 0.9) -> float:
    """Decay of the target network after gradient step j of J: exp(s_0 ln mu_0 / s(j)).

    It is mu_0 where s(j) = s_0; with s_0 = 2 training begins below it, at s = 1 with mu_0². The papers write μ for
    this decay. Source: as `num_scales`.
    """
    s = num_scales(step, grad_steps, s_0, s_1) - 1
    return math.exp(s_0 * math.log(mu_0) / s)


def sample_consistency_pairs(
    process: EDM,
    x0: Tensor,
    *,
    num_scales: int,
    stride: float = 0.25,
    kappa: Literal["markov", "shared"] = "markov",
    cond: Tensor | None = None,
    index: Tensor | None = None,
    noise: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> TensorDict:
    """Pairs of states (x_t, x_t') at neighbouring levels of a grid, with one datum and one noise.

        i ~ U{0, …, N-2},    x_t = x0 + σ_i ε,    x_t' = x0 + σ_{i+1} ε
        valid: i < N-2; else x_t' lies at σ_min, where a consistency model is the identity

    A and κ are those of the steps i → min(i+Δ, N-1) and i+1 → min(i+1+Δ, N-1): as in the released code, the grid
    ends at σ_min. The published TD term has the Markov posterior's
    coefficients, A = 1 - (σ_s/σ_t)², although the pair shares its noise; "shared" has A = 1 - σ_s/σ_t.

    Source: Temporal Difference Learning for Diffusion Models (2026), https://arxiv.org/abs/2606.15048;
    Consistency Models (Song et al., 2023), Algorithm 3, https://arxiv.org/abs/2303.01469.

    Args:
        process: EDM.
        x0: clean data, floating dtype, shape [B, *E].
        num_scales: N ≥ 2.
        stride: Δ > 0, in index units.
        kappa: coupling whose coefficients A and κ the value has.
        cond: condition, shape [B, ...].
        index: i to use, integers in 0..N-2, shape [B].
        noise: ε to use, of x0's shape.
        generator: source of randomness; drawn in the order i, ε.

    Returns:
        TensorDict of batch size [B, 1], with the entry ``valid`` beside those of a chain.

    Raises:
        ValueError: another process, num_scales < 2, stride ≤ 0, another kappa, or an index outside its range.
        TypeError: x0 is no tensor, or holds integers.
    """
    require_data(x0, cond)
    require_finite("x0", x0)
    _check_pairs(process, stride, kappa)
    require_int("num_scales", num_scales, 2, MAX_STEPS)
    B, N = len(x0), num_scales
    if index is None:
        index = torch.randint(N - 1, (B,), generator=generator, device=x0.device)
    elif not (isinstance(index, Tensor) and index.shape == (B,) and _are_indices(index, N - 2)):
        raise InputError(f"index must hold {B} whole numbers in 0..{N - 2}, one for each datum")
    if noise is None:
        noise = torch.randn(x0.shape, generator=generator, dtype=x0.dtype, device=x0.device)

    datum, noise, eta = x0.unsqueeze(1), noise.unsqueeze(1), 1.0 if kappa == "markov" else 0.0

    def state(i: Tensor) -> dict[str, Tensor]:
        t = process.time(i, N)
        A, kappa_t, _ = posterior(process, t, process.time((i + stride).clamp(max=N - 1), N), eta)
        t, A, kappa_t = (c.to(x0.dtype).view(B, 1, 1) for c in (t, A, kappa_t))
        x_t = datum + expand_like(t, datum) * noise
        return {keys.X_T: x_t, keys.T: t, keys.A: A, keys.KAPPA: kappa_t, keys.INDEX: i.view(B, 1, 1)}

    valid = (index < N - 2).view(B, 1, 1)
    return cut_pairs(datum, state(index), state(index + 1), valid=valid, cond=cond)


def _are_indices(index: Tensor, most: int) -> bool:
    return not index.is_floating_point() and bool(((index >= 0) & (index <= most)).all())


class ConsistencyPairs:
    """Pairs for a whole run, on a grid that gets finer as it goes on; see `sample_consistency_pairs`.

    Args:
        process: EDM.
        s_0: s with which training begins (s + 1 levels), ≥ 1; see `num_scales`.
        s_1: s with which it ends, ≥ s_0.
        mu_0: decay of the target network where s = s_0, in (0, 1]; see `target_decay`.
        stride: Δ > 0.
        kappa: "markov", as published, or "shared".
        options: those of `diffrl.objectives.transitions.Transition`: where the second state of a pair comes from.

    Attributes:
        num_scales: N at the present step.
        target_decay: decay of the target network after the present step.

    Raises:
        ValueError: an argument outside its range.
    """

    @options_of(Transition)
    def __init__(
        self,
        process: EDM,
        *,
        s_0: int = 2,
        s_1: int = 150,
        mu_0: float = 0.9,
        stride: float = 0.25,
        kappa: Literal["markov", "shared"] = "markov",
        **options: Any,
    ) -> None:
        _check_pairs(process, stride, kappa)
        require_int("s_1", s_1, most=MAX_STEPS - 1)
        require_int("s_0", s_0, most=s_1)
        require_number("mu_0", mu_0, 0, 1, "(]")
        self.process, self.s_0, self.s_1, self.mu_0 = process, s_0, s_1, mu_0
        self.stride, self.kappa = stride, kappa
        self.transition = Transition(process, **options)
        self.set_progress(0, 1)

    def set_progress(self, step: int, grad_steps: int) -> None:
        """Stand at gradient step `step`, counted from 0, of `grad_steps`."""
        self.num_scales = num_scales(step, grad_steps, self.s_0, self.s_1)
        self.target_decay = target_decay(step, grad_steps, self.s_0, self.s_1, self.mu_0)

    def __call__(self, x0: Tensor, *, cond: Tensor | None, generator: torch.Generator) -> TensorDict:
        """A batch of pairs."""
        pairs = sample_consistency_pairs(
            self.process,
            x0,
            num_scales=self.num_scales,
            stride=self.stride,
            kappa=self.kappa,
            cond=cond,
            generator=generator,
        )
        return self.transition(pairs, generator=generator)


def _check_pairs(process: object, stride: float, kappa: str) -> None:
    if not isinstance(process, EDM):
        raise InputError(
            f"consistency training is defined on the EDM process, not on {type(process).__name__}"
        )
    require_number("stride", stride, 0, ends="()")
    if kappa not in ("markov", "shared"):
        raise InputError(f"kappa is {kappa!r}: give 'markov' (as published) or 'shared'")
