"""Rows by number that stay where they are stored: parts of them, and mirror images as numbers of their own."""

from abc import ABC, abstractmethod
from dataclasses import replace
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["NumberedRows"]


class NumberedRows(ABC):
    """Samples of which nothing is read but those that are asked for; a subclass is a dataclass with `index`."""

    index: NDArray[np.int64]
    """Numbers of the rows where they are stored, int64 [N]; ~i = -1-i is the mirror image of row i."""

    @abstractmethod
    def _read(self, rows: NDArray[np.int64]) -> Tensor:
        """Rows by their numbers, float32 [n, *E]."""

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, i: Tensor) -> Tensor:
        """Samples of these numbers, int64 [n] in 0..N-1: float32 [n, *E].

        Raises:
            DataError: a sample cannot be used.
        """
        numbers = self.index[i.numpy()]
        x = self._read(np.where(numbers < 0, ~numbers, numbers))
        mirrored = torch.from_numpy(numbers < 0)
        x[mirrored] = x[mirrored].flip(-1)
        return x

    @property
    def _stored(self) -> NDArray[np.int64]:
        """Numbers of all rows that are read, each once and in order."""
        return np.unique(np.where(self.index < 0, ~self.index, self.index))

    def take(self, i: Tensor) -> Self:
        """The rows of these numbers, int64 [n] in 0..N-1, and no others; nothing is read."""
        return self._with(self.index[i.numpy()])

    def with_mirrors(self) -> Self:
        """These rows, and behind them their mirror images."""
        return self._with(np.concatenate([self.index, ~self.index]))

    def _with(self, index: NDArray[np.int64]) -> Self:
        of: Any = self
        rows: Self = replace(of, index=index)
        return rows
