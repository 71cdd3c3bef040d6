"""Bias and variance of an objective's own target, at the states that it trains on and at its own networks."""

from torch import Generator, Tensor

from diffrl.diffusion.exact import MixtureDenoiser
from diffrl.diffusion.trajectories import ChainSampler
from diffrl.metrics.denoiser_targets import denoiser_target_errors
from diffrl.metrics.map_targets import HasTarget, map_target_errors
from diffrl.metrics.target_draws import squares
from diffrl.objectives.denoising import sample_log_normal_states, sample_uniform_states
from diffrl.objectives.double_sampling import DoubleSamplingLoss
from diffrl.objectives.scheme import Objective
from diffrl.objectives.stand_ins import OverChains
from diffrl.objectives.value import ValueLoss
from diffrl.rl.estimators import MonteCarlo

__all__ = ["scheme_target_errors"]


def scheme_target_errors(
    objective: Objective,
    oracle: MixtureDenoiser,
    x0: Tensor,
    *,
    draws: int = 16,
    seed: int = 0,
    batch_size: int | None = None,
) -> dict[str, float]:
    """Squared bias and variance of the target of an objective against its oracle, in units of the value error.

    Each objective is looked at where it trains: at as many states as there are data, of its own law of noise levels; of
    chains, at the levels in turn. So figures of schemes with other laws are no like for like.

    | objective | target | oracle |
    |---|---|---|
    | Monte Carlo, on chains or single states | x0, without bias | D* |
    | STF and other stand-ins (`chain.x0`) | S(x_t), or the return that it pays, of a batch for each draw | D* |
    | TD(λ), n steps and mixtures on chains | the return, bootstrapped from the network that it uses | D* |
    | TD-EDM | where its two terms are least together, and x0 where no pair fits the grid | D* |
    | CDM, double sampling | the same, of the terms in D(x_t), with both next states | D* |
    | consistency training | f⁻(x_t') | X*_{t→0} |
    | sCT | F + g, the step of the output that its loss squares | X*_{t→0} |
    | flow maps | as in `map_target_errors` | X*_{t→r} |

    Nothing is told of losses with no point that D is pulled to: a hinge (ShortDF), an equation of the data, a variance
    (the hybrid loss); of PriorGrad and of states that the model made, whose datum has a law that no oracle knows; of
    progressive distillation, whose target does not scatter and means the next level; of draws that are a user's own,
    where it is not known what leads on from a state that is held; of TD on maps, whose chains are not drawn again here.

    Args:
        objective: its loss and what draws its states, at some point of its training.
        oracle: the exact denoiser of the law.
        x0: clean data without labels, shape [S, *E].
        draws: M ≥ 2 draws of the datum for each state.
        seed: of states and draws.
        batch_size: data of a training batch, where a target refers to it; None: as many as there are in x0.

    Returns:
        ``bias_sq``, ``variance``, ``total``; and of maps ``own``, the network's own error there. Empty for an objective
        of which nothing is told.
    """
    generator = Generator(x0.device).manual_seed(seed)
    loss, draw = objective.loss, objective.draw
    if isinstance(loss, ValueLoss) and isinstance(loss.value_estimator, MonteCarlo):
        single = getattr(draw, "func", draw) in (sample_log_normal_states, sample_uniform_states)
        if single or isinstance(draw, ChainSampler):
            x, t, _ = loss.left(draw(x0, cond=None, generator=generator))
            return _of_the_datum(oracle, x, t, loss.denoiser.sigma_data, draws, generator)
    if isinstance(loss, ValueLoss | DoubleSamplingLoss):
        return denoiser_target_errors(
            loss, draw, oracle, x0, draws=draws, batch_size=batch_size, generator=generator
        )
    if not isinstance(loss, HasTarget) or isinstance(draw, OverChains):
        return {}
    return map_target_errors(
        loss,
        draw(x0, cond=None, generator=generator),
        oracle,
        transition=getattr(draw, "transition", None),
        draws=draws,
        batch_size=batch_size,
        generator=generator,
    )


def _of_the_datum(
    oracle: MixtureDenoiser, x: Tensor, t: Tensor, sigma_data: float, draws: int, generator: Generator
) -> dict[str, float]:
    """The datum scatters about E[x0 | x_t], and has no bias."""
    data = oracle.sample_posterior(x.double(), t.double(), draws, generator)
    scatter = squares(data.std(1), oracle.process, t, sigma_data)
    return {"bias_sq": 0.0, "variance": float(scatter.mean()), "total": float(scatter.mean())}
