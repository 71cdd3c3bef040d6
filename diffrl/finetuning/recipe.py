"""A fine-tuning method as a list of pieces: rollouts, placement of rewards, credit, updates, surrogate, regulariser."""

from dataclasses import dataclass, field
from typing import Literal

from diffrl.errors import InputError
from diffrl.finetuning.credit.base import Credit
from diffrl.finetuning.piece import Piece
from diffrl.finetuning.placement.base import Placement
from diffrl.finetuning.rollouts.base import RolloutPlan
from diffrl.finetuning.surrogate import Surrogate
from diffrl.finetuning.updates import UpdatePlan

__all__ = ["Recipe", "Regulariser"]


@dataclass(frozen=True)
class Regulariser(Piece):
    """KL(π ‖ π_ref) of every step, in closed form, times a weight.

    Args:
        kl_coef: the weight; 0 leaves the term out.
        reference: "frozen", the policy as it was at the start, "old", as it was when the rollout was collected, or
            "ema", its moving average.
        decay: of that average, a rollout: θ_ref ← decay θ_ref + (1 - decay) θ.

    Raises:
        ValueError: an argument outside its range.
    """

    kl_coef: float = 0.0
    reference: Literal["frozen", "old", "ema"] = "frozen"
    decay: float = 0.9

    def __post_init__(self) -> None:
        if not self.kl_coef >= 0:
            raise InputError(f"regulariser.kl_coef is {self.kl_coef}: it is a weight >= 0")
        if self.reference not in ("frozen", "old", "ema"):
            raise InputError(f"regulariser.reference is {self.reference!r}: give 'frozen', 'old' or 'ema'")
        if not 0 <= self.decay <= 1:
            raise InputError(f"regulariser.decay is {self.decay}: it lies in [0, 1]")


@dataclass(frozen=True)
class Recipe:
    """A fine-tuning method as a list of pieces. Pieces that do not go together are refused here.

    >>> from diffrl import recipes
    >>> print(recipes.sdpo())
    rollouts     Rollouts(trajectories=256, group_size=1, pairs=True, at_once=None)
    placement    Dense(mode='anchor', timing='state', interior=True, guarded=True)
    credit       RewardsToGo(buffer=None, min_count=16, per='prompt', gamma=0.99)
    updates      Updates(order='step', minibatches=2, passes=1, last=None, fraction=1.0, micro_batch=256)
    surrogate    RewardDifference(temporal_weight=0.99, log_scale=1.0, clip_range=None, advantage_clip=5.0)
    regulariser  Regulariser(kl_coef=0.0, reference='frozen', decay=0.9)

    Args:
        rollouts: what is collected.
        placement: where rewards stand.
        credit: how they become advantages; it may remember, so give each run its own.
        updates: how a rollout is trained on.
        surrogate: what an update maximises.
        regulariser: what holds the policy back.

    Raises:
        ValueError: pieces that do not go together, with the reason.
    """

    rollouts: RolloutPlan
    placement: Placement
    credit: Credit
    updates: UpdatePlan
    surrogate: Surrogate
    regulariser: Regulariser = field(default_factory=Regulariser)

    def __post_init__(self) -> None:
        for piece in self.pieces:
            if reason := piece.conflict(self):
                raise InputError(reason)

    @property
    def pieces(self) -> tuple[Piece, ...]:
        """All of them."""
        return tuple(vars(self).values())

    def __str__(self) -> str:
        return "\n".join(f"{name:11}  {piece!r}" for name, piece in vars(self).items())
