"""Fine-tuning methods as lists of pieces: rollouts, placement of rewards, credit, updates, surrogate, regulariser."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from diffrl.finetuning.credit.standardised import Credit, GroupRelative, RewardsToGo, Standardised
from diffrl.finetuning.placement.terminal import Dense, Placement, Terminal
from diffrl.finetuning.surrogate import PPOClip, Regulariser, Reinforce, RewardDifference, Surrogate
from diffrl.finetuning.updates import Updates

__all__ = ["RECIPES", "Recipe", "Rollouts", "ddpo_is", "ddpo_sf", "sdpo"]


@dataclass(frozen=True)
class Rollouts:
    """What is collected for one iteration.

    Args:
        trajectories: B; the published numbers are 256 (of 4 and of 8 GPUs together).
        group_size: G, trajectories that share a condition.
        pairs: groups are pairs that share their first latent too; group_size is then left at 1.
        at_once: most trajectories drawn side by side; None: all.

    Raises:
        ValueError: sizes that do not fit.
    """

    trajectories: int = 256
    group_size: int = 1
    pairs: bool = False
    at_once: int | None = None

    def __post_init__(self) -> None:
        if self.group_size < 1 or (self.pairs and self.group_size not in (1, 2)):
            raise ValueError(
                f"rollouts.group_size is {self.group_size}: give at least 1, and for pairs leave it at 1"
            )
        if self.trajectories < 1 or self.trajectories % self.rows_of_a_group:
            raise ValueError(
                f"rollouts.trajectories is {self.trajectories}: give a multiple of the group size, "
                f"{self.rows_of_a_group}"
            )
        if self.at_once is not None and self.at_once < self.rows_of_a_group:
            raise ValueError(
                f"rollouts.at_once is {self.at_once}: a group of {self.rows_of_a_group} is drawn together; give at "
                "least that, or null for all"
            )

    @property
    def rows_of_a_group(self) -> int:
        """Trajectories that share a condition."""
        return 2 if self.pairs else self.group_size


@dataclass(frozen=True)
class Recipe:
    """A fine-tuning method. Pieces that do not go together are refused here.

    >>> print(sdpo())
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

    rollouts: Rollouts
    placement: Placement
    credit: Credit
    updates: Updates
    surrogate: Surrogate
    regulariser: Regulariser = field(default_factory=Regulariser)

    def __post_init__(self) -> None:
        r, u = self.rollouts, self.updates
        name = type(self.surrogate).__name__
        if self.surrogate.needs_pairs and not r.pairs:
            raise ValueError(f"{name} compares the two trajectories of a pair: set rollouts.pairs=true")
        if self.surrogate.on_policy and (u.minibatches, u.passes, u.order) != (1, 1, "trajectory"):
            raise ValueError(
                f"{name} is on-policy, one update a rollout: set updates.minibatches=1, updates.passes=1 and "
                "updates.order=trajectory, or take ppo_clip"
            )
        if self.regulariser.kl_coef > 0 and not self.surrogate.takes_reference:
            raise ValueError(f"{name} has no KL term: set regulariser.kl_coef=0, or take ppo_clip")
        if isinstance(self.credit, GroupRelative) and r.rows_of_a_group < 2:
            raise ValueError("credit 'group' needs groups of at least 2: set rollouts.group_size")
        if isinstance(self.credit, Standardised | GroupRelative) and self.placement.dense:
            name = type(self.credit).__name__
            raise ValueError(
                f"{name} gives a whole trajectory one advantage, so dense rewards would only be summed: take "
                "credit rewards_to_go or critic, or placement terminal"
            )
        if r.trajectories // self.rows_together < u.minibatches:
            raise ValueError(
                f"{r.trajectories} trajectories cannot make {u.minibatches} minibatches: set "
                "updates.minibatches lower"
            )

    @property
    def rows_together(self) -> int:
        """Rows that an update must not part: 2 for pairs."""
        return 2 if self.rollouts.pairs else 1

    def __str__(self) -> str:
        return _flush_left([[name, repr(piece)] for name, piece in vars(self).items()])


def _flush_left(rows: list[list[str]]) -> str:
    """Two columns of text, flush left."""
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:{width}}  {text}" for name, text in rows)


def ddpo_sf(**pieces: Any) -> Recipe:
    """DDPO by score function: one on-policy update a rollout.

    Source: Training Diffusion Models with Reinforcement Learning (Black et al., 2024), eq. 5,
    https://arxiv.org/abs/2305.13301.

    Args:
        **pieces: of `Recipe`, in place of the published ones.
    """
    return Recipe(**{**_ddpo(Updates(minibatches=1)), "surrogate": Reinforce(), **pieces})


def ddpo_is(**pieces: Any) -> Recipe:
    """DDPO by clipped importance sampling: two updates a rollout, as its code's aesthetic run has.

    Source: Training Diffusion Models with Reinforcement Learning (Black et al., 2024), eq. 6 and its code,
    https://arxiv.org/abs/2305.13301.

    Args:
        **pieces: of `Recipe`, in place of the published ones.
    """
    return Recipe(**{**_ddpo(Updates()), "surrogate": PPOClip(), **pieces})


def _ddpo(updates: Updates) -> dict[str, Any]:
    return {"rollouts": Rollouts(), "placement": Terminal(), "credit": Standardised(), "updates": updates}


def sdpo(**pieces: Any) -> Recipe:
    """SDPO: pairs, dense rewards from three queries, stepwise advantages, step-shuffled reward differences.

    Source: Aligning Few-Step Diffusion Models with Dense Reward Difference Learning (Zhang et al., 2024) and its code,
    https://arxiv.org/abs/2411.11727; ours are the guard of the similarities and the anchor among inner steps.

    Args:
        **pieces: of `Recipe`, in place of the published ones.
    """
    published = {
        "rollouts": Rollouts(pairs=True),
        "placement": Dense(),
        "credit": RewardsToGo(),
        "updates": Updates(order="step"),
        "surrogate": RewardDifference(),
    }
    return Recipe(**{**published, **pieces})


RECIPES: dict[str, Callable[..., Recipe]] = {"ddpo_sf": ddpo_sf, "ddpo_is": ddpo_is, "sdpo": sdpo}
