"""The batch of each training step, a function of seed and step: read when it is wanted, or ahead by workers."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple, Protocol

import torch
from torch import Generator, Tensor

from diffrl.data.ahead import Order, ReadAhead, made
from diffrl.data.augmentation import augment_labels, draw_augmentation, transformed
from diffrl.data.dataset import Data
from diffrl.diffusion.networks.inputs import joined_labels
from diffrl.training.loop import step_generator

__all__ = ["Batches"]


class Batch(Protocol):
    """What a batch is, of the options of a training."""

    @property
    def batch_size(self) -> int: ...
    @property
    def label_dropout(self) -> float: ...
    @property
    def augment(self) -> float: ...


class _Drawn(NamedTuple):
    """All that is random in a batch, and the samples themselves where they are fresh."""

    i: Tensor | None
    x0: Tensor | None
    labels: Tensor | None
    a: Tensor | None
    generator: Generator


class Batches:
    """Called with a step, it gives data [B, *E], their labels and the generator that the noise continues from.

    Some labels are dropped. Augmented images have labels of that too, `diffrl.diffusion.networks.inputs.joined_labels`.

    Args:
        data: to train on.
        seed: of the run.
        batch: size, share of dropped labels, and augmentation.
        num_classes: of the network; 0: it takes no labels.

    Raises:
        DataError: from a call, where a sample cannot be used.
    """

    def __init__(self, data: Data, seed: int, batch: Batch, num_classes: int) -> None:
        self.data, self.seed, self.of, self.num_classes = data, seed, batch, num_classes
        self._ahead: ReadAhead | None = None
        self._next = 0

    def __call__(self, step: int) -> tuple[Tensor, Tensor | None, Generator]:
        """The batch of a step, from whichever process has made it."""
        i, x0, labels, a, generator = self._drawn(step)
        if self._ahead is not None and step == self._next:
            x0, self._next = next(self._ahead), step + 1
        elif i is not None:
            rows = self.data.rows if self.data.train is None else self.data.train
            assert rows is not None
            x0 = made(rows, (i, a))
        elif x0 is not None and a is not None:
            x0 = transformed(x0, a)
        assert x0 is not None
        if a is not None:
            labels = joined_labels(labels, augment_labels(a).to(x0.dtype))
        return x0, labels, generator

    def _drawn(self, step: int) -> _Drawn:
        generator, n = step_generator(self.seed, step), self.of.batch_size
        i, x0, labels = self.data.numbers(n, generator), None, self.data.train_labels
        if i is None:
            x0, labels = self.data.batch(n, generator)
        elif labels is not None:
            labels = labels[i]
        if self.num_classes == 0:
            labels = None
        elif labels is not None:
            dropped = torch.rand(len(labels), generator=generator) < self.of.label_dropout
            labels = labels.masked_fill(dropped, self.num_classes)
        a = draw_augmentation(n, self.of.augment, generator) if self.of.augment else None
        return _Drawn(i, x0, labels, a, generator)

    def _orders(self, first: int, total: int) -> Iterator[Order]:
        for step in range(first, total):
            drawn = self._drawn(step)
            assert drawn.i is not None
            yield drawn.i, drawn.a

    @contextmanager
    def ahead(self, first: int, total: int) -> Iterator[None]:
        """In here workers make the batches of steps first ... total - 1, if the data ask for any.

        A step that is asked for out of its turn is made here, to the same batch.

        Raises:
            WorkerLost: from a call in here, see `ReadAhead`.
        """
        if self.data.workers == 0 or self.data.rows is None or first >= total:
            yield
            return
        self._next = first
        self._ahead = ReadAhead(self.data.rows, self.data.workers, self._orders(first, total))
        try:
            yield
        finally:
            self._ahead.close()
            self._ahead = None
