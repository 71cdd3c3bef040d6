"""λ as a function of the noise level: how much TD(λ) trusts the denoiser, and how much the data, at each state."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from tensordict import TensorDictBase
from torch import Tensor

from diffrl import keys
from diffrl.diffusion.schedules.base import Schedule
from diffrl.ranges import require_number

__all__ = ["LambdaSchedule"]


@dataclass(frozen=True)
class LambdaSchedule:
    """λ as a function of a state's noise-to-signal ratio σ/α (EDM's σ), by the log-SNR = -2 ln(σ/α).

        λ = low + u (high - low),    u = ln(nsr/nsr_low) / ln(nsr_high/nsr_low), kept in [0, 1]

    A λ-return weighs the value V of a state reached against the return G from there on, by the λ of that state. So a
    small λ at a state means that earlier states trust the denoiser there. Equal ends are a constant λ.

    Source: state-dependent λ: Reinforcement Learning: An Introduction, 2nd ed. (Sutton & Barto, 2018), §12.8,
    http://incompleteideas.net/book/the-book-2nd.html; this schedule is ours.

    Args:
        low_noise: λ ∈ [0, 1] at and below nsr_low.
        high_noise: λ ∈ [0, 1] at and above nsr_high.
        nsr_low: σ/α > 0.
        nsr_high: σ/α > nsr_low.

    Raises:
        ValueError: an argument outside its range.
    """

    low_noise: float
    high_noise: float
    nsr_low: float = 0.1
    nsr_high: float = 10.0

    def __post_init__(self) -> None:
        require_number("low_noise", self.low_noise, 0, 1)
        require_number("high_noise", self.high_noise, 0, 1)
        require_number("nsr_high", self.nsr_high, 0, ends="()")
        require_number("nsr_low", self.nsr_low, 0, self.nsr_high, "()")

    def __call__(self, log_snr: Tensor) -> Tensor:
        """λ of states of that log-SNR, infinite ones too: same shape and dtype."""
        low, high = math.log(self.nsr_low), math.log(self.nsr_high)
        u = ((-log_snr / 2 - low) / (high - low)).clamp(0, 1)
        return torch.lerp(torch.full_like(u, self.low_noise), torch.full_like(u, self.high_noise), u)

    def of_states(self, process: Schedule) -> Callable[[TensorDictBase], Tensor]:
        """λ of states of that process: a function from their TensorDict [*b] to [*b, 1]."""
        return partial(_of_states, self, process)


def _of_states(schedule: LambdaSchedule, process: Schedule, states: TensorDictBase) -> Tensor:
    return schedule(process.log_snr(states[keys.T]))
