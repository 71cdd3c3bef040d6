"""One time for both straight processes: that of `Flow` at the same σ/α, for rules that papers state in it."""

import torch
from torch import Tensor

from diffrl.diffusion.schedules.base import Schedule

__all__ = ["at_flow_time", "flow_time", "midpoint"]


def flow_time(process: Schedule, t: Tensor) -> Tensor:
    """The time f = σ/(α + σ) ∈ [0, 1] at which `Flow` has the ratio σ/α that the process has at t; on `Flow` f = t."""
    alpha, sigma = process.alpha(t), process.sigma(t)
    return sigma / (alpha + sigma)


def at_flow_time(process: Schedule, f: Tensor) -> Tensor:
    """The time t at which σ/α = f/(1-f), the inverse of `flow_time`; f = 1 is for `Flow` alone."""
    return process.t_from_log_snr(-2 * torch.logit(f))


def midpoint(process: Schedule, t: Tensor, r: Tensor) -> Tensor:
    """The time halfway from t to r: (t + r)/2 on `Flow`, and there at the same σ/α on `EDM`."""
    return at_flow_time(process, (flow_time(process, t) + flow_time(process, r)) / 2)
