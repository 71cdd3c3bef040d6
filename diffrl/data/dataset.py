"""What a data set is: points to evaluate on, and batches to train on."""

import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Generator, Tensor

from diffrl.data.image_files import DataError, check_finite
from diffrl.data.mixtures import Mixture
from diffrl.data.splits import Split
from diffrl.errors import InputTypeError
from diffrl.ranges import require_int
from diffrl.shapes import require_floating

__all__ = ["Data", "Rows", "pieces"]

# sigma_data of a set without a known law comes from a random stream of its own, which no small user seed shares
SIGMA_SEED = 3_812_015_801
SIGMA_ROWS = 4096  # of rows that stay where they are stored
AT_ONCE = 256


class Rows(Protocol):
    """Training samples that stay where they are stored until they are drawn; `i` are their numbers, int64 [n]."""

    def __len__(self) -> int: ...
    def __getitem__(self, i: Tensor, /) -> Tensor:
        """Samples, float32 [n, *E]."""
        ...

    def take(self, i: Tensor) -> "Rows":
        """Those rows and no others."""
        ...

    def digest(self) -> bytes:
        """SHA-256 of all rows, in their order."""
        ...


@dataclass(frozen=True, eq=False, repr=False)
class Data:
    """A data set: points to evaluate on, and batches to train on.

    Batches come from `train` or `rows`, whose rows are drawn uniformly with replacement. If both are None, they are
    fresh points of `mixture`, or of `draw`. All tensors are on the CPU, and samples float32, as those of files are:
    other floating dtypes are converted. A network in float64 takes ``x0.double()``, which `Trainer` does itself.

    Args:
        name: name of the set in results.
        test: points that are never trained on, shape [M, *E]; images lie in [-1, 1]. The denoising error is taken on
            them, and value error and sample distance where `train` is None; with `train` these are taken on its rows.
        test_labels: their classes, int64 [M].
        train: points to train on, [N, *E]; None if batches are fresh draws, or come from `rows`.
        train_labels: their classes, int64 [N].
        num_classes: C, for labels in 0..C-1; 0 if there are no labels.
        mixture: the exact law, where it is known.
        draw: `draw(n, generator)` gives n fresh points.
        classes: names of the C classes; none: they are called by their numbers.
        rows: in place of `train`, points that do not fit in memory; what needs them all at once (the exact denoiser
            and what is measured against it, exact targets) is then refused or left out.
        mirrored: the second half of the training samples are the mirror images of the first, in the same order, so that
            what holds out one of a pair holds out both.
        split: which samples were held out as test samples; None where nothing is, as batches are fresh draws.
        workers: processes that read `rows` ahead of the training, each batch in one of them; 0: the training reads.
            The rows must be such as can be pickled. Their number changes no batch.

    Raises:
        TypeError: the name is no text, or test, train or what `draw` gives no tensor of a floating dtype.
        DataError: there is nothing to draw from, shapes or labels do not fit, or the data hold NaN or infinity, or
            one single value.
    """

    name: str
    test: Tensor
    test_labels: Tensor | None = None
    train: Tensor | None = None
    train_labels: Tensor | None = None
    num_classes: int = 0
    mixture: Mixture | None = None
    draw: Callable[[int, Generator | None], Tensor] | None = None
    classes: tuple[str, ...] = ()
    rows: Rows | None = None
    mirrored: bool = False
    split: Split | None = None
    workers: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.name, str):
            raise InputTypeError(
                f'name is a {type(self.name).__name__}: give a text, Data("mine", test=..., train=...)'
            )
        if self.num_train is None and self.mixture is None and self.draw is None:
            raise DataError(f"{self.name}: nothing to train on; give train, rows, mixture or draw")
        if self.train is not None and self.rows is not None:
            raise DataError(f"{self.name}: give train or rows, not both")
        if require_int("workers", self.workers, 0) and self.rows is None:
            raise DataError(
                f"{self.name}: `workers` is {self.workers}, but its samples are in memory, where nothing is left to be "
                "decoded: set `mapped` to true, or `workers` to 0"
            )
        parts = (("test", self.test, self.test_labels), ("train", self.train, self.train_labels))
        for part, x, labels in parts:
            where = f"{self.name} ({part})"
            if x is None:
                continue
            x = _float32(where, x)
            object.__setattr__(self, part, x)
            if x.ndim < 2 or x.shape[0] == 0 or x.shape[1:] != self.test.shape[1:]:
                raise DataError(
                    f"{where}: shape {tuple(x.shape)} does not fit samples of {tuple(self.test.shape[1:])}"
                )
            check_finite(x, where)
            self._check_labels(labels, len(x), where)
        if self.rows is not None:
            where, x = f"{self.name} (rows)", self.rows[torch.zeros(1, dtype=torch.int64)]
            if x.shape[1:] != self.test.shape[1:]:
                raise DataError(f"{where}: samples of {tuple(x.shape[1:])} do not fit {self.event_shape}")
            if x.dtype != torch.float32:
                raise DataError(f"{where}: samples have dtype {x.dtype}: let them be float32")
            self._check_labels(self.train_labels, len(self.rows), where)
        if self.classes and len(self.classes) != self.num_classes:
            raise DataError(f"{self.name}: {len(self.classes)} names for {self.num_classes} classes")
        if self.sigma_data < 1e-9:
            raise DataError(f"{self.name}: every value is the same; there is nothing to learn")

    def __repr__(self) -> str:
        """Its name and sizes; the points themselves would fill pages."""
        train = "fresh draws" if self.num_train is None else f"{self.num_train} to train on"
        classes = f", {self.num_classes} classes" if self.num_classes else ""
        return f"Data({self.name!r}, samples {tuple(self.event_shape)}, {train}, {len(self.test)} held out{classes})"

    def _check_labels(self, labels: Tensor | None, n: int, where: str) -> None:
        if (labels is None) != (self.num_classes == 0):
            raise DataError(f"{where}: labels and num_classes={self.num_classes} contradict each other")
        if labels is not None and (
            labels.dtype != torch.int64
            or labels.shape != (n,)
            or int(labels.min()) < 0
            or int(labels.max()) >= self.num_classes
        ):
            raise DataError(f"{where}: labels must be {n} int64 numbers in 0..{self.num_classes - 1}")

    @property
    def num_train(self) -> int | None:
        """How many training samples there are; None if batches are fresh draws."""
        found = self.rows if self.train is None else self.train
        return None if found is None else len(found)

    @property
    def event_shape(self) -> tuple[int, ...]:
        """*E, the shape of one sample."""
        return tuple(self.test.shape[1:])

    @cached_property
    def sigma_data(self) -> float:
        """Standard deviation over all samples and dims: of `train`, of the law, or of 100,000 fixed draws.

        Of `rows` it is that of 4,096 of them, evenly spaced, or of all if there are no more.
        """
        if self.rows is not None:
            i = torch.linspace(0, len(self.rows) - 1, min(len(self.rows), SIGMA_ROWS), dtype=torch.float64)
            return _std(pieces(self.rows.take(i.round().long())))
        if self.train is None and self.mixture is not None:
            return self.mixture.sigma_data
        x = self.train
        if x is None:
            assert self.draw is not None
            x = self.draw(100_000, Generator().manual_seed(SIGMA_SEED))
        return float(x.double().std(correction=0))

    @cached_property
    def class_shares(self) -> tuple[float, ...]:
        """Share of each class among the training samples; empty without labels."""
        labels = self.test_labels if self.train_labels is None else self.train_labels
        if labels is None:
            return ()
        counts = labels.bincount(minlength=self.num_classes)
        return tuple((counts.double() / len(labels)).tolist())

    @cached_property
    def fingerprint(self) -> str:
        """What is trained on, in 16 hexadecimal digits of SHA-256: equal for equal data on every machine.

        Of a finite set: shapes, dtypes and bytes of `train` and its labels, and `num_classes`; of `rows` their digest,
        for which they are read once. Of a known law: its means, stds and weights. Of another law: 64 fixed draws, to
        two decimals of `sigma_data`.
        """
        if self.num_train is not None:
            parts = [x for x in (self.train, self.train_labels) if x is not None]
        elif self.mixture is not None:  # float32 forgets the last digits, in which machines differ
            parts = [a.float() for a in (self.mixture.means, self.mixture.stds, self.mixture.weights)]
        else:
            assert self.draw is not None
            x = self.draw(64, Generator().manual_seed(SIGMA_SEED))
            parts = [(100 * x / self.sigma_data).round().to(torch.int64)]
        digest = hashlib.sha256(str(self.num_classes).encode())
        for part in parts:
            digest.update(f"{part.dtype}{tuple(part.shape)}".encode())
            digest.update(part.detach().cpu().contiguous().numpy().data)
        if self.rows is not None:
            digest.update(self.rows.digest())
        return digest.hexdigest()[:16]

    def numbers(self, n: int, generator: Generator | None = None) -> Tensor | None:
        """Which training samples the next batch is made of, int64 [n]; None if it is fresh draws.

        Raises:
            DataError: n < 1, or more than there are training samples.
        """
        if n < 1:
            raise DataError(f"batch_size {n}: a batch needs at least one sample")
        N = self.num_train
        if N is None:
            return None
        if n > N:
            raise DataError(f"{self.name}: batch_size {n} > {N} training samples; lower batch_size")
        return torch.randint(N, (n,), generator=generator)

    def batch(self, n: int, generator: Generator | None = None) -> tuple[Tensor, Tensor | None]:
        """Draw a training batch.

        Args:
            n: batch size B ≥ 1.
            generator: of the CPU.

        Returns:
            x0, float32 [n, *E], and labels [n] or None.

        Raises:
            DataError: n < 1, or more than there are training samples; or `rows` hold a fault that is met now.
        """
        i, rows = self.numbers(n, generator), self.rows if self.train is None else self.train
        if i is not None and rows is not None:
            return rows[i], None if self.train_labels is None else self.train_labels[i]
        if self.mixture is not None:
            return self.mixture.sample(n, generator).float(), None
        assert self.draw is not None
        return _float32(f"{self.name} (draw)", self.draw(n, generator)), None


def _float32(name: str, x: Tensor) -> Tensor:
    """Samples as training takes them; numpy makes float64 of what nobody gave a dtype."""
    require_floating([(name, x)])
    return x.float()


def pieces(rows: Rows) -> Iterator[Tensor]:
    """All of them in their order, a few at a time: float32 [≤ 256, *E]."""
    for i in torch.arange(len(rows)).split(AT_ONCE):
        yield rows[i]


def _std(parts: Iterator[Tensor]) -> float:
    """√(E[(x - c)²] - E[x - c]²) over all values, with c the mean of the first part."""
    n, first, second, c = 0, 0.0, 0.0, None
    for part in parts:
        x = part.double()
        c = x.mean() if c is None else c
        n, first, second = n + x.numel(), first + float((x - c).sum()), second + float((x - c).square().sum())
    return math.sqrt(max(second / n - (first / n) ** 2, 0.0))
