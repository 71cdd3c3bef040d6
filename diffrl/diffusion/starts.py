"""Where windows of chains begin: anywhere, where the loss is large, or at easy noise levels before hard ones."""

import math
from abc import ABC, abstractmethod
from typing import Any, Literal

import torch
from torch import Tensor

from diffrl.errors import InputError
from diffrl.ranges import MAX_STEPS, require_int, require_number
from diffrl.registry import Registry

__all__ = ["STARTS", "CurriculumStarts", "LossAwareStarts", "Starts", "UniformStarts"]

STARTS = Registry("starts", "diffrl.diffusion.starts")


class Starts(ABC):
    """Draws where windows begin, and may learn from the losses of those windows.

    A start is a position along the chain: 0 is the noisiest state. If the grid is shifted from batch to batch,
    each position stands for a range of noise levels.
    """

    @abstractmethod
    def draw(self, batch: int, num_starts: int, generator: torch.Generator) -> tuple[Tensor, Tensor | None]:
        """Draw the starts of a batch of windows.

        Args:
            batch: B.
            num_starts: number of positions that a window of this chain can begin at.
            generator: source of randomness.

        Returns:
            Starts in [0, num_starts), integers, shape [B], on the generator's device; and the importance of
            each, shape [B], by which the loss is multiplied, or None for 1.
        """

    def update(self, index: Tensor, losses: Tensor) -> None:  # noqa: B027
        """Learn from a batch.

        Args:
            index: the starts, integers, shape [B].
            losses: the mean loss of each window before it is multiplied by its importance, shape [B].
        """

    def state_dict(self) -> dict[str, Any]:
        """What was learnt, as tensors and numbers for a checkpoint."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:  # noqa: B027
        """Continue from `state_dict`."""


@STARTS.register("uniform")
class UniformStarts(Starts):
    """Every start is equally likely."""

    def draw(self, batch: int, num_starts: int, generator: torch.Generator) -> tuple[Tensor, None]:
        return torch.randint(num_starts, (batch,), generator=generator, device=generator.device), None


@STARTS.register("loss_aware")
class LossAwareStarts(Starts):
    """Starts are drawn in proportion to the root mean square of their last losses; the loss stays unbiased.

        p_i = (1-u) w_i/Σw + u/T,    w_i = √(mean of the last losses²),    importance 1/(T p_i)

    They are uniform until `history` losses of every start are known.

    Source: Improved Denoising Diffusion Probabilistic Models (Nichol & Dhariwal, 2021), section 3.3 and code,
    https://arxiv.org/abs/2102.09672.

    Args:
        history: number of losses to remember of each start, in [1, 100,000].
        uniform: u ∈ [0, 1], the share drawn uniformly.

    Raises:
        ValueError: an argument outside its range.
    """

    def __init__(self, history: int = 10, uniform: float = 0.001) -> None:
        require_int("history", history, most=100_000)
        require_number("uniform", uniform, 0, 1)
        self.history, self.uniform = history, uniform
        # one row for each start, in which a new loss takes the place of the oldest
        self._losses = torch.zeros(0, history, dtype=torch.float64)
        self._counts = torch.zeros(0, dtype=torch.long)

    def _grow(self, num_starts: int) -> None:
        new = num_starts - len(self._counts)
        if new > 0:
            self._losses = torch.cat([self._losses, self._losses.new_zeros(new, self.history)])
            self._counts = torch.cat([self._counts, self._counts.new_zeros(new)])

    def probabilities(self, num_starts: int) -> Tensor:
        """p, float64, shape [num_starts]."""
        self._grow(num_starts)
        T, w = num_starts, self._losses[:num_starts].square().mean(1).sqrt()
        if int(self._counts[:T].min()) < self.history or float(w.sum()) == 0:
            return torch.full((T,), 1 / T, dtype=torch.float64)
        return (1 - self.uniform) * w / w.sum() + self.uniform / T

    def draw(self, batch: int, num_starts: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        p = self.probabilities(num_starts).to(generator.device)
        index = torch.multinomial(p, batch, replacement=True, generator=generator)
        return index, 1 / (num_starts * p[index])

    def update(self, index: Tensor, losses: Tensor) -> None:
        index, order = index.cpu().sort(stable=True)
        losses = losses.detach().cpu().double()[order]
        self._grow(int(index[-1]) + 1)
        new = index.bincount(minlength=len(self._counts))
        rank = torch.arange(len(index)) - (new.cumsum(0) - new)[index]  # among the losses of the same start
        slot = (self._counts[index] + rank) % self.history
        # a loss that a later one of this batch would overwrite is left out
        kept = rank >= new[index] - self.history
        self._losses[index[kept], slot[kept]] = losses[kept]
        self._counts += new

    def state_dict(self) -> dict[str, Any]:
        return {"losses": self._losses.clone(), "counts": self._counts.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._losses, self._counts = state["losses"].clone(), state["counts"].clone()


@STARTS.register("curriculum")
class CurriculumStarts(Starts):
    """Easy noise levels first: whenever the loss stops falling, a further group of levels joins.

    At stage j of N the starts are uniform in the first j of N equal parts of the chain. The loss is averaged
    over `every` batches; when the average has not been below its best for `patience` averages in a row, the
    next stage begins, with a new best. The last stage, the whole chain, stays.

    Source: Denoising Task Difficulty-based Curriculum for Training Diffusion Models (Kim et al., 2024),
    section 4, https://arxiv.org/abs/2403.10348; the numbers are ours.

    Args:
        clusters: N ≥ 1.
        patience: averages without improvement, ≥ 1.
        every: batches to an average, ≥ 1.
        order: "high_to_low" begins at the noisy end, which is easier; "low_to_high" at the clean end.

    Raises:
        ValueError: an argument outside its range.
    """

    def __init__(
        self,
        clusters: int = 20,
        patience: int = 4,
        every: int = 50,
        order: Literal["high_to_low", "low_to_high"] = "high_to_low",
    ) -> None:
        for name, number in (("clusters", clusters), ("patience", patience), ("every", every)):
            require_int(name, number, most=MAX_STEPS)
        if order not in ("high_to_low", "low_to_high"):
            raise InputError(f"order is {order!r}: give 'high_to_low' or 'low_to_high'")
        self.clusters, self.patience, self.every, self.order = clusters, patience, every, order
        self.stage = 1
        """The present stage, from 1 to N."""
        self._best, self._waited, self._sum, self._count = math.inf, 0, 0.0, 0

    def draw(self, batch: int, num_starts: int, generator: torch.Generator) -> tuple[Tensor, None]:
        n = math.ceil(num_starts * self.stage / self.clusters)
        index = torch.randint(n, (batch,), generator=generator, device=generator.device)
        return (index if self.order == "high_to_low" else num_starts - 1 - index), None

    def update(self, index: Tensor, losses: Tensor) -> None:
        if self.stage == self.clusters:
            return
        self._sum, self._count = self._sum + float(losses.mean()), self._count + 1
        if self._count < self.every:
            return
        mean, self._sum, self._count = self._sum / self.every, 0.0, 0
        self._waited = 0 if mean < self._best else self._waited + 1
        self._best = min(mean, self._best)
        if self._waited == self.patience:
            self.stage, self._best, self._waited = self.stage + 1, math.inf, 0

    def state_dict(self) -> dict[str, Any]:
        names = ("stage", "_best", "_waited", "_sum", "_count")
        return {name.lstrip("_"): getattr(self, name) for name in names}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.stage, self._best, self._waited = state["stage"], state["best"], state["waited"]
        self._sum, self._count = state["sum"], state["count"]
