"""What losses on clean samples at fresh times share: a sample with noise, and the denoising error of it."""

from tensordict import TensorDictBase
from torch import Tensor

from diffrl import keys
from diffrl.finetuning.methods.tdm import output_scalings
from diffrl.finetuning.policy import DenoisingPolicy

__all__ = ["IN_KEYS", "Noised", "advantages"]

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

    def distance(self, policy: DenoisingPolicy, D: Tensor, other: Tensor) -> Tensor:
        """Mean over the event dims of ‖(D - other)/c_out‖², shape [N]: of velocities, where the network predicts those.

        Args:
            policy: whose output's units are used.
            D: clean estimates, shape [N, *E].
            other: what they are compared with, such as x0.
        """
        c_out = output_scalings(policy, self.t)[1].to(D)
        return (D - other).square().flatten(1).mean(1) / c_out**2


def advantages(tensordict: TensorDictBase, clip: float) -> Tensor:
    """Advantages of samples, clipped to ± clip and divided by it: in [-1, 1], shape [N]."""
    return tensordict.reshape(-1).get(keys.ADVANTAGE).flatten().clamp(-clip, clip) / clip
