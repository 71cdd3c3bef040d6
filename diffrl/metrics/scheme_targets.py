"""Bias and variance of an objective's own target, at the states that it trains on and at its own networks."""

from dataclasses import fields
from typing import Any

import torch
from torch import Generator, Tensor

from diffrl.diffusion.exact import MixtureDenoiser
from diffrl.diffusion.predictions import scalings
from diffrl.diffusion.trajectories import ChainSampler
from diffrl.metrics.diagnostics import target_errors
from diffrl.metrics.map_targets import HasTarget, map_target_errors
from diffrl.objectives.lookahead import Lookahead
from diffrl.objectives.scheme import Objective
from diffrl.objectives.value import ValueLoss
from diffrl.rl.estimators import MonteCarlo

__all__ = ["scheme_target_errors"]

PARTS = ("bias_sq", "variance", "total")


def scheme_target_errors(
    objective: Objective, oracle: MixtureDenoiser, x0: Tensor, *, draws: int = 16, seed: int = 0
) -> dict[str, float]:
    """Squared bias and variance of the target of an objective against its oracle, in units of the value error.

    Each objective is looked at where it trains: at as many states as there are data, of its own law of noise levels; of
    chains, at the levels in turn. So figures of schemes with other laws are no like for like.

    | objective | target | oracle |
    |---|---|---|
    | Monte Carlo, on chains or single states | x0, without bias | D* |
    | TD(λ) on chains | as in `target_errors`, bootstrapped from the network that it uses | D* |
    | consistency training | f⁻(x_t') | X*_{t→0} |
    | flow maps | as in `map_target_errors` | X*_{t→r} |

    Args:
        objective: its loss and what draws its states, at some point of its training.
        oracle: the exact denoiser of the law.
        x0: clean data without labels, shape [S, *E].
        draws: M ≥ 2 draws of the datum for each state.
        seed: of states and draws.

    Returns:
        ``bias_sq``, ``variance``, ``total``; and of maps ``own``, the network's own error there. Empty for an objective
        without a target of these kinds: stand-ins for the datum, n-step returns, pairs under TD, double sampling, a
        target that is a gradient (sCT).
    """
    generator = Generator(x0.device).manual_seed(seed)
    loss, draw = objective.loss, objective.draw
    if isinstance(loss, HasTarget):
        states: Any = draw(x0, cond=None, generator=generator)
        transition = getattr(draw, "transition", None)
        return map_target_errors(
            loss, states, oracle, transition=transition, draws=draws, generator=generator
        )
    if not isinstance(loss, ValueLoss) or hasattr(draw, "stand_in") or loss.bootstrap_share < 1:
        return {}
    if isinstance(loss.value_estimator, MonteCarlo):
        x, t, _ = loss.left(draw(x0, cond=None, generator=generator))
        return _of_the_datum(oracle, x, t, loss.denoiser.sigma_data, draws, generator)
    lmbda = getattr(loss.value_estimator, "lmbda", None)
    if not isinstance(draw, ChainSampler) or not isinstance(lmbda, float | int | Lookahead):
        return {}
    return _along_chains(loss, draw, lmbda, oracle, x0, draws, generator)


def _of_the_datum(
    oracle: MixtureDenoiser, x: Tensor, t: Tensor, sigma_data: float, draws: int, generator: Generator
) -> dict[str, float]:
    """The datum scatters about E[x0 | x_t], and has no bias."""
    data = oracle.sample_posterior(x.double(), t.double(), draws, generator)
    unit = scalings(oracle.process, t.double(), "edm", sigma_data).c_out ** 2
    variance = float((data.var(1).flatten(1).sum(1) / unit).mean())
    return {"bias_sq": 0.0, "variance": variance, "total": variance}


def _along_chains(
    loss: ValueLoss,
    draw: ChainSampler,
    lmbda: float | Lookahead,
    oracle: MixtureDenoiser,
    x0: Tensor,
    draws: int,
    generator: Generator,
) -> dict[str, float]:
    """The mean of `target_errors` over the levels of a chain."""
    chain = draw.chain
    λ = lmbda.lmbda(chain.num_transitions) if isinstance(lmbda, Lookahead) else float(lmbda)
    given = {field.name: getattr(chain, field.name) for field in fields(chain)}
    with torch.no_grad():
        levels = target_errors(
            loss.bootstrap_network.module.denoiser,
            oracle,
            x0[: max(2, len(x0) // chain.num_transitions)],
            lmbdas=(λ,),
            n_steps=(),
            gamma=float(loss.gamma),
            sigma_data=loss.denoiser.sigma_data,
            draws=draws,
            generator=generator,
            **given,
        )["levels"]
    of_each = [level["targets"][f"lmbda={λ:g}"] for level in levels]
    return {part: sum(found[part] for found in of_each) / len(of_each) for part in PARTS}
