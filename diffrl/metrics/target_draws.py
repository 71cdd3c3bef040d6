"""What measures of targets share: bias and variance of draws of one, and a reference batch for each state."""

from collections.abc import Iterator

import torch
from torch import Generator, Tensor

from diffrl.data.mixtures import Mixture
from diffrl.diffusion.exact import MixtureDenoiser
from diffrl.diffusion.predictions import scalings
from diffrl.diffusion.schedules.base import Schedule
from diffrl.errors import InputError
from diffrl.objectives.posteriors import ReferenceBatch
from diffrl.objectives.stand_ins import data_generator

__all__ = ["OwnRows", "parts", "require_draws", "squares"]


def require_draws(draws: int) -> None:
    """Refuse fewer than two.

    Raises:
        ValueError: so it is.
    """
    if draws < 2:
        raise InputError(f"draws is {draws}: a variance needs at least two")


def squares(error: Tensor, process: Schedule, t: Tensor, sigma_data: float) -> Tensor:
    """‖error‖²/c_out² of rows [N, *E] at times [N]: in units of a network's output, shape [N]."""
    unit = scalings(process, t.double(), "edm", sigma_data).c_out ** 2
    return error.double().square().flatten(1).sum(1) / unit


def parts(y: Tensor, exact: Tensor, process: Schedule, t: Tensor, sigma_data: float) -> dict[str, float]:
    """Squared bias, variance and their sum of M draws y [M, N, *E] of a target, in units of a network's output.

    The variance of a mean, variance/M, is taken off the squared bias, which may be negative therefore.
    """
    y, M = y.double(), len(y)
    mean = y.mean(0)
    variance = sum(squares(draw - mean, process, t, sigma_data) for draw in y) / (M - 1)
    bias_sq = squares(mean - exact, process, t, sigma_data) - variance / M
    found = {"bias_sq": bias_sq, "variance": variance, "total": bias_sq + variance}
    return {name: float(torch.as_tensor(values).mean()) for name, values in found.items()}


class OwnRows:
    """The law of x0 given x_t by a batch for each datum: the datum, and further draws of the data that are its alone.

    In training the rows that a state was not made of are fresh draws of the data whatever the state is. Of states that
    are held while their data are drawn anew, the other states' data are no such draws.

    Args:
        oracle: whose law the further rows have.
        data: shape [N, *E].
        rows: of each batch in all, ≥ 1.
        generator: source of randomness.
    """

    def __init__(
        self, oracle: MixtureDenoiser, data: Tensor, rows: int, generator: Generator | None = None
    ) -> None:
        law = Mixture(oracle.means.cpu(), oracle.stds.cpu(), oracle.log_weights.exp().cpu())
        n = len(data) * (rows - 1)
        source = None if generator is None else data_generator(generator)
        others = law.sample(n, source) if n > 0 else torch.zeros(0)
        others = others.to(data).view(len(data), rows - 1, *data.shape[1:])
        batches = torch.cat([data.unsqueeze(1), others], 1)
        self.batches = [ReferenceBatch(oracle.process, batch) for batch in batches]

    def mean(self, x_t: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
        """S(x_t) of states [N K, *E], K of each datum; there are no labels."""
        return torch.cat([batch.mean(x, s) for batch, x, s in self._states(x_t, t)])

    def draw(
        self, x_t: Tensor, t: Tensor, cond: Tensor | None = None, *, generator: Generator | None = None
    ) -> Tensor:
        """A row for each of these states, drawn by the softmax."""
        return torch.cat([batch.draw(x, s, generator=generator) for batch, x, s in self._states(x_t, t)])

    def _states(self, x_t: Tensor, t: Tensor) -> Iterator[tuple[ReferenceBatch, Tensor, Tensor]]:
        K = len(x_t) // len(self.batches)
        return zip(self.batches, x_t.split(K), t.split(K), strict=True)
