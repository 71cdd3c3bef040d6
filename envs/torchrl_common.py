"""What the TorchRL environments share: their generators, and the flags of a step."""

from typing import Any, Self

import torch
from tensordict import TensorDict
from torch import Tensor
from torchrl.data import Categorical, Composite
from torchrl.envs import EnvBase

from diffrl import keys
from diffrl.diffusion.laws import NoiseFn

__all__ = ["ChainEnv"]


class ChainEnv(EnvBase):
    """A batch of chains with generators of its own; the subclass says how chains start and step.

    Args:
        batch_size: shape of the batch of chains.
        device: where their states live.
        noise: gives standard normal numbers for a tensor, in place of the generator.
    """

    def __init__(self, *, batch_size: torch.Size, device: torch.device, noise: NoiseFn | None) -> None:
        super().__init__(device=device, batch_size=batch_size)
        self.noise = noise

    def to(self, device: torch.device | str) -> Self:
        """Move the environment; its generator on the new device is seeded by the old one."""
        moved = super().to(device)
        seed = torch.randint(2**62, (), generator=self._generator, device=self._generator.device)
        self._make_generators(int(seed))
        return moved

    def _make_generators(self, seed: int | None) -> None:
        # data and conditions are drawn on the CPU; with one generator for both, x0 and the noise are independent
        self._generator = torch.Generator(self.device)
        on_cpu = self._generator.device.type == "cpu"
        self._cpu_generator = self._generator if on_cpu else torch.Generator()
        self._set_seed(int(torch.empty((), dtype=torch.int64).random_()) if seed is None else seed)

    def _set_seed(self, seed: int | None) -> None:
        if seed is not None:
            self._generator.manual_seed(seed)
            self._cpu_generator.manual_seed(seed)

    def _draw_noise(self, x: Tensor) -> Tensor:
        if self.noise is not None:
            return self.noise(x)
        return torch.randn(x.shape, generator=self._generator, dtype=x.dtype, device=x.device)

    def _flags_spec(self) -> Composite:
        b, flags = self.batch_size, (keys.DONE, keys.TERMINATED, keys.TRUNCATED)
        spec: dict[str, Any] = {
            k: Categorical(2, shape=(*b, 1), dtype=torch.bool, device=self.device) for k in flags
        }
        return Composite(spec, shape=b, device=self.device)

    @staticmethod
    def _paid(reached: TensorDict, reward: Tensor, terminated: Tensor, truncated: Tensor) -> TensorDict:
        """Write the reward and the flags [*b] of a step into the states that it reached."""
        reached.set(keys.REWARD, reward)
        reached.set(keys.TERMINATED, terminated.unsqueeze(-1))
        reached.set(keys.TRUNCATED, truncated.unsqueeze(-1))
        reached.set(keys.DONE, (terminated | truncated).unsqueeze(-1))
        return reached
