"""What a rollout plan is: it collects the trajectories of one iteration."""

from abc import ABC, abstractmethod

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Generator, Tensor

from diffrl import keys
from diffrl.finetuning.piece import Piece, Setting
from diffrl.finetuning.policy import DenoisingPolicy

__all__ = ["RolloutPlan", "trajectory_condition"]


def trajectory_condition(rollout: TensorDictBase) -> Tensor | None:
    """The condition of each trajectory of a rollout [B, K], shape [B, ...]; None without one."""
    cond = rollout.get(keys.COND, None)
    return None if cond is None else cond[:, 0]


class RolloutPlan(Piece, ABC):
    """Collects what one iteration learns from."""

    trajectories: int
    """B, the rows of a rollout."""
    at_once: int | None = None
    """Most rows drawn side by side; None: all."""
    overlap: bool = False
    """Whether `collect` takes `each`, so that rewards are asked about a part while the next one is drawn."""

    fingerprint: str | None = None
    """Of the data that it plays back; None: it draws all that it gives."""

    def prepare(self, setting: Setting) -> None:  # noqa: B027 (most plans have nothing to prepare)
        """Read what the plan needs for a run; called once, before everything else.

        Raises:
            ValueError: it cannot be read, or does not belong to what is tuned.
        """

    @property
    def rows_of_a_group(self) -> int:
        """Rows that share a condition."""
        return 1

    @property
    def rows_together(self) -> int:
        """Rows that an update must not part: 2 for pairs."""
        return 1

    @property
    def pairs(self) -> bool:
        """Whether rows 2p and 2p+1 share their first latent too."""
        return False

    def num_steps(self, policy: DenoisingPolicy, generator: Generator) -> int:
        """K of the next rollout: the policy's, unless a plan draws it.

        Args:
            policy: what acts.
            generator: on the CPU, of this draw alone.
        """
        return policy.num_steps

    @abstractmethod
    def collect(
        self,
        policy: DenoisingPolicy,
        event_shape: tuple[int, ...],
        *,
        trajectories: int,
        cond: Tensor | None,
        generator: Generator,
        device: torch.device,
    ) -> TensorDict:
        """A rollout [B, K] with the entries of `collect_rollout`.

        Args:
            policy: what acts.
            event_shape: *E of a latent.
            trajectories: B, a multiple of `rows_of_a_group`.
            cond: condition of each group, shape [B/G, ...], or None.
            generator: source of randomness.
            device: where trajectories live.

        A plan with `overlap` also takes ``each``, which it calls with every part [b, K] as it was drawn, in order.
        """
