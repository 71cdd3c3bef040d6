"""What losses of denoising errors share: samples with noise, and distances in units of a network's output."""

from typing import Any

from tensordict import TensorDictBase
from torch import Tensor

from diffrl import keys
from diffrl.errors import InputTypeError
from diffrl.finetuning.policy import DenoisingPolicy

__all__ = ["IN_KEYS", "Noised", "advantages", "output_distance", "output_scalings"]

IN_KEYS = [keys.X_T, keys.T, keys.X0, keys.ADVANTAGE]
"""Entries of samples that such a loss reads; cond where present."""


class Noised:
    """Samples x0 with noise, flat: what `SampleUpdates` gives.

    Args:
        tensordict: samples [n, m] or [N].
    """

    def __init__(self, tensordict: TensorDictBase) -> None:
        flat = tensordict.reshape(-1)
        self.x_t, self.x0 = flat.get(keys.X_T).float(), flat.get(keys.X0).float()
        self.t, self.cond = flat.get(keys.T).flatten().double(), flat.get(keys.COND, None)

    def denoised(self, policy: DenoisingPolicy) -> Tensor:
        """D(x_t), shape [N, *E]."""
        return policy.denoise(self.x_t, self.t, self.cond)


def output_scalings(policy: DenoisingPolicy, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """c_skip, c_out and c_in of a policy's denoiser at times [N]: errors are weighed in units of its output."""
    denoiser: Any = policy.denoiser
    if not hasattr(denoiser, "scalings"):
        raise InputTypeError(
            f"{type(denoiser).__name__} has no scalings, which weigh this loss: give a denoiser such as diffrl.Denoiser"
        )
    found: tuple[Tensor, Tensor, Tensor] = denoiser.scalings(t)
    return found


def output_distance(policy: DenoisingPolicy, t: Tensor, D: Tensor, other: Tensor) -> Tensor:
    """Mean over the event dims of ‖(D - other)/c_out‖², shape [N]: of velocities, where the network predicts those.

    Args:
        policy: whose output's units are used.
        t: times, shape [N].
        D: clean estimates, shape [N, *E].
        other: what they are compared with, such as x0.
    """
    c_out = output_scalings(policy, t)[1].to(D)
    return (D - other).square().flatten(1).mean(1) / c_out**2


def advantages(tensordict: TensorDictBase, clip: float) -> Tensor:
    """Advantages of samples, clipped to ± clip and divided by it: in [-1, 1], shape [N]."""
    return tensordict.reshape(-1).get(keys.ADVANTAGE).flatten().clamp(-clip, clip) / clip
