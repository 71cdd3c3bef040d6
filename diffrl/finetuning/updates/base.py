"""What a plan of updates is: it makes minibatches of a rollout."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Generator, Tensor

from diffrl.finetuning.piece import Piece
from diffrl.finetuning.policy import DenoisingPolicy
from diffrl.ranges import require_int

if TYPE_CHECKING:
    from diffrl.finetuning.recipe import Recipe

__all__ = ["RowUpdates", "UpdatePlan", "micro_batches"]


class UpdatePlan(Piece, ABC):
    """Makes minibatches [n, k] of a rollout."""

    unit: ClassVar[Literal["steps", "samples", "boundaries", "preferences"]]
    """What a minibatch holds."""
    minibatches: int
    passes: int
    micro_batch: int

    @property
    def single(self) -> bool:
        """Whether a rollout gives one update."""
        return (self.minibatches, self.passes) == (1, 1)

    @abstractmethod
    def count(self, num_trainable: int) -> int:
        """Optimiser updates of one rollout with so many stochastic steps."""

    @abstractmethod
    def largest_part(self, trajectories: int, num_trainable: int, *, group_size: int) -> int:
        """The most states that are forwarded at once."""

    @abstractmethod
    def __call__(
        self,
        rollout: TensorDictBase,
        *,
        policy: DenoisingPolicy,
        group_size: int,
        generator: Generator,
        entries: Iterable[str],
    ) -> Iterator[TensorDict]:
        """Minibatches [n, k] of one iteration, in order.

        Args:
            rollout: [B, K], with advantages.
            policy: what drew it.
            group_size: rows that stay together: 2 for pairs, else 1.
            generator: of shuffling, times and noise, on the CPU.
            entries: what the losses read.
        """

    def weight(self, part: TensorDictBase) -> int:
        """How many states of a part [n, k] its loss averages over."""
        return part.numel()

    def conflict(self, recipe: "Recipe") -> str | None:
        """Refuse more minibatches than there are trajectories or pairs."""
        r = recipe.rollouts
        if r.trajectories // recipe.rows_together < self.minibatches:
            return (
                f"{r.trajectories} trajectories cannot make {self.minibatches} minibatches: set "
                "updates.minibatches lower"
            )
        return None

    def _check(self) -> None:
        for name in ("minibatches", "passes", "micro_batch"):
            require_int(f"updates.{name}", getattr(self, name))


class RowUpdates(UpdatePlan):
    """Makes minibatches of whole rows of a rollout, each row with `draws` draws of its own: [n, draws]."""

    draws: int

    def _check(self) -> None:
        super()._check()
        require_int("updates.draws", self.draws)

    def count(self, num_trainable: int) -> int:
        """Passes × minibatches, whatever the steps."""
        return self.passes * self.minibatches

    def largest_part(self, trajectories: int, num_trainable: int, *, group_size: int) -> int:
        """The most states that are forwarded at once."""
        return min(self.micro_batch, -(-trajectories // self.minibatches) * self.draws)

    def _rows(self, rows: int, group_size: int, generator: Generator) -> Iterator[Tensor]:
        """The rows of each minibatch of one pass, [n]; members of a group stay side by side."""
        members = torch.arange(group_size)
        for unit in torch.randperm(rows // group_size, generator=generator).tensor_split(self.minibatches):
            yield (unit[:, None] * group_size + members).flatten()


def micro_batches(minibatch: TensorDict, size: int, *, group_size: int) -> Iterator[TensorDict]:
    """Parts of a minibatch [n, k] of at most `size` states (but one of each member), with whole groups of rows."""
    k = max(1, min(minibatch.shape[1], size // group_size))
    n = max(1, size // (k * group_size)) * group_size
    for rows in minibatch.split(n):
        yield from rows.split(k, dim=1)
