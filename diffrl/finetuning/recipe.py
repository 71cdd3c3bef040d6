"""A fine-tuning method as a list of pieces: rollouts, placement of rewards, credit, updates, surrogate, regulariser."""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from diffrl.errors import InputError
from diffrl.finetuning.credit.base import Credit
from diffrl.finetuning.piece import Piece
from diffrl.finetuning.placement.base import Placement
from diffrl.finetuning.rollouts.base import RolloutPlan
from diffrl.finetuning.surrogate import Surrogate
from diffrl.finetuning.updates.base import UpdatePlan
from diffrl.ranges import require_number

__all__ = ["Recipe", "Regulariser"]


@dataclass(frozen=True)
class Regulariser(Piece):
    """KL(π ‖ π_ref) of every step, in closed form, times a weight.

        kl_coef · mean KL_i,    by time:  kl_coef · mean Δt_i KL_i,    Δt_i = t_i - t_{i+1}

    By time is what Flow-GRPO's code has: it divides the squared distance of the means by 2 sd², where a step of the
    flow SDE has the variance sd² Δt. The exact KL is 1/Δt times as large, which is 25 to 4 along ten steps of SD 3.5
    and 112 at the last one: a weight made for one form means nothing for the other.

    Source of the second form: the code of Flow-GRPO: Training Flow Matching Models via Online RL (Liu et al., 2025),
    https://arxiv.org/abs/2505.05470.

    Args:
        kl_coef: the weight; 0 leaves the term out.
        reference: "frozen", the policy as it was at the start, "old", as it was when the rollout was collected, or
            "ema", its moving average.
        decay: of the moving average, a rollout: θ_ref ← d θ_ref + (1 - d) θ, whether or not it has a KL term.
        decay_ramp: after rollout n, counted from 0, d = min(decay_ramp n, decay); None: d is the decay throughout.
        by_time: whether each step's KL is multiplied by its length in the process's time.

    Raises:
        ValueError: an argument outside its range.
    """

    shared: ClassVar[bool] = True
    kl_coef: float = 0.0
    reference: Literal["frozen", "old", "ema"] = "frozen"
    decay: float = 0.9
    decay_ramp: float | None = None
    by_time: bool = False

    def __post_init__(self) -> None:
        require_number("regulariser.kl_coef", self.kl_coef, 0)
        require_number("regulariser.decay", self.decay, 0, 1)
        if self.decay_ramp is not None:
            require_number("regulariser.decay_ramp", self.decay_ramp, 0)
        if self.reference not in ("frozen", "old", "ema"):
            raise InputError(f"regulariser.reference is {self.reference!r}: give 'frozen', 'old' or 'ema'")

    def decay_after(self, n: int) -> float:
        """The decay d of the moving average after rollout n."""
        return self.decay if self.decay_ramp is None else min(self.decay_ramp * n, self.decay)


@dataclass(frozen=True)
class Recipe:
    """A fine-tuning method as a list of pieces. Pieces that do not go together are refused here.

    >>> from diffrl import recipes
    >>> print(recipes.sdpo())
    rollouts     Rollouts(trajectories=256, group_size=1, pairs=True, at_once=None, overlap=False)
    placement    Dense(mode='anchor', timing='state', interior=True, guarded=True)
    credit       RewardsToGo(buffer=None, min_count=16, per='prompt', gamma=0.99)
    updates      Updates(order='step', minibatches=2, passes=1, last=None, drop_last=0, fraction=1.0, micro_batch=256)
    surrogate    RewardDifference(temporal_weight=0.99, log_scale=1.0, clip_range=None, advantage_clip=5.0)
    regulariser  Regulariser(kl_coef=0.0, reference='frozen', decay=0.9, decay_ramp=None, by_time=False)

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
    def rows_together(self) -> int:
        """Rows of a rollout that an update must not part."""
        plan = self.rollouts
        return plan.rows_of_a_group if self.surrogate.whole_groups else plan.rows_together

    @property
    def pieces(self) -> tuple[Piece, ...]:
        """All of them."""
        return tuple(vars(self).values())

    def __str__(self) -> str:
        return "\n".join(f"{name:11}  {piece!r}" for name, piece in vars(self).items())
