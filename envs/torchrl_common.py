"""What the TorchRL environments share: their generators, and the flags of a step."""

from collections.abc import Sequence
from typing import Any, Self

import torch
from tensordict import TensorDict
from torch import Tensor
from torchrl.data import Categorical, Composite
from torchrl.envs import EnvBase

from diffrl import keys
from diffrl.devices import usable_device
from diffrl.diffusion.laws import NoiseFn
from diffrl.envs.arguments import as_shape, fresh_noise, require_callable
from diffrl.errors import InputError
from diffrl.ranges import require_int

__all__ = ["ChainEnv"]


class ChainEnv(EnvBase):
    """A batch of chains with generators of its own; the subclass says how chains start and step.

    Args:
        batch_size: shape of the batch of chains.
        device: where their states live.
        noise: gives standard normal numbers for a tensor, in place of the generator.
    """

    def __init__(
        self, *, batch_size: Sequence[int], device: torch.device | str, noise: NoiseFn | None
    ) -> None:
        require_callable("noise", noise, "that gives standard normal numbers for a tensor")
        super().__init__(device=usable_device(device), batch_size=as_shape("batch_size", batch_size))
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
        drawn = int(torch.empty((), dtype=torch.int64).random_()) if seed is None else seed
        self._set_seed(require_int("seed", drawn, least=-(2**63), most=2**64 - 1))

    def _set_seed(self, seed: int | None) -> None:
        if seed is not None:
            self._generator.manual_seed(seed)
            self._cpu_generator.manual_seed(seed)

    def _draw_noise(self, x: Tensor) -> Tensor:
        if self.noise is not None:
            return fresh_noise(self.noise, x)
        return torch.randn(x.shape, generator=self._generator, dtype=x.dtype, device=x.device)

    def _given_index(self, index: Tensor, last: int) -> Tensor:
        """Positions [*b] that the caller sets, given as [*b, 1]."""
        b = self.batch_size
        if index.shape != (*b, 1) or index.is_floating_point() or index.dtype == torch.bool:
            raise InputError(f"index is {index.dtype} {tuple(index.shape)}: give int64 {(*b, 1)}")
        if bool(((index < 0) | (index >= last)).any()):
            raise InputError(f"set_state=True: a chain starts at an index in [0, {last - 1}]")
        return index.squeeze(-1).long()

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
