"""How a target network follows the one that is trained."""

from dataclasses import dataclass
from typing import Any

from torchrl.objectives import HardUpdate

from diffrl.errors import InputError
from diffrl.objectives.soft_update import SoftUpdate

__all__ = ["Target", "target_updater"]


@dataclass(frozen=True)
class Target:
    """How a target network follows, where the objective has one.

    Args:
        decay: θ⁻ ← decay θ⁻ + (1 - decay) θ after every step (TorchRL's SoftUpdate); None is the objective's own, 0.97,
            or 0.999 for TD-EDM. An objective that brings one for every step, as consistency training does, goes by it.
        every: instead, a hard copy each so many steps (TorchRL's HardUpdate).
    """

    decay: float | None = None
    every: int | None = None

    def __post_init__(self) -> None:
        if self.decay is not None and not 0 <= self.decay <= 1:
            raise InputError(f"target.decay is {self.decay}: it must lie in [0, 1]")
        if self.every is not None and self.every < 1:
            raise InputError(f"target.every is {self.every}: it must be at least 1")


def target_updater(loss: Any, target: Target) -> SoftUpdate | HardUpdate | None:
    """What moves the target network of a loss; None where it has none."""
    if loss.bootstrap != "target":
        return None
    if target.every is not None:
        return HardUpdate(loss, value_network_update_interval=target.every - 1)  # it copies one call late
    return SoftUpdate(loss, eps=loss.target_decay if target.decay is None else target.decay)
