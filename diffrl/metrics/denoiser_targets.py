"""Bias and variance of what a denoiser is pulled to, along chains, at pairs and at twin steps, against D*."""

from collections.abc import Callable, Iterator
from inspect import signature
from typing import Any, Protocol, runtime_checkable

import torch
from tensordict import TensorDict
from torch import Generator, Tensor

from diffrl import keys
from diffrl.diffusion.chains import Chain
from diffrl.diffusion.exact import MixtureDenoiser
from diffrl.diffusion.posterior import coupling_eta, marginal, posterior
from diffrl.diffusion.trajectories import ChainSampler, draw_chain
from diffrl.metrics.target_draws import OwnRows, parts, require_draws
from diffrl.objectives.double_sampling import DoubleSamplingLoss
from diffrl.objectives.stand_ins import StandInChains
from diffrl.objectives.td_edm import sample_td_edm_pairs
from diffrl.objectives.value import ValueLoss
from diffrl.rl.estimators import MonteCarlo
from diffrl.shapes import expand_like

__all__ = ["denoiser_target_errors"]

Target = Callable[[TensorDict, Tensor], Tensor]


@runtime_checkable
class Onwards(Protocol):
    """A draw whose steps can be drawn again from states that are held."""

    def states(self, x0: Tensor, *, cond: Tensor | None, generator: Generator) -> TensorDict:
        """Those that steps leave."""
        ...

    def onwards(self, states: TensorDict, *, generator: Generator) -> TensorDict:
        """Steps from them."""
        ...


@torch.no_grad()
def denoiser_target_errors(
    loss: ValueLoss | DoubleSamplingLoss,
    draw: Any,  # noqa: ANN401
    oracle: MixtureDenoiser,
    x0: Tensor,
    *,
    draws: int = 16,
    batch_size: int | None = None,
    generator: Generator,
) -> dict[str, float]:
    """Squared bias and variance of the point that D(x_t) is pulled to, `loss.target`, given each state and its time.

        bias² = ‖E[y | x_t] - D*‖²/c_out²,    variance = E‖y - E[y | x_t]‖²/c_out²,    total = bias² + variance

    each summed over dims and averaged over states. Each draw gives every state another datum, from the exact law of x0
    given x_t, and continues from x_t with new noise, to whatever the loss looks at. Of chains each level has its share
    of the states, which begin a window as long as the training's, or the rest of the chain.

    Args:
        loss: of a denoiser.
        draw: what draws its states.
        oracle: the exact denoiser of the law.
        x0: clean data without labels, shape [S, *E].
        draws: M ≥ 2.
        batch_size: data of a training batch, which is what stand-ins refer to unless they say how many rows; None: S.
        generator: source of randomness.

    Returns:
        ``bias_sq``, ``variance``, ``total``. Empty where what leads on from a held state is not known: of draws that
        are not the library's, or whose states the model made.

    Raises:
        ValueError: fewer than two draws.
    """
    require_draws(draws)
    spent = loss.network_evaluations
    try:
        cases = list(_cases(loss, draw, oracle, x0, batch_size or len(x0), generator))
        found = [_errors(loss, oracle, states, target, draws, generator) for states, target in cases]
    finally:
        loss.network_evaluations = spent
    return {name: sum(one[name] for one in found) / len(found) for name in found[0]} if found else {}


def _errors(
    loss: ValueLoss | DoubleSamplingLoss,
    oracle: MixtureDenoiser,
    states: TensorDict,
    target: Target,
    draws: int,
    generator: Generator,
) -> dict[str, float]:
    x, t = states[keys.X_T].flatten(0, 1), states[keys.T].flatten()
    data = oracle.sample_posterior(x.double(), t.double(), draws, generator)
    y = torch.stack([target(states, datum.to(x)) for datum in data.unbind(1)])
    return parts(y, oracle(x.double(), t.double()), oracle.process, t, loss.denoiser.sigma_data)


def _cases(
    loss: ValueLoss | DoubleSamplingLoss,
    draw: Any,  # noqa: ANN401
    oracle: MixtureDenoiser,
    x0: Tensor,
    batch_size: int,
    generator: Generator,
) -> Iterator[tuple[TensorDict, Target]]:
    """States that are held, and what makes a target of them and of other data for them."""
    if isinstance(draw, Onwards):
        S = max(2, len(x0) // draw.chain.num_transitions) if hasattr(draw, "chain") else len(x0)
        states = draw.states(x0[:S], cond=None, generator=generator)
        yield states, lambda held, datum: loss.target(draw.onwards(_with(held, datum), generator=generator))
    elif getattr(draw, "func", draw) is sample_td_edm_pairs:
        eta = coupling_eta(signature(draw).parameters["coupling"].default)
        yield (
            draw(x0, cond=None, generator=generator),
            lambda held, datum: loss.target(_step_again(held, datum, loss, eta, generator)),
        )
    elif isinstance(draw, ChainSampler | StandInChains):
        yield from _levels(loss, draw, oracle, x0, batch_size, generator)


def _with(states: TensorDict, datum: Tensor) -> TensorDict:
    """The same states with other data [N, *E]."""
    again = states.clone()
    again[keys.X0] = datum.view_as(states[keys.X0])
    return again


def _step_again(
    pairs: TensorDict, datum: Tensor, loss: ValueLoss, eta: float, generator: Generator
) -> TensorDict:
    """Pairs whose second state is drawn given x_t and another datum: x_t' = A x0 + κ x_t + std z."""
    again = _with(pairs, datum)
    x, t, x0 = again[keys.X_T], again[keys.T], again[keys.X0]
    s = torch.where(again[keys.VALID], again[keys.NEXT, keys.T], t)
    A, kappa, std = (expand_like(c.to(x), x) for c in posterior(loss.denoiser.process, t, s, eta))
    z = torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)
    again[keys.NEXT, keys.X_T] = A * x0 + kappa * x + std * z
    return again


# Chains


def _levels(
    loss: ValueLoss,
    draw: ChainSampler | StandInChains,
    oracle: MixtureDenoiser,
    x0: Tensor,
    batch_size: int,
    generator: Generator,
) -> Iterator[tuple[TensorDict, Target]]:
    """Level by level: states, and the target of the first state of what continues from them."""
    stood, sampler = (draw, draw.sampler) if isinstance(draw, StandInChains) else (None, draw)
    chain, K = sampler.chain, sampler.chain.num_transitions
    x0 = x0[: max(2, len(x0) // K)]
    for k in range(K):
        W = min(sampler.window or K, K - k)
        if isinstance(loss.value_estimator, MonteCarlo) or (stood is not None and stood.stand_in.single):
            W = 1  # nothing is asked of later states
        x = marginal(chain.process, x0, chain.t[k].to(x0).expand(len(x0)), _randn_like(x0, generator))
        held = TensorDict(
            {keys.X_T: x.unsqueeze(1), keys.T: chain.t[k].to(x0).expand(len(x0), 1, 1)}, [len(x0), 1]
        )

        def target(held: TensorDict, datum: Tensor, k: int = k, W: int = W) -> Tensor:
            states = _continued(chain, k, W, held[keys.X_T].squeeze(1), datum, generator)
            if stood is not None:
                law = stood.exact or OwnRows(oracle, datum, stood.stand_in.reference or batch_size, generator)
                states = stood.stood_in(states, law, generator=generator)
            return loss.target(states)[::W]

        yield held, target


def _continued(chain: Chain, k: int, W: int, x: Tensor, x0: Tensor, generator: Generator) -> TensorDict:
    """W steps of chains from level k on, from x: its noise is what is left of x without the datum."""
    K, N = chain.num_transitions, len(x)
    noise = torch.randn(
        N, K if W == K else W + 1, *x.shape[1:], generator=generator, dtype=x.dtype, device=x.device
    )
    alpha, sigma = (float(c[k]) for c in chain.scales)
    noise[:, 0] = (x - alpha * x0) / sigma
    start = torch.full((N,), k, device=x.device)
    return draw_chain(chain, x0, window=W, start=start, noise=noise)


def _randn_like(x: Tensor, generator: Generator) -> Tensor:
    return torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)
