"""Several denoisers by one network: each has adapters of its own, which the network wears while it is asked."""

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from diffrl.diffusion.pipelines.lora import adapters, adapters_disabled
from diffrl.diffusion.pipelines.parts import plain
from diffrl.diffusion.predictions import Scalings
from diffrl.errors import InputError

__all__ = ["AdapterDenoiser", "BaseDenoiser", "checkpointed", "worn"]


class worn:  # noqa: N801 (used like a function)
    """Context in which parameters of a module, by name, are these; afterwards they are its own again.

    Results of the module have gradients with respect to the parameters that it wore. It can be entered again.

    Args:
        module: a network or a part of one.
        weights: by their names in the module.
    """

    def __init__(self, module: nn.Module, weights: Mapping[str, nn.Parameter]) -> None:
        names = [name.rpartition(".") for name in weights]
        self._places = [(module.get_submodule(path), leaf) for path, _, leaf in names]
        self._weights, self._own = tuple(weights.values()), list[tuple[Tensor, ...]]()

    def __enter__(self) -> None:
        self._own.append(tuple(part.get_parameter(leaf) for part, leaf in self._places))
        self._put(self._weights)

    def __exit__(self, *error: object) -> None:
        self._put(self._own.pop())

    def _put(self, weights: tuple[Tensor, ...]) -> None:
        for (part, leaf), weight in zip(self._places, weights, strict=True):
            setattr(part, leaf, weight)


def checkpointed(module: nn.Module, *args: Any) -> Any:
    """Call a part of a network without keeping its activations: the backward pass computes them again.

    It does so with the adapters that the part wears now, whatever it wears then.
    """
    weights = adapters(module)

    def contexts() -> tuple[Any, Any]:
        return nullcontext(), worn(module, weights)

    return checkpoint(module.__call__, *args, use_reentrant=False, context_fn=contexts)


class _View(nn.Module):
    """A denoiser that asks the network of another one; its prompts, process and coefficients are the same."""

    def __init__(self, denoiser: Any) -> None:
        super().__init__()
        self.__dict__["denoiser"] = (
            denoiser  # no submodule: nothing of it is trained, moved or saved from here
        )
        self.process, self.prompts = denoiser.process, denoiser.prompts

    @property
    def evaluations(self) -> int:
        """Network evaluations for each state."""
        return int(self.__dict__["denoiser"].evaluations)

    def scalings(self, t: Tensor) -> Scalings:
        """As `PipelineDenoiser.scalings`."""
        found: Scalings = self.__dict__["denoiser"].scalings(t)
        return found

    def null_condition(self, cond: Tensor) -> Tensor:
        """As `PipelineDenoiser.null_condition`."""
        found: Tensor = self.__dict__["denoiser"].null_condition(cond)
        return found


class BaseDenoiser(_View):
    """A denoiser with its adapters switched off: the network as it was before any; it owns no weights."""

    @torch.no_grad()
    def forward(self, x_t: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
        """As `PipelineDenoiser.forward`; without gradients."""
        denoiser = self.__dict__["denoiser"]
        with adapters_disabled(denoiser.network):
            D_x: Tensor = denoiser(x_t, t, cond)
        return D_x

    def reference(self) -> "BaseDenoiser":
        """Itself: nothing that is trained changes it."""
        return self

    def twin(self) -> "AdapterDenoiser":
        """One to be trained that begins as this: U = 0, and V as the denoiser has it now."""
        denoiser = self.__dict__["denoiser"]
        first = denoiser.adapters.items()
        return AdapterDenoiser(denoiser, {name: p * 0 if ".lora_B." in name else p for name, p in first})


class AdapterDenoiser(_View):
    """A denoiser whose network wears other adapters: it owns these and nothing else.

    Its parameters and its state are its adapters, of the rank, scale and layers of the denoiser's own. While it is
    asked the network wears them, so that no gradient reaches another role's; with `PipelineDenoiser`'s gradient
    checkpointing the backward pass wears them again.

    Args:
        denoiser: a `PipelineDenoiser` with adapters, whose network is asked.
        weights: first values of all adapters, by their names in the network; copied.
    """

    def __init__(self, denoiser: Any, weights: Mapping[str, Tensor]) -> None:
        super().__init__(denoiser)
        self.names = tuple(weights)
        for name, weight in weights.items():
            self.register_parameter(_key(name), nn.Parameter(weight.detach().clone()))

    @property
    def weights(self) -> dict[str, nn.Parameter]:
        """The adapters, by their names in the network."""
        return {name: self.get_parameter(_key(name)) for name in self.names}

    def forward(self, x_t: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
        """As `PipelineDenoiser.forward`, with these adapters.

        Raises:
            ValueError: gradient checkpointing that the network was given by other means than the denoiser, under which
                the backward pass would take another role's adapters.
        """
        denoiser = self.__dict__["denoiser"]
        network, weights = plain(denoiser.network), self.weights
        trained = torch.is_grad_enabled() and any(p.requires_grad for p in weights.values())
        if trained and _recomputes_otherwise(network):
            raise InputError(
                "the network recomputes activations with whatever adapters it has then: call the denoiser's own "
                "enable_gradient_checkpointing()"
            )
        with worn(network, weights):
            D_x: Tensor = denoiser(x_t, t, cond)
        return D_x

    def reference(self) -> "AdapterDenoiser":
        """A copy of the adapters as they are now, without gradients."""
        return self.twin().requires_grad_(False)

    def twin(self) -> "AdapterDenoiser":
        """A copy to be trained on its own."""
        return AdapterDenoiser(self.__dict__["denoiser"], self.weights)


def _key(name: str) -> str:
    return name.replace(".", "/")  # names of parameters must have no dots


def _recomputes_otherwise(network: nn.Module) -> bool:
    found = (m for m in network.modules() if getattr(m, "gradient_checkpointing", False))
    return any(getattr(m, "_gradient_checkpointing_func", None) is not checkpointed for m in found)
