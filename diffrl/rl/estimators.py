"""TorchRL value estimators over `diffrl.returns`: values of any shape, chosen by name in TorchRL's losses.

`loss.make_value_estimator("td_lambda", lmbda=0.5)`, `("n_step", n_steps=3)` (n = 1 is TD(0)) and
`("monte_carlo")`. TorchRL's own names ("td0", "td1", "tdlambda", "gae", ...) keep their meaning. Unlike TorchRL's
estimators, these accept `done` [*B, K, 1] beside a reward of any shape, accept λ = 0 and γ = 0, and compute in
float64 without rounding to float32. γ is 1 by default, the target has no gradient by default, and no parameter's
`requires_grad` is changed.
"""

import math
from abc import abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from enum import StrEnum
from typing import Any

import torch
import torchrl.objectives
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModule
from torch import Tensor
from torchrl.objectives import ValueEstimators
from torchrl.objectives.utils import register_value_estimator
from torchrl.objectives.value import ValueEstimatorBase

from diffrl.errors import InputError
from diffrl.ranges import require_int, require_number
from diffrl.rl.returns import (
    is_truncated,
    lambda_returns,
    monte_carlo_returns,
    n_step_returns,
)

__all__ = [
    "ESTIMATORS",
    "MonteCarlo",
    "NStep",
    "TDLambda",
    "VectorEstimator",
    "VectorEstimators",
    "require_time_last",
]


class VectorEstimators(StrEnum):
    """Names of the estimators, for `make_value_estimator` and for the list of those that a loss supports."""

    TD_LAMBDA = "td_lambda"
    N_STEP = "n_step"
    MONTE_CARLO = "monte_carlo"


class VectorEstimator(ValueEstimatorBase):
    """Target of a value of any shape, from a TensorDict of batch size [*B, K] whose last dim is time.

    It reads ("next", reward) [*B, K, *E], ("next", done) and ("next", terminated), bool [*B, K, 1], and the
    inputs of the value network in "next"; `set_keys` renames the entries.

    Args:
        value_network: module that writes the value; None if the TensorDict has ("next", value) already.
        gamma: discount γ in [0, 1].
        differentiable: whether the target has a gradient, as the full residual gradient needs.
        device: accepted because TorchRL's losses pass it; nothing here has a device of its own.
        deactivate_vmap: accepted because TorchRL's losses pass it; nothing here uses vmap.
    """

    def __init__(
        self,
        *,
        value_network: TensorDictModule | None,
        gamma: float = 1.0,
        differentiable: bool = False,
        device: torch.device | None = None,
        deactivate_vmap: bool = False,
    ) -> None:
        super().__init__(
            value_network=value_network,
            differentiable=differentiable,
            device=device,
            deactivate_vmap=deactivate_vmap,
        )
        require_number("gamma", gamma, 0, 1)
        self.gamma = float(gamma)  # TorchRL keeps a float32 buffer, which rounds

    @abstractmethod
    def returns(
        self,
        reward: Tensor | None,
        next_value: Tensor,
        terminated: Tensor | None,
        done: Tensor | None,
        reached: TensorDictBase | None = None,
    ) -> Tensor:
        """Targets [B, K, *E].

        Args:
            reward: as in `diffrl.returns`, and so are the next three.
            next_value: values of the states that the steps reach.
            terminated: where chains end; None: with their last step.
            done: where chains end or are cut.
            reached: the states that the steps reach, a TensorDict [B, K].
        """

    @abstractmethod
    def is_monte_carlo(self, num_steps: int) -> bool:
        """Whether a window of so many steps is summed to its end, so that values are read only where it is cut."""

    def value_estimate(
        self,
        tensordict: TensorDictBase,
        target_params: TensorDictBase | None = None,
        next_value: Tensor | None = None,
    ) -> Tensor:
        """Target of every state.

        The value network is not called if `next_value` is given, nor for Monte Carlo if every chain terminates.

        Args:
            tensordict: batch size [*B, K]; entries as in the class docstring.
            target_params: parameters for the value network; its own if not given.
            next_value: values of the states that the steps reach, [*B, K, *E].

        Returns:
            Targets, [*B, K, *E].

        Raises:
            ValueError: if shapes or dtypes do not fit, or the rewards are sums over several steps already.
            KeyError: if an entry is missing.
        """
        steps = self.tensor_keys.steps_to_next_obs
        if tensordict.get(steps, None) is not None:
            raise InputError(f"{steps!r} says that rewards are sums over several steps: give single steps")
        require_time_last(tensordict)
        *batch, K = tensordict.batch_size

        def chains(x: Tensor) -> Tensor:  # [*B, K, ...] → [B, K, ...]
            return x.reshape(math.prod(batch), *x.shape[len(batch) :])

        reached = tensordict["next"]
        reward = reached[self.tensor_keys.reward]
        done = chains(reached[self.tensor_keys.done])
        terminated = reached.get(self.tensor_keys.terminated, None)
        terminated = done if terminated is None else chains(terminated)
        with self._grad_mode():
            if next_value is None and self.is_monte_carlo(K) and not is_truncated(terminated, done):
                G = monte_carlo_returns(chains(reward), None, terminated, done, gamma=self.gamma)
            else:
                V = self._value(reached, target_params) if next_value is None else next_value
                states = reached if len(batch) == 1 else reached.reshape(-1, K)
                G = self.returns(chains(reward), chains(V), terminated, done, states)
        return G.reshape(reward.shape)

    def forward(
        self,
        tensordict: TensorDictBase,
        *,
        params: TensorDictBase | None = None,
        target_params: TensorDictBase | None = None,
    ) -> TensorDictBase:
        """Write "value_target" and "advantage", which is the target minus the value of the state before the step.

        Args:
            tensordict: batch size [*B, K]; entries as in the class docstring.
            params: parameters for the value network; its own ones if not given.
            target_params: parameters for the bootstrap; `params` if not given.

        Returns:
            The same TensorDict.
        """
        target = self.value_estimate(tensordict, params if target_params is None else target_params)
        with self._grad_mode():
            advantage = target - self._value(tensordict, params)
        tensordict.set(self.tensor_keys.value_target, target)
        tensordict.set(self.tensor_keys.advantage, advantage)
        return tensordict

    def _value(self, states: TensorDictBase, params: TensorDictBase | None) -> Tensor:
        network = self.value_network
        if network is None:
            return states[self.tensor_keys.value]
        inputs = states.select(*network.in_keys)
        with nullcontext() if params is None else params.to_module(network, preserve_module_state=False):
            return network(inputs)[self.tensor_keys.value]

    def _grad_mode(self) -> AbstractContextManager[Any]:
        # TorchRL's hold_out_net would make every parameter require a gradient afterwards.
        return nullcontext() if self.differentiable else torch.no_grad()


class TDLambda(VectorEstimator):
    """λ-returns as targets.

        Gₖ = rₖ + γ [(1 - λₖ) Vₖ₊₁ + λₖ Gₖ₊₁]

    Args:
        lmbda: λ in [0, 1]; or one for each step, a tensor of shape [1, K, 1] or [B, K, 1]; or a function that makes
            either from the states that the steps reach, a TensorDict [B, K].
        **options: those of `VectorEstimator`.
    """

    def __init__(self, *, lmbda: float | Tensor | Callable[[Any], float | Tensor], **options: Any) -> None:
        super().__init__(**options)
        if not (isinstance(lmbda, Tensor) or callable(lmbda)):
            require_number("lmbda", lmbda, 0, 1)
        self.lmbda = lmbda

    def returns(
        self,
        reward: Tensor | None,
        next_value: Tensor,
        terminated: Tensor | None,
        done: Tensor | None,
        reached: TensorDictBase | None = None,
    ) -> Tensor:
        """λ-returns [B, K, *E].

        Raises:
            ValueError: λ is a function of the states reached, and they are not given.
        """
        lmbda = self.lmbda
        if callable(lmbda):
            if reached is None:
                raise InputError("lmbda is a function of the states reached: give them")
            lmbda = lmbda(reached)
        return lambda_returns(reward, next_value, terminated, done, lmbda=lmbda, gamma=self.gamma)

    def is_monte_carlo(self, num_steps: int) -> bool:
        """True for the number λ = 1."""
        return isinstance(self.lmbda, float | int) and self.lmbda == 1


class NStep(VectorEstimator):
    """n-step returns as targets; n = 1 is TD(0).

        Gₖ = rₖ + … + γⁿ⁻¹ rₖ₊ₙ₋₁ + γⁿ Vₖ₊ₙ

    Args:
        n_steps: n ≥ 1.
        **options: those of `VectorEstimator`.
    """

    def __init__(self, *, n_steps: int, **options: Any) -> None:
        super().__init__(**options)
        require_int("n_steps", n_steps)
        self.n_steps = n_steps

    def returns(
        self,
        reward: Tensor | None,
        next_value: Tensor,
        terminated: Tensor | None,
        done: Tensor | None,
        reached: TensorDictBase | None = None,
    ) -> Tensor:
        """n-step returns [B, K, *E]."""
        return n_step_returns(reward, next_value, terminated, done, n_steps=self.n_steps, gamma=self.gamma)

    def is_monte_carlo(self, num_steps: int) -> bool:
        """True if n is at least the length of the window."""
        return self.n_steps >= num_steps


class MonteCarlo(VectorEstimator):
    """Monte Carlo returns as targets: all rewards until the chain stops; a chain that is cut bootstraps there.

    Gₖ = rₖ + γ Gₖ₊₁

    The arguments are those of `VectorEstimator`.
    """

    def returns(
        self,
        reward: Tensor | None,
        next_value: Tensor,
        terminated: Tensor | None,
        done: Tensor | None,
        reached: TensorDictBase | None = None,
    ) -> Tensor:
        """Monte Carlo returns [B, K, *E]."""
        return monte_carlo_returns(reward, next_value, terminated, done, gamma=self.gamma)

    def is_monte_carlo(self, num_steps: int) -> bool:
        """True for every window."""
        return True


ESTIMATORS: dict[str, type[VectorEstimator]] = {
    VectorEstimators.TD_LAMBDA: TDLambda,
    VectorEstimators.N_STEP: NStep,
    VectorEstimators.MONTE_CARLO: MonteCarlo,
}


def require_time_last(states: TensorDictBase) -> None:
    """Refuse states whose last batch dim is not time, by its name; a new dim [N, 1] makes each state a row of its own.

    Raises:
        ValueError: it is not, or there is no batch dim.
    """
    single = states.ndim > 1 and states.shape[-1] == 1 and states.names[-1] is None
    if states.ndim == 0 or ("time" in states.names[:-1] and not single):
        raise InputError(f"batch size {list(states.batch_size)}: the last dim must be time, [*b, K]")


def _register() -> None:
    # TorchRL keeps two lists: the estimators that exist, and those that a loss takes. Ours join both.
    for name, estimator in ESTIMATORS.items():
        register_value_estimator(name)(estimator)
    for loss in vars(torchrl.objectives).values():
        supported = vars(loss).get("SUPPORTED_VALUE_ESTIMATORS", ()) if isinstance(loss, type) else ()
        # Not Dreamer's losses, which read gamma as the buffer of TorchRL's estimators, nor DiscreteCQLLoss,
        # which hands over an argument that those ignore.
        if ValueEstimators.TDLambda in supported and not loss.__name__.startswith(("Dreamer", "DiscreteCQL")):
            loss.SUPPORTED_VALUE_ESTIMATORS = tuple(dict.fromkeys((*supported, *ESTIMATORS)))


_register()
