"""What is known of the law of x0 given x_t: by a batch of reference data, or exactly."""

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from diffrl.data.dataset import Data
from diffrl.diffusion.exact import MixtureDenoiser
from diffrl.diffusion.schedules.base import Schedule
from diffrl.errors import InputError

__all__ = ["ExactLaw", "ReferenceBatch", "X0Law", "exact_x0_law", "reference_mean"]


NUMBERS = 2**22  # weights that are held at once


class X0Law(Protocol):
    """The law of x0 given x_t, or an estimate of it."""

    def mean(self, x_t: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
        """E[x0 | x_t] for states [N, *E] at times [N], with labels [N] or none; shape and dtype of x_t."""
        ...

    def draw(
        self, x_t: Tensor, t: Tensor, cond: Tensor | None = None, *, generator: torch.Generator | None = None
    ) -> Tensor:
        """One draw of x0 given each x_t, independent given x_t; shape and dtype of x_t."""
        ...


class ReferenceBatch:
    """The law of x0 given x_t if the data were a batch of reference rows: the Stable Target Field.

        S(x_t) = Σ_j softmax_j(-‖x_t - α_t x_j‖²/(2σ_t²)) x_j

    If the rows are independent draws of the data, and x_t was made from one of them, then E[S(x_t) | x_t] = E[x0 | x_t]
    for *every* number of rows: given x_t and the rows in any order, the softmax is the probability of each to be x0,
    so S = E[x0 | x_t, rows], and a mean of conditional means is the mean. For the same reason a row drawn by the
    softmax is distributed as x0 given x_t. Without x0 among the rows neither holds. One row gives x0; with many, S
    tends to E[x0 | x_t].

    States with a label see the rows with that label only, and those with the null label all rows.
    Distances and weights are float64, for so many states at once as memory holds well.

    Source: Stable Target Field for Reduced Variance Score Estimation in Diffusion Models (Xu et al., 2023),
    https://arxiv.org/abs/2302.00670, where the bias is said to vanish with the number of rows; that it is none is ours.

    Args:
        process: noise schedule.
        rows: x_j, shape [n, *E].
        labels: of the rows, integers [n]; any value outside 0..num_classes-1 is not known.
        num_classes: C; a state of label C has none.

    Raises:
        ValueError: there is no row, or not one label for each.
    """

    def __init__(
        self, process: Schedule, rows: Tensor, labels: Tensor | None = None, num_classes: int = 0
    ) -> None:
        if len(rows) == 0:
            raise InputError("a reference batch needs one row at least")
        if labels is not None and labels.shape != rows.shape[:1]:
            raise InputError(f"labels have shape {tuple(labels.shape)}, expected {tuple(rows.shape[:1])}")
        self.process, self.num_classes = process, num_classes
        self._rows, self._labels = rows.double().flatten(1), labels
        self._of_label: dict[int, Tensor] = {}

    def mean(self, x_t: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
        """S(x_t) for states [N, *E] at noisy times [N], with labels [N] or none; shape and dtype of x_t."""
        S = torch.empty_like(x_t)
        for here, p, rows in self._weights(x_t, t, cond):
            S[here] = (p @ rows).to(x_t.dtype).view(-1, *x_t.shape[1:])
        return S

    def draw(
        self, x_t: Tensor, t: Tensor, cond: Tensor | None = None, *, generator: torch.Generator | None = None
    ) -> Tensor:
        """One row for each state, drawn by the softmax; shape and dtype of x_t."""
        drawn = torch.empty_like(x_t)
        for here, p, rows in self._weights(x_t, t, cond):
            j = torch.multinomial(p, 1, generator=generator).squeeze(1)
            drawn[here] = rows[j].to(x_t.dtype).view(-1, *x_t.shape[1:])
        return drawn

    def _weights(
        self, x_t: Tensor, t: Tensor, cond: Tensor | None
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Block by block: which states, the softmax over the rows that they see, and these rows."""
        alpha, sigma = self.process.alpha(t.double())[:, None], self.process.sigma(t.double())[:, None]
        x = x_t.double().flatten(1) * alpha / sigma**2
        for states, rows in self._seen(len(x_t), cond):
            half_squares = (rows**2).sum(1) / 2
            for here in states.split(max(1, NUMBERS // len(rows))):
                # -‖x_t - α x_j‖²/(2σ²) without ‖x_t‖², which is the same for all j
                logits = x[here] @ rows.T - (alpha[here] / sigma[here]) ** 2 * half_squares
                yield here, logits.softmax(1), rows

    def _seen(self, N: int, cond: Tensor | None) -> Iterator[tuple[Tensor, Tensor]]:
        """States by the rows that they see."""
        if cond is None or self._labels is None:
            yield torch.arange(N, device=self._rows.device), self._rows
            return
        if cond.is_floating_point() or cond.ndim != 1:
            raise InputError(
                f"cond has dtype {cond.dtype} and shape {tuple(cond.shape)}: a reference batch knows labels only, "
                "one whole number for each state"
            )
        for label in cond.unique().tolist():
            yield (cond == label).nonzero().squeeze(1), self._rows_of(label)

    def _rows_of(self, label: int) -> Tensor:
        if label == self.num_classes:
            return self._rows
        if label not in self._of_label:
            rows = self._rows[self._labels == label]
            if len(rows) == 0:
                raise InputError(f"no row of the reference batch has label {label}, but a state has")
            self._of_label[label] = rows
        return self._of_label[label]


class ExactLaw:
    """The law of x0 given x_t of data that are a mixture.

    Args:
        denoiser: the exact denoiser of the mixture.
    """

    def __init__(self, denoiser: MixtureDenoiser) -> None:
        self.denoiser = denoiser

    def mean(self, x_t: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
        """E[x0 | x_t] for states [N, *E] at times [N]; a mixture has no labels, so cond is not read."""
        return self.denoiser(x_t, t)

    def draw(
        self, x_t: Tensor, t: Tensor, cond: Tensor | None = None, *, generator: torch.Generator | None = None
    ) -> Tensor:
        """One draw of x0 given each x_t."""
        return self.denoiser.sample_posterior(x_t, t, 1, generator)[:, 0]


def exact_x0_law(process: Schedule, data: Data, device: torch.device | str = "cpu") -> X0Law:
    """The law of x0 given x_t of a data set: of the known law, or else of its training rows, which it memorises.

    Training draws from these rows, so their law is what the loss is about: its minimum is the memorising denoiser.

    Args:
        process: noise schedule.
        data: the data set.
        device: where the states are.

    Raises:
        ValueError: the data are drawn from a law that is not known, or stay in a file.
    """
    if data.rows is not None:
        raise InputError(
            f"{data.name} has its rows in a file, and what is exact needs them all in memory: give "
            "data.mapped=false, or a reference batch (chain.x0=reference chain.reference=2048)"
        )
    if data.mixture is not None:
        m = data.mixture
        return ExactLaw(MixtureDenoiser(process, m.means, m.stds, m.weights).to(device))
    if data.train is None:
        raise InputError(
            f"the law of {data.name} is not known, so that nothing exact is: give a mixture (data=gmm), data of "
            "finitely many rows, or a reference batch (chain.x0=reference chain.reference=2048)"
        )
    labels = None if data.train_labels is None else data.train_labels.to(device)
    return ReferenceBatch(process, data.train.to(device), labels, data.num_classes)


def reference_mean(process: Schedule, x_t: Tensor, t: Tensor, rows: Tensor) -> Tensor:
    """S(x_t), the Stable Target Field of a batch of reference rows; see `ReferenceBatch`.

    >>> import diffrl, torch
    >>> x0 = torch.tensor([[-1.0], [1.0]])
    >>> reference_mean(diffrl.EDM(), torch.tensor([[0.0], [0.5]]), torch.tensor([1.0, 1.0]), x0)
    tensor([[0.0000],
            [0.4621]])

    Args:
        process: noise schedule.
        x_t: states, shape [N, *E].
        t: their times, shape [N], none of them clean.
        rows: x_j, shape [n, *E]; for an unbiased S those that x_t was made of are among them.
    """
    return ReferenceBatch(process, rows).mean(x_t, t)
