"""Bias and variance of what a flow map or a consistency function is pulled to, against the exact one."""

from typing import Any, Protocol, cast, runtime_checkable

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Generator, Tensor, nn

from diffrl import keys
from diffrl.diffusion.exact import MixtureDenoiser
from diffrl.diffusion.exact_maps import ExactFlowMap
from diffrl.errors import InputError
from diffrl.metrics.target_draws import OwnRows, parts, require_draws, squares
from diffrl.objectives.transitions import Transition
from diffrl.shapes import expand_like

__all__ = ["HasTarget", "map_target_errors"]

RTOL = 1e-6  # of the exact map: far below what any target is off by


@runtime_checkable
class HasTarget(Protocol):
    """A loss that can say what it pulls its network to."""

    def target(self, states: TensorDictBase) -> Tensor:
        """In units of the clean estimate, [N, *E] of states [N, 1]; of chains [B, K] there are N = B K."""
        ...


@torch.no_grad()
def map_target_errors(
    loss: nn.Module,
    states: TensorDict,
    oracle: MixtureDenoiser,
    *,
    transition: Transition | None = None,
    draws: int = 16,
    batch_size: int | None = None,
    generator: Generator | None = None,
) -> dict[str, float]:
    """Squared bias and variance of the targets of single states or pairs, given each state and its times.

        bias² = ‖E[y | x_t] - D*‖²/c_out²,    variance = E‖y - E[y | x_t]‖²/c_out²,    total = bias² + variance
        own = ‖D - D*‖²/c_out²

    each summed over dims and averaged over states. y is the target in units of the clean estimate, D* the exact average
    one on the way from t to r, (X*_{t→r} - κ x)/A, which for a consistency function is X*_{t→0}. So all are in units of
    the value error. Each draw gives every state another datum, drawn from the exact law of x0 given x_t, and with it
    another noise, so that x_t stays. The variance of a mean of M draws, variance/M, is taken off the squared bias,
    which may be negative therefore. What is bootstrapped comes from the loss's own networks as they are: of a network
    that is exact the bias is the scheme's own, of a trained one it holds what the network is off by where it is asked.

    Args:
        loss: of flow maps, or of consistency training; see `HasTarget`.
        states: what the objective draws, batch size [S, 1]; without labels.
        oracle: the exact denoiser of the law, on the loss's process.
        transition: what makes the second states of pairs, where the objective has one.
        draws: M ≥ 2.
        batch_size: data of a training batch, which is what a transition refers to unless it says how many rows; None:
            as many as there are states.
        generator: source of randomness, of the states' device.

    Returns:
        ``bias_sq``, ``variance``, ``total``, ``own``.

    Raises:
        ValueError: fewer than two draws, or a loss that has no target of this kind.
    """
    require_draws(draws)
    if not isinstance(loss, HasTarget):
        raise InputError(f"{type(loss).__name__} does not say what it pulls its network to")
    x, t = states[keys.X_T].flatten(0, 1), states[keys.T].flatten()
    r = states[keys.R].flatten() if keys.R in states.keys() else torch.zeros_like(t)
    exact = _exact(oracle, x, t, r)
    data = oracle.sample_posterior(x.double(), t.double(), draws, generator)
    spent = getattr(loss, "network_evaluations", 0)
    rows = len(x) if batch_size is None else batch_size
    y = [_target(loss, states, x0.to(x), transition, oracle, rows, generator) for x0 in data.unbind(1)]
    cast(Any, loss).network_evaluations = spent
    second = (r,) if keys.R in states.keys() else ()
    D = cast(Any, loss).denoiser
    own = squares(D(x, t, None, *second).double() - exact, oracle.process, t, D.sigma_data)
    return {**parts(torch.stack(y), exact, oracle.process, t, D.sigma_data), "own": float(own.mean())}


def _exact(oracle: MixtureDenoiser, x: Tensor, t: Tensor, r: Tensor) -> Tensor:
    """D*(x, t, r), float64."""
    return ExactFlowMap(oracle, rtol=RTOL)(x.double(), t.double(), None, r.double())


def _target(
    loss: HasTarget,
    states: TensorDict,
    x0: Tensor,
    transition: Transition | None,
    oracle: MixtureDenoiser,
    rows: int,
    generator: Generator | None,
) -> Tensor:
    """What the loss pulls to at the same states with other data x0 [S, *E]."""
    again, datum = states.clone(), x0.unsqueeze(1)
    x, t = states[keys.X_T], states[keys.T]
    again[keys.X0] = datum
    if keys.V in states.keys():
        again[keys.V] = (x - datum) / expand_like(t, x)
    else:  # a pair that shares its noise, in EDM
        s = states[keys.NEXT, keys.T]
        again[keys.NEXT, keys.X_T] = torch.lerp(datum, x, expand_like(s / t, x))
    if transition is not None:
        n = transition.reference or rows
        law = OwnRows(oracle, x0, n, generator) if transition.source == "reference" else None
        again = transition(again, generator=generator or Generator(), law=law)
    return loss.target(again)
