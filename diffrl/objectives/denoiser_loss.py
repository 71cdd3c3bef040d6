"""What the losses of a denoiser share: the network that is trained, and the one that it bootstraps from."""

import copy
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, Self

from tensordict import TensorDictBase, TensorDictParams
from tensordict.nn import TensorDictModule
from tensordict.utils import NestedKey
from torch import Tensor
from torchrl.objectives.common import LossModule

from diffrl import keys
from diffrl.diffusion.denoisers import Denoiser
from diffrl.errors import InputError, InputKeyError, InputTypeError
from diffrl.objectives.annealing import Ranges, annealed, annealing
from diffrl.rl.estimators import require_time_last

__all__ = ["FAR_OFF", "DenoiserLoss", "far_off", "rows"]

FAR_OFF = 3.0
"""Factor between sigma_data and the data's standard deviation above which they do not fit: too large a sigma_data costs
about twice the error there."""
ENOUGH = 16  # data in a batch, to know their standard deviation well enough for that


def far_off(std: float, sigma_data: float) -> tuple[float, str]:
    """How far the data's standard deviation is from sigma_data, a factor ≥ 1 that `FAR_OFF` bounds, and the remedy."""
    ratio = std / sigma_data
    remedy = (
        f"sigma_data is {sigma_data:g}, but the data's standard deviation is {std:.3g}: set "
        f"denoiser.sigma_data={std:.3g}, with noise levels to match, or scale the data"
    )
    return max(ratio, 1 / ratio) if ratio > 0 else math.inf, remedy


class DenoiserLoss(LossModule):
    """A loss module that calls its networks directly: a functional call costs as much as a small network.

    The parameters that TorchRL registers and the networks' own remain the same tensors.

    Args:
        network: a module whose attribute `denoiser` is trained in place, in a TensorDictModule.
        target: whether to keep a target network, to be moved by TorchRL's `SoftUpdate` or `HardUpdate`.
        anneal: options that change along the training, see `diffrl.objectives.annealing.annealed`.

    Raises:
        TypeError: it is no denoiser: a bare network, for example.
        ValueError: what cannot be annealed, see `annealing`.
    """

    fed_with: ClassVar[str]
    """What makes the states that the loss takes, for its errors."""
    annealable: ClassVar[Ranges] = {}
    """Options that can change along the training."""
    takes_x0_mean: ClassVar[bool] = False
    """Whether an estimate of E[x0 | x_t] may stand in for the datum, see `diffrl.objectives.stand_ins.with_x0_mean`."""

    bootstrap: str = "nothing"
    """Whose predictions are in a target: "own", "target", a target network's, "residual", own with a gradient."""

    target_decay: float = 0.97
    """What a target network keeps of itself a step, unless `Target` says; it hurt no ground of `results/grounds`
    at equal steps."""

    data_std: float | None = None
    """Standard deviation of the data as D sees them, where it is known; None: the first batch's."""

    value_network: TensorDictModule
    value_network_params: TensorDictParams
    target_value_network_params: TensorDictParams

    def __init__(
        self,
        network: TensorDictModule,
        *,
        target: bool,
        anneal: Mapping[str, Sequence[float]] | None = None,
    ) -> None:
        super().__init__()
        self.anneal = annealing(anneal, self.annealable)
        denoiser = network.module.denoiser
        if not hasattr(denoiser, "process"):
            raise InputTypeError(
                f"{type(self).__name__} trains a denoiser, not a {type(denoiser).__name__}: "
                "give diffrl.Denoiser(network, process)"
            )
        self.convert_to_functional(network, "value_network", create_target_params=target)
        if target:
            self.__dict__["_target_network"] = copy.deepcopy(network).requires_grad_(False).eval()
        self._tie()
        self.network_evaluations = 0
        """States forwarded so far, over all networks."""
        self._seen = False

    @property
    def denoiser(self) -> Denoiser:
        """The denoiser that is trained."""
        return self.value_network.module.denoiser

    @property
    def bootstrap_network(self) -> TensorDictModule:
        """The target network where there is one, else the network itself."""
        return self.__dict__.get("_target_network", self.value_network)

    @property
    def moving(self) -> frozenset[str]:
        """Options whose value at present is a matter of how far the training is."""
        return frozenset(self.anneal)

    def set_progress(self, step: int, grad_steps: int) -> None:
        """Give annealed options their values at gradient step `step`, counted from 0, of `grad_steps`."""
        for name, values in self.anneal.items():
            self._set_option(name, annealed(values, step, grad_steps))

    def _set_option(self, name: str, value: float) -> None:
        setattr(self, name, value)

    def train(self, mode: bool = True) -> Self:
        """Switch the denoiser too; a target network stays in evaluation mode."""
        self.value_network.train(mode)
        return super().train(mode)

    def _first_look(self, x0: Tensor | None, cond: Tensor | None) -> None:
        """At the first batch: does the denoiser fit the data? x0 [B, ...].

        Raises:
            ValueError: the network takes labels, and there are none.
        """
        if self._seen:
            return
        denoiser, self._seen = self.denoiser, True
        num_classes = getattr(getattr(denoiser, "network", None), "num_classes", 0)
        if cond is None and num_classes:
            raise InputError(
                f"the network takes labels (num_classes={num_classes}), but cond is missing: draw the states with "
                f"cond=labels, where {num_classes} stands for no label"
            )
        sigma_data = getattr(denoiser, "sigma_data", None)
        std, limit = self.data_std, FAR_OFF
        if std is None and x0 is not None and len(x0) >= ENOUGH:
            std = float(x0.detach().std())
            limit *= 1 + 3 / math.sqrt(2 * len(x0))  # three standard errors of what a batch can tell
        if sigma_data and std is not None:
            off, remedy = far_off(std, sigma_data)
            if not off <= limit:
                warnings.warn(remedy, stacklevel=4)

    @contextmanager
    def _telling_what_is_missing(self, states: TensorDictBase) -> Iterator[None]:
        """Let a key error of what is done with states name all entries that the loss reads and that they lack.

        Raises:
            KeyError: there are any.
        """
        try:
            yield
        except KeyError:
            self._require_entries(states)
            raise

    def _count_drawing(self, states: TensorDictBase) -> None:
        """Count the network evaluations that drawing the states took."""
        evaluations = states.get(keys.EVALUATIONS, None)
        self.network_evaluations += 0 if evaluations is None else int(evaluations.sum())

    def left(self, states: TensorDictBase) -> tuple[Tensor, Tensor, Tensor | None]:
        """The states that a step trains on: x_t [N, *E], their times [N], and their conditions [N, ...] or None."""
        states = rows(states)
        cond = states.get(keys.COND, None)
        return (
            states[keys.X_T].flatten(0, 1),
            states[keys.T].flatten(),
            None if cond is None else cond.flatten(0, 1),
        )

    def _by_importance(self, given: TensorDictBase, states: TensorDictBase, loss: Tensor) -> Tensor:
        """The loss of each state, [B, K, 1] or [N], times its importance; as it was it is left in what was given."""
        if not given.is_locked:
            given[keys.LOSS] = loss.detach().view(given[keys.T].shape)
        importance = states.get(keys.IMPORTANCE, None)
        return loss if importance is None else importance.reshape(loss.shape) * loss

    def _may_lack(self, states: TensorDictBase) -> Iterable[NestedKey]:
        """Those of `in_keys` that these states need not have."""
        return ()

    def _require_entries(self, states: TensorDictBase) -> None:
        """Say which entries are missing.

        Raises:
            KeyError: at least one is.
        """
        there, optional = states.keys(True, True), self._may_lack(states)
        missing = [key for key in self.in_keys if key not in there and key not in optional]
        if missing:
            names = ", ".join(".".join(key) if isinstance(key, tuple) else key for key in missing)
            raise InputKeyError(
                f"{names} missing in what the loss is given: give the states of {self.fed_with}"
            )

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


def rows(states: TensorDictBase) -> TensorDictBase:
    """States [*b, K] as [B, K]; those that came as keywords, without a batch size, have that of their times.

    Raises:
        ValueError: there is no row of time, or nothing in it.
    """
    if states.ndim == 0:
        states = states.copy()
        states.batch_size = states[keys.T].shape[:-1]
    require_time_last(states)
    if states.batch_size.numel() == 0:
        raise InputError(f"batch size {list(states.batch_size)}: the batch is empty")
    return states.unsqueeze(0) if states.ndim == 1 else states.flatten(0, -2) if states.ndim > 2 else states
