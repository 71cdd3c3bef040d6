"""Ordinary differential equations to a wanted accuracy: orders 5 and 4, with steps of its own for each row."""

from collections.abc import Callable

import torch
from torch import Tensor

from diffrl.errors import InputError
from diffrl.shapes import event_mean, expand_like

__all__ = ["integrate"]

NODES = (0.0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0)
STAGES = (
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
"""The last row is that of the step itself, so that the slope at its end is the first of the next one."""
ERROR = (71 / 57600, 0.0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40)
"""Weights of order 5 less those of order 4."""
FLOOR = 1e-13  # error that is always allowed
LEAST_STEP = 1e-12


def integrate(
    slope: Callable[[Tensor, Tensor], Tensor], x: Tensor, start: Tensor, stop: Tensor, *, rtol: float
) -> Tensor:
    """x(stop) of dx/dτ = slope(x, τ) from x(start), each row by steps of its own: it does not depend on the others.

        a step h is taken where rms(error) ≤ rtol rms(x),    h ← 0.9 h (rtol rms(x)/rms(error))^(1/5)

    Source: A Family of Embedded Runge-Kutta Formulae (Dormand & Prince, 1980), https://doi.org/10.1016/0771-050X(80)90013-3.

    Args:
        slope: (x [n, *E], τ [n]) → [n, *E], of any rows, each by itself.
        x: values at the start, float64, shape [N, *E].
        start: τ of each row, float64, shape [N].
        stop: where to, of start's shape; it may lie on either side.
        rtol: error of a step, relative to the size of the row.

    Raises:
        ValueError: values that are not finite, or an accuracy that no step gives.
    """
    if not bool(x.isfinite().all() and start.isfinite().all() and stop.isfinite().all()):
        raise InputError("the states or times hold NaN or infinity: give finite ones")
    x, tau, h = x.clone(), start.clone(), (stop - start) / 16
    first = slope(x, tau)
    rows = (tau != stop).nonzero().squeeze(1)
    while len(rows):
        left = stop[rows] - tau[rows]
        last = h[rows].abs() >= left.abs()
        step = torch.where(last, left, h[rows])
        if bool((~last & (step.abs() < LEAST_STEP)).any()):
            raise InputError(f"no step of the equation has an error of rtol {rtol:g}: give a greater rtol")
        x_new, end_slope, error = _trial(slope, x[rows], tau[rows], step, first[rows])
        off = _rms(error) / (rtol * torch.maximum(_rms(x[rows]), _rms(x_new)) + FLOOR)
        off = off.nan_to_num(nan=torch.inf)
        taken, factor = off <= 1, (0.9 * off ** (-1 / 5)).clamp(0.2, 5)
        h[rows] = step * factor
        done = rows[taken]
        x[done], first[done] = x_new[taken], end_slope[taken]
        tau[done] = torch.where(last, stop[rows], tau[rows] + step)[taken]
        rows = rows[~(taken & last)]
    return x


def _trial(
    slope: Callable[[Tensor, Tensor], Tensor], x: Tensor, tau: Tensor, h: Tensor, first: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The value at τ + h, the slope there, and the estimated error."""
    k, x_i, h_x = [first], x, expand_like(h, x)
    for node, weights in zip(NODES[1:], STAGES, strict=True):
        x_i = x + h_x * sum(w * k_j for w, k_j in zip(weights, k, strict=True) if w)
        k.append(slope(x_i, tau + node * h))
    return x_i, k[-1], h_x * sum(w * k_j for w, k_j in zip(ERROR, k, strict=True) if w)


def _rms(x: Tensor) -> Tensor:
    return event_mean(x.square(), 1).sqrt()
