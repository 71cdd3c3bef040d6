"""Loss scaling: gradients that are computed in half precision are kept inside its range."""

from typing import Any, Self

import torch

from diffrl.errors import InputError
from diffrl.ranges import require_int, require_number

__all__ = ["LossScale"]


class LossScale:
    """A factor S on the loss that is taken out of its gradient again, as large as float16 bears.

        g = ∇(S L)/S,    S ← S/2 where g is not finite, a step that is skipped,    S ← 2S after `growth_every` that are

    float16 ends at 65504 and knows no number below 6e-8, where the gradients of a mean over many states and dims soon
    are. S is a power of two, so that in float32 it changes no bit of the gradient.

    Source: Mixed Precision Training (Micikevicius et al., 2018), §3.2, https://arxiv.org/abs/1710.03740; S and its rule
    are those of PyTorch's `torch.amp.GradScaler`.

    Args:
        value: S at the start, ≥ 1.
        growth_every: finite steps in a row after which S is doubled.

    Raises:
        ValueError: an argument outside its range.
    """

    def __init__(self, value: float = 65536.0, growth_every: int = 2000) -> None:
        self.value = require_number("value", value, 1)
        self.growth_every = require_int("growth_every", growth_every)
        self.finite = 0
        """Finite steps since S last changed."""

    @classmethod
    def of_run(cls, autocast: torch.dtype | None, device: torch.device) -> Self | None:
        """The one that a run needs; None but for float16.

        Raises:
            ValueError: float16 on a device on which it was never tried.
        """
        if autocast != torch.float16:
            return None
        if device.type != "cpu":
            raise InputError(
                f"float16 was tried on a CPU only, not on {device.type}: set dtype=bfloat16, or dtype=float32"
            )
        return cls()

    def grow(self) -> None:
        """Take note of a step with a finite gradient."""
        self.finite += 1
        if self.finite == self.growth_every:
            self.value, self.finite = 2 * self.value, 0

    def shrink(self) -> bool:
        """Take note of a step whose gradient was not finite; False where it is not so for being scaled, as S is 1."""
        scaled, self.finite = self.value > 1, 0
        self.value = max(self.value / 2, 1.0)
        return scaled

    def state_dict(self) -> dict[str, Any]:
        """S, and the finite steps since it last changed."""
        return {"value": self.value, "finite": self.finite}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`."""
        self.value, self.finite = float(state["value"]), int(state["finite"])
