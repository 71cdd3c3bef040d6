"""The error of a learnt flow map against the exact one, which is computed once for a law, its points and its levels."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from diffrl.diffusion.exact import MixtureDenoiser
from diffrl.diffusion.exact_maps import ExactFlowMap
from diffrl.diffusion.flow_maps import flow_map
from diffrl.diffusion.posterior import marginal
from diffrl.diffusion.schedules.base import Schedule
from diffrl.errors import InputError
from diffrl.metrics.distances import evaluation_noise, time_at
from diffrl.ranges import require_number

__all__ = ["MapPairs", "check_pairs", "map_error", "map_keys"]

MapPairs = Sequence[Sequence[float]]
"""Pairs (σ_t/α_t, σ_r/α_r) of noise-to-signal ratios, of which the second may be 0, clean data."""
KEPT = 16  # exact answers: each has a few megabytes


def check_pairs(pairs: MapPairs) -> list[tuple[float, float]]:
    """The pairs as tuples of floats.

    Raises:
        ValueError: one that is no pair of ratios t > r ≥ 0, or stands twice.
    """
    found: dict[str, tuple[float, float]] = {}
    for pair in pairs:
        levels = pair if isinstance(pair, list | tuple) else ()
        numbers = [require_number("map_pairs", level, 0) for level in levels]
        if not (len(numbers) == 2 and numbers[0] > numbers[1]):
            raise InputError(f"map_pairs holds {pair!r}: give pairs [t, r] of ratios σ/α, t > r >= 0")
        t, r = numbers
        if (key := _key(t, r)) in found:
            raise InputError(f"map_pairs holds {key} twice: give each pair once")
        found[key] = (t, r)
    return list(found.values())


def map_keys(denoiser: Any, pairs: MapPairs, *, to_clean: bool | None = None) -> list[str]:
    """The keys of `map_error`: of all pairs for a denoiser of two times, of those to r = 0 for consistency models."""
    return [_key(*pair) for pair in _known(pairs, *_kind(denoiser, to_clean))]


def _kind(denoiser: Any, to_clean: bool | None) -> tuple[bool, bool]:
    """Whether it is asked as X_{t→r}, and whether as X_{t→0}."""
    second = bool(getattr(denoiser, "second_time", False))
    if to_clean is None:
        to_clean = not second and getattr(denoiser, "prediction_type", None) == "consistency"
    return second and not to_clean, to_clean


def _known(pairs: MapPairs, second: bool, to_clean: bool) -> list[tuple[float, float]]:
    return [(t, r) for t, r in check_pairs(pairs) if second or (to_clean and r == 0)]


def map_error(
    denoiser: Callable[..., Tensor],
    oracle: MixtureDenoiser,
    x0: Tensor,
    pairs: MapPairs,
    *,
    to_clean: bool | None = None,
    seed: int = 0,
    batch_size: int = 1024,
) -> dict[str, float]:
    """Mean squared error of a flow map against the exact one of the probability-flow ODE.

        mean over points of ‖X_{t→r}(x_t) - X*_{t→r}(x_t)‖²/(α_r² dim(E)),    x_t = α_t x0 + σ_t ε

    This is in units of the data squared, on every process: over the data's variance σd² it is the share of it that the
    map gets wrong. The levels of one t cost one integration of the ODE (some 500 evaluations of the exact denoiser for
    each point); the answers are kept in memory. The noise is that of `value_error`. A consistency model is f(x, t) ≈
    X_{t→0}.

    Args:
        denoiser: of two times, on the oracle's process, or a consistency model; in the mode it is in.
        oracle: the exact denoiser of the law.
        x0: clean points, shape [M, *E].
        pairs: noise-to-signal ratios (σ_t/α_t, σ_r/α_r), t > r ≥ 0; those for which the denoiser has no map are left
            out. A discrete process takes its nearest times.
        to_clean: whether f(x, t) is meant as X_{t→0}, and as no other map; None: where its prediction_type is
            "consistency".
        seed: of the noise.
        batch_size: number of points that go through the network side by side.

    Returns:
        The error of each pair, by the key ``f"{t:g}->{r:g}"``.

    Raises:
        ValueError: a pair that is none, or out of reach of a discrete process.
    """
    second, to_clean = _kind(denoiser, to_clean)
    wanted = _known(pairs, second, to_clean)
    if not wanted:
        return {}
    process, levels = oracle.process, tuple(sorted(wanted, reverse=True))
    exact = _exact(_Question.of(oracle, x0, levels, seed))
    X = partial(flow_map, denoiser) if second else _ignoring_r(denoiser)
    return {_key(*pair): _error(X, process, x0, pair, exact, batch_size) for pair in wanted}


def _ignoring_r(denoiser: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda x, t, r: denoiser(x, t)


@dataclass(frozen=True)
class _Question:
    """What an exact answer depends on, known by its bits."""

    bits: str
    process: Schedule
    levels: tuple[tuple[float, float], ...]
    seed: int
    oracle: MixtureDenoiser = field(compare=False)
    x0: Tensor = field(compare=False)

    @classmethod
    def of(
        cls, oracle: MixtureDenoiser, x0: Tensor, levels: tuple[tuple[float, float], ...], seed: int
    ) -> "_Question":
        digest = hashlib.sha256(f"{x0.device}{tuple(x0.shape)}".encode())
        for x in (x0, oracle.means, oracle.stds, oracle.log_weights):
            digest.update(x.detach().double().cpu().contiguous().numpy().data)
        return cls(digest.hexdigest(), oracle.process, levels, seed, oracle, x0.double())


_Answer = dict[str, Tensor]


@lru_cache(maxsize=KEPT)
@torch.no_grad()
def _exact(question: _Question) -> _Answer:
    """x_t by ``"t"``, and X* by ``"t->r"``, float64: each r of a t from the one before it."""
    process, x0 = question.process, question.x0
    exact, noise = ExactFlowMap(question.oracle), evaluation_noise(x0, question.seed)
    found: _Answer = {}
    for t, pairs in groupby(question.levels, key=lambda pair: pair[0]):
        x, time = None, _time(process, t, x0)
        x = found[f"{t:g}"] = marginal(process, x0, time, noise)
        for _, r in pairs:
            reached = _time(process, r, x0)
            x, time = exact.map(x, time, reached), reached
            found[_key(t, r)] = x
    return found


@torch.no_grad()
def _error(
    X: Callable[..., Tensor],
    process: Schedule,
    x0: Tensor,
    pair: tuple[float, float],
    exact: _Answer,
    batch_size: int,
) -> float:
    t, r = (_time(process, level, x0) for level in pair)
    total = 0.0
    for first in range(0, len(x0), batch_size):
        part = slice(first, first + batch_size)
        x_t = exact[f"{pair[0]:g}"][part].to(x0)
        t_x, r_x = t[part].to(x0), r[part].to(x0)
        total += float((X(x_t, t_x, r_x).double() - exact[_key(*pair)][part]).square().sum())
    return total / (x0.numel() * float(process.alpha(r[0])) ** 2)


def _time(process: Schedule, sigma: float, x0: Tensor) -> Tensor:
    """The time of a ratio σ/α for each point, float64 [M]; 0 is the clean end."""
    clean = torch.tensor(process.t_clean, dtype=torch.float64)
    return (time_at(process, sigma) if sigma > 0 else clean).to(x0.device).expand(len(x0))


def _key(t: float, r: float) -> str:
    return f"{t:g}->{r:g}"
