"""What the losses of a denoiser share: the network that is trained, and the one that it bootstraps from."""

import copy
from collections.abc import Callable
from typing import Any, Self

from tensordict import TensorDictParams
from tensordict.nn import TensorDictModule
from torch import Tensor
from torchrl.objectives.common import LossModule

from diffrl.diffusion.denoisers import Denoiser

__all__ = ["DenoiserLoss"]


class DenoiserLoss(LossModule):
    """A loss module that calls its networks directly: a functional call costs as much as a small network.

    The parameters that TorchRL registers and the networks' own remain the same tensors.

    Args:
        network: a module whose attribute `denoiser` is trained in place, in a TensorDictModule.
        target: whether to keep a target network, to be moved by TorchRL's `SoftUpdate` or `HardUpdate`.
    """

    value_network: TensorDictModule
    value_network_params: TensorDictParams
    target_value_network_params: TensorDictParams

    def __init__(self, network: TensorDictModule, *, target: bool) -> None:
        super().__init__()
        self.convert_to_functional(network, "value_network", create_target_params=target)
        if target:
            self.__dict__["_target_network"] = copy.deepcopy(network).requires_grad_(False).eval()
        self._tie()
        self.network_evaluations = 0
        """States forwarded so far, over all networks."""

    @property
    def denoiser(self) -> Denoiser:
        """The denoiser that is trained."""
        return self.value_network.module.denoiser

    @property
    def bootstrap_network(self) -> TensorDictModule:
        """The target network where there is one, else the network itself."""
        return self.__dict__.get("_target_network", self.value_network)

    def train(self, mode: bool = True) -> Self:
        """Switch the denoiser too; a target network stays in evaluation mode."""
        self.value_network.train(mode)
        return super().train(mode)

    def _tie(self) -> None:
        """Let the networks hold the tensors that this module registers: a copy or a cast parts them."""
        self.value_network_params.to_module(self.value_network, preserve_module_state=False)
        network = self.__dict__.get("_target_network")
        if network is not None:
            registered = self._modules["target_value_network_params"].flatten_keys(".")
            for named in (network.named_parameters, network.named_buffers):
                for name, tensor in named(remove_duplicate=False):
                    tensor.data = registered[name].data

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn)
        self._tie()
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._tie()
