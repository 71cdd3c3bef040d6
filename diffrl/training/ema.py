"""Moving average of a network's parameters, for evaluation; a target network is something else."""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from diffrl.errors import InputError
from diffrl.ranges import require_int

__all__ = ["EMA", "Average"]


class EMA:
    """Exponential moving average θ̄ of the parameters θ, with a half-life counted in training samples.

        h = min(halflife, ramp · n),    β = 0.5^(samples / h),    θ̄ ← β θ̄ + (1 - β) θ,    n ← n + samples

    n is the number of samples seen before the update: with a warm-up the first update copies θ, and the
    random start is forgotten. Buffers are copied at every update.

    Source: Elucidating the Design Space of Diffusion-Based Generative Models (Karras et al., 2022), appendix
    F, https://arxiv.org/abs/2206.00364; the warm-up is their released training loop's.

    Args:
        module: the network in training, already on its device; its parameters are read at every update.
        halflife_samples: samples after which an old value weighs one half, counted as `update` counts them;
            0 keeps no history.
        ramp: greatest half-life as a fraction of the samples seen so far, above 0; None for no warm-up.

    Attributes:
        module: the averaged copy, in evaluation mode and without gradients.
        samples: n, the samples seen so far.

    Raises:
        ValueError: a negative half-life, a ramp not above 0, or parameters in half precision.
    """

    def __init__(self, module: nn.Module, halflife_samples: float, ramp: float | None = 0.05) -> None:
        if not halflife_samples >= 0:
            raise InputError(f"halflife_samples must be 0 or more, not {halflife_samples}")
        if ramp is not None and not ramp > 0:
            raise InputError(f"ramp must be above 0, or None for no warm-up, not {ramp}")
        for name, parameter in module.named_parameters():
            if parameter.dtype in (torch.bfloat16, torch.float16):
                raise InputError(
                    f"parameter {name} is {parameter.dtype}, which rounds away an average's small steps: "
                    "keep parameters in float32 and compute under torch.autocast"
                )
        self.halflife_samples, self.ramp, self.samples = float(halflife_samples), ramp, 0
        self.module = copy.deepcopy(module).eval().requires_grad_(False)
        self._parameters: list[Tensor] = list(module.parameters())
        self._averages: list[Tensor] = list(self.module.parameters())
        # by name, as a module may put another tensor in a buffer's place
        self._buffers = [
            (average, source, name)
            for average, source in zip(self.module.modules(), module.modules(), strict=True)
            for name, _ in source.named_buffers(recurse=False)
        ]

    def follow(self, parameters: Sequence[Tensor], averages: Sequence[Tensor]) -> None:
        """Move these averages towards these parameters from now on, such as parts of those of the modules."""
        self._parameters, self._averages = [*parameters], [*averages]

    def new_weight(self, samples: int) -> float:
        """1 - β, the weight of θ in the next update, if it follows `samples` further samples."""
        halflife = self.halflife_samples
        if self.ramp is not None:
            halflife = min(halflife, self.ramp * self.samples)
        return -math.expm1(-math.log(2.0) * samples / halflife) if halflife > 0 else 1.0

    @torch.no_grad()
    def update(self, samples: int) -> None:
        """Takes in the parameters after a step on `samples` samples.

        Raises:
            ValueError: `samples` below 1.
        """
        if samples < 1:
            raise InputError(f"samples must be at least 1, not {samples}")
        torch._foreach_lerp_(self._averages, self._parameters, self.new_weight(samples))
        for average, source, name in self._buffers:
            getattr(average, name).copy_(getattr(source, name))
        self.samples += samples

    def state_dict(self) -> dict[str, Any]:
        """`{"samples": n, "module": the averaged weights}`; the weights are references, not copies."""
        return {"samples": self.samples, "module": self.module.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes a state of `state_dict`, bit for bit.

        Raises:
            RuntimeError: the weights are of another network.
        """
        weights: dict[str, Tensor] = state["module"]
        self.module.load_state_dict(weights)
        self.samples = int(state["samples"])


@dataclass(frozen=True)
class Average:
    """The moving average of the weights that is evaluated; see `EMA`.

    Args:
        halflife: in data (not states) seen.
        ramp: greatest half-life as a share of the data seen so far; None for no warm-up.
        also: further half-lives, whole numbers of data, whose averages are kept beside that one, saved as the weights
            "ema_500000" for 500000, and evaluated at the end.

    Raises:
        ValueError: a further half-life that is no whole number of at least 1, or is there twice.
    """

    halflife: float = 2000.0
    ramp: float | None = 0.05
    also: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for halflife in self.also:
            require_int("ema.also", halflife)
        if len({self.halflife, *self.also}) <= len(self.also):
            raise InputError(
                f"ema.also is {list(self.also)} beside ema.halflife={self.halflife:g}: give each half-life once"
            )

    def averages(self, module: nn.Module) -> dict[str, EMA]:
        """Of a module in training, by the names of their weights, "ema" first."""
        halflives = {"ema": self.halflife, **{f"ema_{halflife}": halflife for halflife in self.also}}
        return {name: EMA(module, halflife, self.ramp) for name, halflife in halflives.items()}
