"""Whether a classifier takes a sample for a class, yes or no, as a reward without a gradient."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from diffrl.errors import InputError
from diffrl.rewards.class_probability import logits_of
from diffrl.rewards.registry import REWARDS

__all__ = ["ClassDecision"]


@REWARDS.register("class_decision")
@dataclass(frozen=True, eq=False)
class ClassDecision:
    """The hard decision of a classifier: 1 where argmax_c logits(x)_c = y, else 0.

    It is flat wherever it does not jump, so that it tells nothing but yes or no: what a detector, a reader of text or a
    person who likes an image says. `ClassProbability` is its soft neighbour.

    Args:
        target: y.
        classifier: x [N, *E] → logits [N, C], in the mode it is in; None: `digits_cnn`, for images [N, 1, 8, 8].

    Raises:
        ValueError: a target outside the classifier's classes.
    """

    target: int
    classifier: nn.Module | None = None

    def __post_init__(self) -> None:
        if self.target < 0:
            raise InputError(f"target is {self.target}: classes are numbered from 0")

    @torch.no_grad()
    def __call__(self, x0: Tensor, cond: Any = None) -> Tensor:
        """Rewards of samples [N, *E]: 0.0 or 1.0, shape [N]."""
        logits = logits_of(self.classifier, x0)
        if self.target >= logits.shape[1]:
            raise InputError(f"the classifier has classes 0..{logits.shape[1] - 1}, not {self.target}")
        return (logits.argmax(1) == self.target).float()
