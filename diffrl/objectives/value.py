"""Value learning: the denoiser is the value function of the chain, and every way to train it is a target."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import dispatch
from tensordict.utils import NestedKey
from torch import Tensor
from torchrl.objectives.utils import ValueEstimators, dispatch_value_estimator
from torchrl.objectives.value import ValueEstimatorBase

from diffrl import keys
from diffrl.diffusion.denoisers import Denoiser
from diffrl.errors import InputError, InputKeyError, InputTypeError
from diffrl.objectives.annealing import Ranges, begun
from diffrl.objectives.chain_value import state_value, value_module
from diffrl.objectives.denoiser_loss import DenoiserLoss, rows
from diffrl.objectives.lambda_schedule import LambdaSchedule
from diffrl.objectives.lookahead import Lookahead
from diffrl.objectives.target_choice import chosen_lmbda
from diffrl.objectives.weights import MAX_COEF, ChainTerms, weight_function
from diffrl.ranges import MAX_STEPS, require_number
from diffrl.rl.estimators import MonteCarlo, VectorEstimator, VectorEstimators
from diffrl.rl.returns import is_truncated, mixed_returns
from diffrl.shapes import expand_like, require_floating

__all__ = ["ValueLoss"]


class ValueLoss(DenoiserLoss):
    """Squared TD error of a denoiser on chains; the choice of target is the choice of training method.

        V_i = A_i D(x_i) + κ_i x_i,    δ_i = G_i - V_i,    loss = mean_i w_i ‖δ_i‖²/dim(E) + c L_den
        G_i = (1-s) G_i^MC + s G_i^TD,    L_den = ‖D(x_i) - x0‖²/(c_out² dim(E))

    | target | is |
    |---|---|
    | λ = 1, `monte_carlo` | the loss of standard denoising: δ_i = A_i (x0 - D(x_i)) |
    | λ < 1, n-step, Markov coupling | TD for diffusion: the same fixed point, less target variance |
    | TD(0) on the 'clean' value, shared noise | consistency training |

    Where the chain holds x0 the loss is evaluated in the error coordinates e_i = A_i (x0 - D(x_i)), that is
    after potential-based shaping with Φ(x_i) = A_i x0 + κ_i x_i: then no κ x cancels in float32, and the
    reward that is left is (γ-1) Φ(x_{i+1}), which is 0 at γ = 1. With γ < 1 the fixed point is no denoiser.

    A chain may hold an estimate S_i of E[x0 | x_i] under ``x0_mean`` (see `with_x0_mean`). It then stands in for x0
    in every reward, which adds (A_i - A_{i+1}) (S_i - x0) to the one above, and in L_den. `monte_carlo` becomes plain
    regression on S, δ_i = A_i (S_i - D(x_i)). λ = 1 and n ≥ K are the *telescoped* form of it instead,
    G_i = Σ_{j≥i} (A_j - A_{j+1}) S_j: each reward on the way has the S of its own state. Both are unbiased if S is.

    Sources: Temporal Difference Learning for Diffusion Models (2026), https://arxiv.org/abs/2606.15048;
    shaping: Policy Invariance Under Reward Transformations (Ng et al., 1999), Theorem 1.

    Args:
        denoiser: D, kept by reference and trained in place.
        lmbda: λ ∈ [0, 1] of TD(λ), or a `LambdaSchedule`. Give this, `n_steps` or `lookahead`; none is a look-ahead of
            an eighth of the chain.
        n_steps: n ≥ 1 of n-step TD.
        lookahead: h ∈ (0, 1] of TD(λ) with λ = max(0, 1 - 1/(hK)) on rows of K steps: how far ahead the target looks on
            average, as a share of the chain, see `diffrl.objectives.lookahead.Lookahead`.
        gamma: discount γ ∈ [0, 1].
        bootstrap: what the target's values come from: "own", the network's own prediction on the chain, gradient
            stopped, at no further evaluation, which stalls from 32 dimensions on (at small rates not with β1 = 0.5);
            "target", a target network in evaluation mode, to be moved by TorchRL's `SoftUpdate` or `HardUpdate`;
            "residual", own predictions with gradient through both ends: the biased form, whose minimum is no denoiser
            where the next state is random (`DoubleSamplingLoss` is the unbiased one).
        weight: name in `diffrl.objectives.weights.WEIGHTS`.
        weight_options: numbers of that weight, e.g. ``{"gamma": 0.5}`` for "p2".
        denoising_coef: c ∈ [0, 1e6], the added denoising loss. Where the chain marks a state not `valid`, its loss
            is (1 + c) L_den.
        bootstrap_share: s ∈ [0, 1], how much of the target is bootstrapped; the rest is the Monte Carlo return. 0 is
            Monte Carlo, at no evaluation for the target.
        anneal: options that change along the training, each with its values at evenly spaced points of it, linear
            between: lmbda, n_steps (rounded), bootstrap_share, denoising_coef; e.g. ``{"lmbda": [1, 0.5, 0]}``.
            In a loop of your own call ``loss.set_progress(step, grad_steps)`` before every step.

    Raises:
        ValueError: an argument outside its range, or more than one of lmbda, n_steps and lookahead.
    """

    @dataclass
    class _AcceptedKeys:
        reward: NestedKey = keys.REWARD
        done: NestedKey = keys.DONE
        terminated: NestedKey = keys.TERMINATED

    fed_with = (
        "diffrl.sample_chain(process, x0, num_steps=18) (recorded steps get A and kappa by "
        "diffrl.diffusion.add_coefficients)"
    )
    annealable: ClassVar[Ranges] = {
        **{"lmbda": (0, 1), "n_steps": (1, MAX_STEPS)},
        **{"bootstrap_share": (0, 1), "denoising_coef": (0, MAX_COEF)},
    }
    takes_x0_mean = True
    default_keys = _AcceptedKeys
    tensor_keys: _AcceptedKeys
    out_keys = ["loss_value", "td_error"]

    def __init__(
        self,
        denoiser: Denoiser,
        *,
        lmbda: float | LambdaSchedule | None = None,
        n_steps: int | None = None,
        lookahead: float | None = None,
        gamma: float = 1.0,
        bootstrap: Literal["own", "target", "residual"] = "own",
        weight: str = "edm",
        weight_options: Mapping[str, float] | None = None,
        denoising_coef: float = 0.0,
        bootstrap_share: float = 1.0,
        anneal: Mapping[str, Sequence[float]] | None = None,
    ) -> None:
        if bootstrap not in ("own", "target", "residual"):
            raise InputError(f"bootstrap is {bootstrap!r}: give 'own', 'target' or 'residual'")
        require_number("denoising_coef", denoising_coef, 0, MAX_COEF)
        require_number("bootstrap_share", bootstrap_share, 0, 1)
        super().__init__(value_module(denoiser), target=bootstrap == "target", anneal=anneal)
        lmbda, n_steps = begun(self.anneal, "lmbda", lmbda), begun(self.anneal, "n_steps", n_steps)
        λ = chosen_lmbda(lmbda, n_steps, lookahead)
        self.lookahead = λ.share if isinstance(λ, Lookahead) else None
        self.bootstrap, self.denoising_coef, self.gamma = bootstrap, denoising_coef, gamma
        self.bootstrap_share = bootstrap_share
        self._weight: Callable[..., Tensor] = weight_function(weight, weight_options)
        if n_steps is not None:
            n_steps = round(n_steps) if "n_steps" in self.anneal else n_steps
            self.make_value_estimator("n_step", n_steps=n_steps)
        else:
            self.make_value_estimator("td_lambda", lmbda=λ)
        self.set_progress(0, 1)

    def _set_option(self, name: str, value: float) -> None:
        if name not in ("lmbda", "n_steps"):
            return super()._set_option(name, value)
        estimator = self.value_estimator
        if not (isinstance(estimator, VectorEstimator) and hasattr(estimator, name)):
            raise InputError(f"anneal.{name}: the target {type(estimator).__name__} has no {name}")
        setattr(estimator, name, round(value) if name == "n_steps" else value)

    @property
    def is_monte_carlo(self) -> bool:
        """Whether nothing is bootstrapped, by the choice of the estimator."""
        return isinstance(self.value_estimator, MonteCarlo)

    @property
    def in_keys(self) -> list[NestedKey]:
        """Entries of the chain that the loss reads; x0, x0_mean, cond and valid are read where present."""
        k = self.tensor_keys
        state = [keys.X_T, keys.T, keys.A, keys.KAPPA]
        reached = [*state, k.reward, k.done, k.terminated]
        return [*state, *((keys.NEXT, name) for name in reached)]

    def make_value_estimator(self, value_type: Any = None, **hyperparams: Any) -> "ValueLoss":  # noqa: ANN401
        """Choose the target: "td_lambda" (lmbda), "n_step" (n_steps), "monte_carlo", or one of TorchRL's.

        Args:
            value_type: name, member of TorchRL's `ValueEstimators` (TD0, TD1, TDLambda), or an estimator,
                class or instance; None is "td_lambda".
            hyperparams: the estimator's own, e.g. ``lmbda=0.5``. With a name, or a class of `VectorEstimator`, gamma
                defaults to the loss's; the λ of "td_lambda" to a look-ahead of an eighth of the chain.
        """
        if value_type in (None, VectorEstimators.TD_LAMBDA):
            default = chosen_lmbda(None, None, None)
            value_type, hyperparams = VectorEstimators.TD_LAMBDA, {"lmbda": default, **hyperparams}
        lmbda = hyperparams.get("lmbda")
        if isinstance(lmbda, LambdaSchedule):
            hyperparams["lmbda"] = lmbda.of_states(self.denoiser.process)
        if isinstance(value_type, type) and issubclass(value_type, VectorEstimator):
            ours = {"value_network": self.value_network, "gamma": self.gamma}
            hyperparams = {**ours, "differentiable": self.bootstrap == "residual", **hyperparams}
        if isinstance(value_type, ValueEstimatorBase | type):
            super().make_value_estimator(value_type, **hyperparams)
        else:
            torchrl = (ValueEstimators.TD0, ValueEstimators.TD1, ValueEstimators.TDLambda)
            dispatch_value_estimator(
                self,
                value_type,
                supported=(*VectorEstimators, *torchrl),
                value_network=self.value_network,
                differentiable=self.bootstrap == "residual",
                **hyperparams,
            )
        self._forward_value_estimator_keys()
        return self

    def _forward_value_estimator_keys(self, **_: Any) -> None:  # noqa: ANN401
        if self._value_estimator is not None:
            k = self.tensor_keys
            names = {"reward": k.reward, "done": k.done, "terminated": k.terminated}
            self._value_estimator.set_keys(value=keys.STATE_VALUE, **names)

    @dispatch(auto_batch_size=False)
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """The loss of a batch of chains [*b, K]: as in TorchRL, the last dim is time and `done` ends a chain.

        So [60] is one row of time, as a single environment's rollout has it. Single transitions are [N, 1]:
        ``transitions.unsqueeze(-1)``.

        Args:
            tensordict: what `diffrl.sample_chain` or an environment's rollout gives.

        Returns:
            TensorDict with the scalars ``loss_value`` and ``td_error``, the root mean square of δ.

        Raises:
            TypeError: x_t holds integers, or is of float16.
            KeyError: an entry is missing.
            ValueError: the batch is empty; a step does not begin where the one before it ended; a Monte Carlo
                target of a chain that is cut, without x0 or with γ < 1; a network that takes labels, without any.
        """
        with self._telling_what_is_missing(tensordict):
            return self._loss(tensordict)

    def _may_lack(self, states: TensorDictBase) -> tuple[NestedKey, ...]:
        return () if keys.X0 not in states.keys() else ((keys.NEXT, self.tensor_keys.reward),)

    def _loss(self, tensordict: TensorDictBase) -> TensorDictBase:
        chain = rows(tensordict)
        self.look_at(chain[keys.X_T], chain.get(keys.X0, None), chain.get(keys.COND, None))
        drawn = chain.get(keys.EVALUATIONS, None)
        self.network_evaluations += chain[keys.T].numel() + (0 if drawn is None else int(drawn.sum()))
        D_x, δ = self._errors(chain)
        w, q = self.coefficients(chain, ChainTerms(chain, self.denoiser))
        square = _square_mean(δ)
        loss = w * square if q is None else w * square + q * _square_mean(D_x - _datum(chain))
        loss_value = self._by_importance(tensordict, chain, loss).mean()
        return TensorDict({"loss_value": loss_value, "td_error": square.detach().mean().sqrt()})

    def look_at(self, x_t: Tensor, x0: Tensor | None, cond: Tensor | None) -> None:
        """Check what a step is about to train on.

        Raises:
            TypeError: x_t holds integers, or is of float16.
            ValueError: the network takes labels, and there are none.
        """
        require_floating([(keys.X_T, x_t)])
        if x_t.dtype == torch.float16:
            raise InputTypeError("x_t has dtype float16, in which squares overflow: give x0.float()")
        self._first_look(x0, cond)

    def coefficients(
        self, chain: TensorDictBase | Mapping[str, Any], terms: ChainTerms
    ) -> tuple[Tensor, Tensor | None]:
        """Each state's weights w of ‖δ‖² and q of ‖x0 - D‖², [B or 1, K, 1]; q is None without denoising.

            q = c/c_out²,    and w = 0, q = (1 + c)/c_out² where a pair is not valid

        Raises:
            KeyError: the denoising loss is asked for of chains that have lost x0.
        """
        w, c, valid = self._weight(terms), self.denoising_coef, chain.get(keys.VALID, None)
        if c == 0 and valid is None:
            return w, None
        if chain.get(keys.X0, None) is None:
            raise InputKeyError(
                "the denoising loss needs x0, which this chain has lost: set denoising_coef=0"
            )
        per_error = terms.c_out**-2
        if valid is None:
            return w, c * per_error
        return w.masked_fill(~valid, 0.0), c * per_error + per_error.masked_fill(valid, 0.0)

    @torch.no_grad()
    def target(self, states: TensorDictBase) -> Tensor:
        """Where the loss of a state is least in D(x_t) alone: [B K, *E] of chains [B, K] with x0.

        y = (p (D + δ/A) + q x0)/(p + q),    p = w A², w and q of `coefficients`
        """
        chain = rows(states)
        D_x, δ = self._errors(chain)
        x0, terms = _datum(chain), ChainTerms(chain, self.denoiser)
        w, q = self.coefficients(chain, terms)
        p = w * terms.A**2
        share = torch.ones_like(p) if q is None else p / (p + q)
        return torch.lerp(x0, D_x + δ / expand_like(terms.A, x0), expand_like(share, x0)).flatten(0, 1)

    def _errors(self, chain: TensorDictBase) -> tuple[Tensor, Tensor]:
        """D(x_t) and δ."""
        bootstraps = self.bootstrap_share > 0 and not self.is_monte_carlo
        if bootstraps:
            self._require_order(chain)
        # a target network comes first: what is kept for the backward pass then takes the memory that it frees
        D_next = self._target_next(chain) if bootstraps and self.bootstrap == "target" else None
        D_x = self.value_network.module.denoise(chain[keys.X_T], chain[keys.T], chain.get(keys.COND, None))
        return D_x, self._delta(chain, D_x, chain.get(keys.X0, None), D_next)

    def _delta(self, chain: TensorDictBase, D_x: Tensor, x0: Tensor | None, D_next: Tensor | None) -> Tensor:
        """δ, in error coordinates where x0 is known: value -e, reward (γ-1) Φ of the state reached."""
        estimator, reached, k = self.value_estimator, chain[keys.NEXT], self.tensor_keys
        done, terminated = reached[k.done], reached[k.terminated]
        if self.is_monte_carlo or self.bootstrap_share < 1:
            datum = chain.get(keys.X0_MEAN, x0)
            if datum is not None and estimator.gamma == 1:
                if self.is_monte_carlo or self.bootstrap_share == 0:
                    return expand_like(chain[keys.A], D_x) * (
                        datum - D_x
                    )  # the tail beyond a cut is known too
            elif is_truncated(terminated, done):
                raise InputError(
                    "the Monte Carlo return of a chain that is cut is known only from x0 and for gamma=1: "
                    "draw whole chains, or bootstrap at the cut by td_lambda with lmbda=1"
                )
        if D_next is None:
            D_next = self._own_next(chain, D_x)
        if x0 is not None and isinstance(estimator, VectorEstimator):
            A, A_next = expand_like(chain[keys.A], D_x), expand_like(reached[keys.A], D_x)
            gamma = estimator.gamma
            # 0 where terminated: A = κ = 0
            reward = None if gamma == 1 else (gamma - 1) * state_value(reached, x0)
            S = chain.get(keys.X0_MEAN, None)
            if S is not None:
                paid = (A - A_next) * (S - x0)
                reward = paid if reward is None else reward + paid
            e_next = A_next * (D_next - x0)
            G = estimator.returns(reward, e_next, terminated, done, reached)
            G = mixed_returns(G, self.bootstrap_share, reward, terminated, done, gamma=gamma)
            return G + A * (x0 - D_x)
        V_next = state_value(reached, D_next)
        if isinstance(estimator, VectorEstimator):
            G = estimator.returns(reached[k.reward], V_next, terminated, done, reached)
        else:
            G = self._torchrl_returns(reached, V_next)
        if self.bootstrap_share < 1:
            steps = (reached[k.reward], terminated, done)
            G = mixed_returns(G, self.bootstrap_share, *steps, gamma=float(estimator.gamma))
        return G - state_value(chain, D_x)

    def _require_order(self, chain: TensorDictBase) -> None:
        """Every step but one that ends a chain leads to the state that the next one leaves."""
        reached = chain[keys.NEXT]
        same = reached[keys.T][:, :-1] == chain[keys.T][:, 1:]
        if not bool((same | reached[self.tensor_keys.done][:, :-1]).all()):
            raise InputError(
                "the last batch dim is time, but a step does not begin where the one before it ended: "
                "give single transitions as [N, 1], by transitions.unsqueeze(-1)"
            )

    def _own_next(self, chain: TensorDictBase, D_x: Tensor) -> Tensor:
        """D⁻ at the states reached, by the predictions at hand; anything finite where they are clean."""
        boot = D_x if self.bootstrap == "residual" else D_x.detach()
        return self._at_cuts(chain, boot.roll(-1, 1))  # the state reached is the one left by the next step

    def _target_next(self, chain: TensorDictBase) -> Tensor:
        """D⁻ at the states reached, by the target network; 0 where they are clean or not looked at."""
        estimator, x_t, t = self.value_estimator, chain[keys.X_T], chain[keys.T]
        K, boot = t.shape[1], torch.zeros_like(x_t)
        if K > 1 and not (isinstance(estimator, VectorEstimator) and estimator.is_monte_carlo(K)):
            cond = chain.get(keys.COND, None)
            later = None if cond is None else cond[:, 1:]
            boot[:, :-1] = self._bootstrap(x_t[:, 1:], t[:, 1:], later)
        return self._at_cuts(chain, boot)

    def _at_cuts(self, chain: TensorDictBase, boot: Tensor) -> Tensor:
        """D⁻ that is evaluated where a chain is cut, and at the end of the window: no step leaves that state."""
        reached, k = chain[keys.NEXT], self.tensor_keys
        done, terminated = reached[k.done], reached[k.terminated]
        if not (torch.equal(done, terminated) and bool(terminated[:, -1].all())):
            cut = (done & ~terminated).squeeze(-1)
            cut[:, -1] = ~terminated[:, -1, 0]
            cond = chain.get(keys.COND, None)
            at_cut = None if cond is None else cond[cut]
            boot[cut] = self._bootstrap(reached[keys.X_T][cut], reached[keys.T][cut], at_cut)
        return boot

    def _bootstrap(self, x_t: Tensor, t: Tensor, cond: Tensor | None) -> Tensor:
        """D⁻ by a forward pass of its own."""
        self.network_evaluations += t.numel()
        network = self.bootstrap_network
        with nullcontext() if self.bootstrap == "residual" else torch.no_grad():
            return network.module.denoise(x_t, t, cond)

    def _torchrl_returns(self, reached: TensorDictBase, V_next: Tensor) -> Tensor:
        """The target of an estimator of TorchRL, which wants flags of the reward's shape."""
        k = self.tensor_keys
        reward = reached[k.reward]
        flags = {f: expand_like(reached[f], reward).expand_as(reward) for f in (k.done, k.terminated)}
        steps = TensorDict({keys.NEXT: {k.reward: reward, **flags}}, reached.batch_size)
        G = self.value_estimator.value_estimate(steps, next_value=V_next)
        return G if self.bootstrap == "residual" else G.detach()


def _datum(chain: TensorDictBase | Mapping[str, Any]) -> Tensor:
    """What denoising regresses on: x0, or an estimate of E[x0 | x_t] that stands in for it."""
    found: Tensor | None = chain.get(keys.X0_MEAN, None)
    return chain[keys.X0] if found is None else found


def _square_mean(x: Tensor) -> Tensor:
    """‖x‖²/dim(E), [B, K, *E] → [B, K, 1]."""
    return x.square().flatten(2).mean(-1, keepdim=True)
