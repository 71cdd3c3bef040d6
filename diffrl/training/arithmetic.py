"""How a gradient step is computed: in how many parts, to which scale, in which memory format, compiled or not."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, get_args

from tensordict import TensorDict
from torch import channels_last, nn
from torch.nn.modules.batchnorm import _BatchNorm

from diffrl import keys
from diffrl.errors import InputError
from diffrl.objectives.denoiser_loss import DenoiserLoss
from diffrl.ranges import require_int

__all__ = ["Arithmetic", "Reduction"]

Reduction = Literal["mean", "sum", "mean_over_batch"]


@dataclass(frozen=True)
class Arithmetic:
    """How a gradient step is computed.

    What is descended is c L, with the loss L a mean over states and over the dims of each:

    | reduction | c | is published as |
    |---|---|---|
    | mean | 1 | |
    | sum | dim(E) | EDM's code: squares are summed over the dims of a sample, and averaged over the batch |
    | mean_over_batch | 1/B | TD-EDM's code: a mean is divided by the batch B, that of one GPU, once more |

    Adam and its kin divide the gradient by its own size √v, so that c would not matter but for their ε = 1e-8, which is
    added to √v: they take the steps that they would take at c = 1 with ε/c. With 1/B, ε rules wherever √v < 1e-8 B, and
    steps there are as much smaller as the gradient is. RAdam does not divide in its first steps, five at β2 = 0.999,
    which are c times as long. The norm that is reported, and clipped, is that of c L.

    Sources: Elucidating the Design Space of Diffusion-Based Generative Models (Karras et al., 2022) and its code,
    https://arxiv.org/abs/2206.00364; Temporal Difference Learning for Diffusion Models (2026) and its code,
    https://arxiv.org/abs/2606.15048.

    Args:
        accumulate: parts of a batch whose gradients are computed one after the other and added up: the same step with
            the memory of one part. Networks with dropout draw other masks then, by the same law.
        reduction: "mean", "sum" or "mean_over_batch", see above.
        channels_last: whether images and the weights of convolutions are held with their channels last, which is faster
            on some devices; numbers are the same up to rounding.
        compile: whether networks are compiled by `torch.compile` for training; numbers are the same up to rounding, but
            for the masks of dropout. The average is evaluated uncompiled.
        sharded: whether several processes cut weights, gradients, moments and averages among them, by FSDP2, see
            `diffrl.training.sharding`; one process has all of it. Numbers are the same up to rounding.

    Raises:
        ValueError: an argument outside its range.
    """

    accumulate: int = 1
    reduction: Reduction = "mean"
    channels_last: bool = False
    compile: bool = False
    sharded: bool = False

    def __post_init__(self) -> None:
        require_int("trainer.accumulate", self.accumulate)
        if self.reduction not in get_args(Reduction):
            known = ", ".join(get_args(Reduction))
            raise InputError(f"trainer.reduction is {self.reduction!r}: give one of {known}")

    def factor(self, event_shape: tuple[int, ...], batch_size: int) -> float:
        """c, of samples of shape *E and B of them in a batch."""
        return {"mean": 1.0, "sum": float(math.prod(event_shape)), "mean_over_batch": 1 / batch_size}[
            self.reduction
        ]

    def prepare(self, loss: DenoiserLoss, event_shape: tuple[int, ...]) -> None:
        """Give the networks of a loss their memory format, and have them compiled at their first call.

        Raises:
            ValueError: channels last of what has no channels; parts of a batch whose normalisation is over all of it.
        """
        own: nn.Module = loss.denoiser.network
        if self.accumulate > 1 and any(isinstance(layer, _BatchNorm) for layer in own.modules()):
            raise InputError(
                "trainer.accumulate cuts a batch that the network normalises as a whole, by a BatchNorm: set it to 1, "
                "or take a network with GroupNorm"
            )
        if self.channels_last:
            if len(event_shape) != 3:
                raise InputError(
                    f"trainer.channels_last is for images (C, H, W), not for samples of {event_shape}: set it to false"
                )
            loss.to(memory_format=channels_last)
        if self.compile:
            target: nn.Module = loss.bootstrap_network.module.denoiser.network
            for network in dict.fromkeys((own, target)):
                network.compile()

    @contextmanager
    def compiling(self) -> Iterator[None]:
        """Where networks are called first.

        Raises:
            ValueError: they cannot be compiled here: there is no compiler, for example.
        """
        try:
            yield
        except Exception as error:
            if not self.compile or not type(error).__module__.startswith("torch._"):
                raise
            reason = next(filter(None, map(str.strip, str(error).splitlines())), type(error).__name__)
            raise InputError(
                f"trainer.compile is true, but torch.compile fails here ({reason[:200]}): set it to false"
            ) from error

    def parts(self, states: TensorDict) -> list[TensorDict]:
        """States [B, K] in parts of rows, as equal as can be; those themselves if it is one.

        Raises:
            ValueError: there are more parts than rows, or a group of rows that are compared with each other is cut.
        """
        if self.accumulate == 1:
            return [states]
        if self.accumulate > len(states):
            raise InputError(
                f"trainer.accumulate is {self.accumulate}, but there are {len(states)} rows of states in a batch: "
                "give at most so many"
            )
        parts = [states[rows] for rows in _slices(len(states), self.accumulate)]
        if states.get(keys.GROUP, None) is not None:
            groups = [part[keys.GROUP].unique() for part in parts]
            if sum(map(len, groups)) > len(states[keys.GROUP].unique()):
                raise InputError(
                    f"trainer.accumulate={self.accumulate} cuts groups of rows that are compared with each other: give "
                    "a number of parts that divides the number of groups"
                )
        return parts


def _slices(rows: int, parts: int) -> list[slice]:
    ends = [rows * i // parts for i in range(parts + 1)]
    return [slice(*pair) for pair in zip(ends[:-1], ends[1:], strict=True)]
