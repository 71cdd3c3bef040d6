"""TorchRL's soft update of target networks, in one call over all tensors."""

from typing import Any

import torch
import torchrl.objectives
from torch import Tensor

__all__ = ["SoftUpdate"]


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
        self._target_tensors: list[Tensor] = []
        self._source_tensors: list[Tensor] = []
        for name, sources in self._sources.items():
            targets = self._targets.get(f"target_{name}")
            for key, source in sources.items(True, True):
                self._source_tensors.append(source)
                self._target_tensors.append(targets.get(key))

    @torch.no_grad()
    def step(self) -> None:
        """Move the targets."""
        torch._foreach_lerp_(self._target_tensors, self._source_tensors, 1 - self.eps)
