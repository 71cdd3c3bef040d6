"""The share of a class among the real digits nearest to an image, as a reward."""

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from diffrl.data.files import digits
from diffrl.errors import InputError
from diffrl.rewards.registry import REWARDS

__all__ = ["ClassNeighbours"]


@cache
def _labelled_digits() -> tuple[Tensor, Tensor]:
    data = digits(conditional=True)
    assert data.train is not None and data.train_labels is not None
    return data.train, data.train_labels


@REWARDS.register("class_neighbours")
@dataclass(frozen=True)
class ClassNeighbours:
    """Share of a class among the k real digits nearest to an image, in [0, 1]: a second opinion on digits.

    A policy can learn to fool a classifier with images that are no digits. This reward has no weights to fool: use it
    to see whether that has happened.

    Args:
        target: the class, 0 to 9.
        k: neighbours, in Euclidean distance, among scikit-learn's training digits.

    Raises:
        ValueError: an argument outside its range; when called, samples that are no 8 × 8 images.
        MissingExtra: when called, scikit-learn is not installed.
    """

    target: int
    k: int = 10

    def __post_init__(self) -> None:
        if not 0 <= self.target <= 9 or self.k < 1:
            raise InputError(f"target is {self.target} and k {self.k}: give a class in 0..9 and k >= 1")

    def __call__(self, x0: Tensor, cond: Any = None) -> Tensor:
        """Rewards of images [N, 1, 8, 8] in [-1, 1]: floats [N]."""
        if x0.shape[1:] != (1, 8, 8):
            raise InputError(f"samples have shape {tuple(x0.shape)}: this reward is for digits [N, 1, 8, 8]")
        real, labels = _labelled_digits()
        near = torch.cdist(x0.cpu().float().flatten(1), real.flatten(1)).topk(self.k, largest=False).indices
        return (labels[near] == self.target).float().mean(1).to(x0.device)
