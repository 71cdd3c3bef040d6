"""TorchRL's soft update of target networks, in one call over all tensors."""

from typing import Any

import torch
import torchrl.objectives

__all__ = ["SoftUpdate", "flatten"]


class SoftUpdate(torchrl.objectives.SoftUpdate):
    """θ⁻ ← eps θ⁻ + (1 - eps) θ, to be called after every step of the optimiser.

    Interchangeable with TorchRL's class of this name, which takes each tensor on its own: for a small network
    that costs a quarter of a forward pass.

    Args:
        loss: TorchRL loss with target parameters; they start as copies of the parameters.
        eps: what the target keeps of itself, in [0, 1]; give this or tau.
        tau: 1 - eps, what it takes over.
    """

    def __init__(self, loss: Any, *, eps: float | None = None, tau: float | None = None) -> None:  # noqa: ANN401
        super().__init__(loss, eps=eps, tau=tau)
        flatten(self)

    @torch.no_grad()
    def step(self) -> None:
        """Move the targets."""
        torch._foreach_lerp_([*self._targets.values()], [*self._sources.values()], 1 - self.eps)


def flatten(updater: Any) -> None:  # noqa: ANN401
    """Let an updater of TorchRL hold what it moves by its names in the loss, so that parts can take its place."""
    targets = {".".join(key): x for key, x in updater._targets.items(True, True)}
    updater._sources = {".".join(key): x for key, x in updater._sources.items(True, True)}
    updater._targets = {f"target_{name}": targets[f"target_{name}"] for name in updater._sources}
