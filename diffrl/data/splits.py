"""Which samples of a set are held out as test samples, by a rule that can be told and a hash that can be compared."""

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from diffrl.data.image_files import DataError

__all__ = ["Split", "last", "spaced"]


@dataclass(frozen=True)
class Split:
    """What is held out.

    Args:
        rule: which samples, in words.
        train: how many samples there are to train on, without mirror images.
        test: how many are held out.
        indices: 16 hexadecimal digits of SHA-256 of the numbers of the held-out samples in their file, from 0 and in
            order, each as 8 bytes, the lowest first.
    """

    rule: str
    train: int
    test: int
    indices: str

    @classmethod
    def of(cls, rule: str, is_test: Tensor, train: int | None = None) -> "Split":
        """By a mask [N] of the held-out samples; `train` says how many there are elsewhere, if not in this file."""
        indices = is_test.nonzero()[:, 0]
        digest = hashlib.sha256(indices.numpy().astype("<i8").tobytes()).hexdigest()
        return cls(rule, len(is_test) - len(indices) if train is None else train, len(indices), digest[:16])

    def __str__(self) -> str:
        return f"{self.rule} ({self.train:,} to train on, {self.test:,} held out, indices {self.indices})"


def last(N: int, fraction: float) -> tuple[Tensor, str]:
    """The last round(f N) of N samples: a mask [N], and the rule in words.

    Raises:
        DataError: f is not in (0, 1).
    """
    _check(fraction)
    n = round(fraction * N)
    return torch.arange(N) >= N - n, f"the last {n:,} of {N:,} samples"


def spaced(N: int, fraction: float) -> tuple[Tensor, str]:
    """Every sample i of N with ⌊(i+1) f⌋ > ⌊i f⌋: a mask [N], and the rule in words.

    Raises:
        DataError: f is not in (0, 1).
    """
    _check(fraction)
    i = torch.arange(N, dtype=torch.float64)
    # 1e-9: a product such as 0.1·30 counts as whole
    mask = ((i + 1) * fraction + 1e-9).floor() > (i * fraction + 1e-9).floor()
    return mask, f"every sample i of {N:,} with ⌊(i+1) f⌋ > ⌊i f⌋, f = {fraction:g}"


def _check(fraction: float) -> None:
    if not (isinstance(fraction, float | int) and 0 < fraction < 1):
        raise DataError(f"test_fraction is {fraction!r}; it must lie between 0 and 1")
