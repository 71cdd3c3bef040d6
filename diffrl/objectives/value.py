"""Value learning: the denoiser is the value function of the chain, and every way to train it is a target."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from tensordict import TensorDict, TensorDictBase, TensorDictParams
from tensordict.nn import TensorDictModule, dispatch
from tensordict.utils import NestedKey
from torch import Tensor, nn
from torchrl.objectives.common import LossModule
from torchrl.objectives.utils import ValueEstimators, dispatch_value_estimator
from torchrl.objectives.value import ValueEstimatorBase

from diffrl import keys
from diffrl.denoisers import Denoiser
from diffrl.estimators import MonteCarlo, VectorEstimator, VectorEstimators
from diffrl.objectives.weights import WeightTerms, weight_function
from diffrl.shapes import event_mean, expand_like, require_floating

__all__ = ["ChainValue", "ValueLoss"]


class ChainValue(nn.Module):
    """V(x_t) = A D(x_t, t) + κ x_t on chains of any batch shape: the denoiser as a value function.

    Args:
        denoiser: D.
    """

    def __init__(self, denoiser: nn.Module) -> None:
        super().__init__()
        self.denoiser = denoiser

    def denoise(self, x_t: Tensor, t: Tensor, cond: Tensor | None) -> Tensor:
        """D for states [*b, *E], times [*b, 1] and conditions [*b, ...]."""
        b = t.ndim - 1
        cond = None if cond is None else cond.flatten(0, b - 1)
        return self.denoiser(x_t.flatten(0, b - 1), t.flatten(), cond).view_as(x_t)

    def forward(self, x_t: Tensor, t: Tensor, A: Tensor, kappa: Tensor, cond: Tensor | None = None) -> Tensor:
        """V, shape [*b, *E]; the arguments are the chain's entries of the same names."""
        D_x = self.denoise(x_t, t, cond)
        return expand_like(A, x_t) * D_x + expand_like(kappa, x_t) * x_t


class ValueLoss(LossModule):
    """Squared TD error of a denoiser on chains; the choice of target is the choice of training method.

        V_i = A_i D(x_i) + κ_i x_i,    δ_i = G_i - V_i,    loss = mean_i w_i ‖δ_i‖²/dim(E) + c L_den
        L_den = ‖D(x_i) - x0‖²/(c_out² dim(E))

    | target | is |
    |---|---|
    | λ = 1, `monte_carlo` | standard denoising: δ_i = A_i (x0 - D(x_i)) |
    | λ < 1, n-step, Markov coupling | TD for diffusion: the same fixed point, less target variance |
    | TD(0) on the 'clean' value, shared noise | consistency training |

    Where the chain holds x0 the loss is evaluated in the error coordinates e_i = A_i (x0 - D(x_i)), that is after
    potential-based shaping with Φ(x_i) = A_i x0 + κ_i x_i: then no κ x cancels in float32, and the reward that is
    left is (γ-1) Φ(x_{i+1}), which vanishes at γ = 1. With γ < 1 the fixed point is no denoiser.

    Sources: Temporal Difference Learning for Diffusion Models (2026), https://arxiv.org/abs/2606.15048; shaping:
    Policy Invariance Under Reward Transformations (Ng et al., 1999), Theorem 1.

    Args:
        denoiser: D, kept by reference and trained in place.
        lmbda: λ ∈ [0, 1] of TD(λ). Give this or `n_steps`; neither is TD(0).
        n_steps: n ≥ 1 of n-step TD.
        gamma: discount γ ∈ [0, 1].
        bootstrap: what the target's values come from: "own", the network's own prediction on the chain, gradient
            stopped, at no further evaluation; "target", a target network, to be moved by TorchRL's `SoftUpdate`
            or `HardUpdate`; "residual", own predictions with gradient through both ends.
        weight: name in `diffrl.objectives.weights.WEIGHTS`.
        denoising_coef: c ≥ 0, the added denoising loss. Where the chain marks a state not `valid`, its loss is
            (1 + c) L_den.

    Raises:
        ValueError: an argument outside its range, or both lmbda and n_steps.
    """

    @dataclass
    class _AcceptedKeys:
        value: NestedKey = keys.STATE_VALUE
        value_target: NestedKey = keys.VALUE_TARGET
        reward: NestedKey = keys.REWARD
        done: NestedKey = keys.DONE
        terminated: NestedKey = keys.TERMINATED

    default_keys = _AcceptedKeys
    tensor_keys: _AcceptedKeys
    out_keys = ["loss_value", "td_error"]
    value_network: TensorDictModule
    value_network_params: TensorDictParams
    target_value_network_params: TensorDictParams

    def __init__(
        self,
        denoiser: Denoiser,
        *,
        lmbda: float | None = None,
        n_steps: int | None = None,
        gamma: float = 1.0,
        bootstrap: Literal["own", "target", "residual"] = "own",
        weight: str = "edm",
        denoising_coef: float = 0.0,
    ) -> None:
        super().__init__()
        if bootstrap not in ("own", "target", "residual"):
            raise ValueError(f"bootstrap is {bootstrap!r}: give 'own', 'target' or 'residual'")
        if denoising_coef < 0:
            raise ValueError(f"denoising_coef is {denoising_coef}: it is a weight >= 0")
        if lmbda is not None and n_steps is not None:
            raise ValueError("give lmbda or n_steps, not both: they are two families of targets")
        self.bootstrap, self.denoising_coef, self.gamma = bootstrap, denoising_coef, gamma
        self._weight = weight_function(weight)
        value = ChainValue(denoiser)
        inputs = [keys.X_T, keys.T, keys.A, keys.KAPPA]
        network = TensorDictModule(value, inputs, [keys.STATE_VALUE])
        self.convert_to_functional(network, "value_network", create_target_params=bootstrap == "target")
        self.value_network.eval()  # only ever run on target parameters
        # the online network is called directly: a functional call costs as much as a small network
        self.__dict__["_online"] = value
        self.network_evaluations = 0
        """States forwarded so far, over all networks."""
        if lmbda is not None:
            self.make_value_estimator("td_lambda", lmbda=lmbda, gamma=gamma)
        else:
            self.make_value_estimator("n_step", n_steps=1 if n_steps is None else n_steps, gamma=gamma)

    @property
    def denoiser(self) -> Denoiser:
        """The denoiser that is trained."""
        return self.__dict__["_online"].denoiser

    @property
    def in_keys(self) -> list[NestedKey]:
        """Entries of the chain that the loss reads; x0, cond and valid are read where present."""
        k = self.tensor_keys
        state = [keys.X_T, keys.T, keys.A, keys.KAPPA]
        reached = [*state, k.reward, k.done, k.terminated]
        return [*state, *((keys.NEXT, name) for name in reached)]

    def make_value_estimator(self, value_type: Any = None, **hyperparams: Any) -> "ValueLoss":  # noqa: ANN401
        """Choose the target: "td_lambda" (lmbda), "n_step" (n_steps), "monte_carlo", or any estimator of TorchRL.

        Args:
            value_type: name, member of TorchRL's `ValueEstimators`, estimator class or instance.
            hyperparams: the estimator's own, e.g. ``lmbda=0.5``.
        """
        kind = VectorEstimators.N_STEP if value_type is None else value_type
        if isinstance(kind, ValueEstimatorBase) or (
            isinstance(kind, type) and issubclass(kind, ValueEstimatorBase)
        ):
            super().make_value_estimator(kind, **hyperparams)
            self._forward_value_estimator_keys()
            return self
        k = self.tensor_keys
        dispatch_value_estimator(
            self,
            kind,
            supported=(*VectorEstimators, ValueEstimators.TD0, ValueEstimators.TD1, ValueEstimators.TDLambda),
            value_network=self.value_network,
            tensor_keys={"value": k.value, "reward": k.reward, "done": k.done, "terminated": k.terminated},
            differentiable=self.bootstrap == "residual",
            **hyperparams,
        )
        return self

    def _forward_value_estimator_keys(self, **_: Any) -> None:  # noqa: ANN401
        if self._value_estimator is not None:
            k = self.tensor_keys
            self._value_estimator.set_keys(
                value=k.value,
                value_target=k.value_target,
                reward=k.reward,
                done=k.done,
                terminated=k.terminated,
            )

    @dispatch
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """The loss of a batch of chains [B, K], or of single transitions [B].

        Args:
            tensordict: what `diffrl.sample_chain` or an environment's rollout gives.

        Returns:
            TensorDict with the scalars ``loss_value`` and ``td_error``, the root mean square of δ.

        Raises:
            TypeError: x_t holds integers.
            KeyError: an entry is missing.
        """
        chain = tensordict if tensordict.ndim > 1 else tensordict.unsqueeze(1)
        x_t, A = chain.get(keys.X_T), chain.get(keys.A)
        require_floating([(keys.X_T, x_t)])
        D_x = self.__dict__["_online"].denoise(x_t, chain.get(keys.T), chain.get(keys.COND, None))
        self.network_evaluations += A.numel()
        x0 = chain.get(keys.X0, None)
        if isinstance(self.value_estimator, VectorEstimator):
            delta = self._delta(chain, D_x, x0)
        else:
            delta = self._torchrl_target(chain) - _value(chain, D_x)

        w, c_out = self._weights(chain)
        loss = w * _square_mean(delta, chain.ndim)
        if self.denoising_coef > 0 or keys.VALID in chain.keys():
            L_den = _square_mean(x0 - D_x, chain.ndim) / c_out**2
            c = self.denoising_coef
            valid = chain.get(keys.VALID, None)
            loss = (
                loss + c * L_den if valid is None else torch.where(valid, loss + c * L_den, (1 + c) * L_den)
            )
        td_error = delta.detach().square().mean().sqrt()
        return TensorDict({"loss_value": loss.mean(), "td_error": td_error})

    def _delta(self, chain: TensorDictBase, D_x: Tensor, x0: Tensor | None) -> Tensor:
        """δ, in error coordinates where x0 is known: value -e, reward (γ-1) Φ of the state reached."""
        reached, estimator = chain.get(keys.NEXT), self.value_estimator
        done, terminated = reached.get(self.tensor_keys.done), reached.get(self.tensor_keys.terminated)
        known = x0 is not None
        if known and isinstance(estimator, MonteCarlo):
            D_next = x0  # the tail beyond a cut window is known
        else:
            D_next = self._denoised_next(chain, D_x, terminated, done)
        if not known:
            V, V_next, reward = (
                _value(chain, D_x),
                _value(reached, D_next),
                reached.get(self.tensor_keys.reward),
            )
        else:
            A_next = expand_like(reached.get(keys.A), D_x)
            V = expand_like(chain.get(keys.A), D_x) * (D_x - x0)
            V_next = A_next * (D_next - x0)
            if estimator.gamma == 1:
                reward = V.new_zeros(()).expand_as(V)
            else:
                reward = (estimator.gamma - 1) * _value(reached, x0)  # 0 where terminated: A = κ = 0
        return estimator.returns(reward, V_next, terminated, done) - V

    def _denoised_next(self, chain: TensorDictBase, D_x: Tensor, terminated: Tensor, done: Tensor) -> Tensor:
        """D⁻ at the states reached; anything finite where they are clean."""
        boot = D_x if self.bootstrap == "residual" else D_x.detach()
        x_t, t, cond = chain.get(keys.X_T), chain.get(keys.T), chain.get(keys.COND, None)
        later = boot[:, 1:]
        if self.bootstrap == "target" and later.shape[1] > 0:
            later = self._bootstrap(x_t[:, 1:], t[:, 1:], None if cond is None else cond[:, 1:])
        boot = torch.cat([later, boot[:, -1:]], 1)
        # the state reached is the next row's, but for the last row and where a chain is cut inside the window
        missing = ~terminated
        missing[:, :-1] &= done[:, :-1]
        missing = missing.squeeze(-1)
        if bool(missing.any()):
            reached = chain.get(keys.NEXT)
            x_t, t = reached.get(keys.X_T)[missing], reached.get(keys.T)[missing]
            boot[missing] = self._bootstrap(x_t, t, None if cond is None else cond[missing])
        return boot

    def _bootstrap(self, x_t: Tensor, t: Tensor, cond: Tensor | None) -> Tensor:
        """D⁻ by a forward pass of its own."""
        self.network_evaluations += t.numel()
        if self.bootstrap == "residual":
            return self.__dict__["_online"].denoise(x_t, t, cond)
        with torch.no_grad():
            if self.bootstrap == "own":
                return self.__dict__["_online"].denoise(x_t, t, cond)
            with self.target_value_network_params.to_module(self.value_network):
                return self.value_network.module.denoise(x_t, t, cond)

    def _torchrl_target(self, chain: TensorDictBase) -> Tensor:
        """The target of an estimator of TorchRL, which wants flags of the reward's shape and evaluates by itself."""
        copy = chain.copy()
        reached = copy.get(keys.NEXT).copy()
        reward = reached.get(self.tensor_keys.reward)
        for flag in (self.tensor_keys.done, self.tensor_keys.terminated):
            reached.set(flag, expand_like(reached.get(flag), reward).expand_as(reward))
        if keys.COND in chain.keys():
            reached.set(keys.COND, chain.get(keys.COND))
        copy.set(keys.NEXT, reached)
        self.network_evaluations += reached.numel()
        return self.value_estimator.value_estimate(
            copy, target_params=self.target_value_network_params
        ).detach()

    def _weights(self, chain: TensorDictBase) -> tuple[Tensor, Tensor]:
        """The weight on δ² and c_out, each [B, K, 1]."""
        reached = chain.get(keys.NEXT)
        c_out = self.denoiser.scalings(chain.get(keys.T)).c_out
        c_out_next = self.denoiser.scalings(reached.get(keys.T)).c_out
        return self._weight(WeightTerms(chain.get(keys.A), reached.get(keys.A), c_out, c_out_next)), c_out


def _value(states: TensorDictBase, D_x: Tensor) -> Tensor:
    """V = A D + κ x."""
    A, kappa, x_t = states.get(keys.A), states.get(keys.KAPPA), states.get(keys.X_T)
    return expand_like(A, x_t) * D_x + expand_like(kappa, x_t) * x_t


def _square_mean(x: Tensor, batch_dims: int) -> Tensor:
    """‖x‖²/dim(E), shape [*b, 1]."""
    return event_mean(x.square(), batch_dims).unsqueeze(-1)
