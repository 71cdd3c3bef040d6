"""Pairs of steps from one state that are independent given it: by the exact posterior, or by rollouts of the model."""

from typing import Literal

import torch
from tensordict import TensorDict
from torch import Generator, Tensor, nn

from diffrl import keys
from diffrl.data.dataset import Data
from diffrl.diffusion.posterior import posterior
from diffrl.diffusion.schedules.base import Schedule
from diffrl.diffusion.trajectories import ChainSampler
from diffrl.errors import InputError
from diffrl.objectives.posteriors import X0Law, exact_x0_law
from diffrl.objectives.stand_ins import OverChains, single_transitions
from diffrl.ranges import require_int
from diffrl.shapes import expand_like

__all__ = ["TwinSteps", "reverse_rollout", "twins_of_laws", "twins_of_rollouts"]


class TwinSteps(OverChains):
    """Draws two steps from each state of a chain, independent given that state.

    "posterior": the first x0 is the chain's own datum, the second a draw from the exact law of x0 given x_t; then
    each has its own fresh noise. "rollouts": two reverse rollouts of the model that is trained, without gradient,
    from x_t to the chain's next level.

    Args:
        process: noise schedule; that of the sampler's chain.
        sampler: draws the states.
        data: what the exact law is about; only "posterior" needs them.
        denoiser: the model; only "rollouts" need it.
        source: "posterior" or "rollouts".
        rollout_steps: steps of the model from one level of the chain to the next, even in ln(σ/α); one step onto clean
            data, and from pure noise.

    Raises:
        ValueError: an argument outside its range; what the source needs is missing; rollouts on another value than
            'clean', whose rewards would need a datum.
    """

    def __init__(
        self,
        process: Schedule,
        *,
        sampler: ChainSampler,
        data: Data | None = None,
        denoiser: nn.Module | None = None,
        source: Literal["posterior", "rollouts"] = "posterior",
        rollout_steps: int = 1,
    ) -> None:
        if source not in ("posterior", "rollouts"):
            raise InputError(f"source is {source!r}: give 'posterior' or 'rollouts'")
        require_int("rollout_steps", rollout_steps, 1, 1000)
        super().__init__(sampler)
        self._refuse_learning_starts("double sampling")
        self.process, self.source, self.rollout_steps = process, source, rollout_steps
        self._law: X0Law | None = None
        self._denoiser: nn.Module | None = None
        if source == "posterior":
            if data is None:
                raise InputError(
                    "source=posterior needs the data, whose posterior is drawn from: give data=..."
                )
            device = "cpu" if denoiser is None else next(denoiser.parameters()).device
            self._law = exact_x0_law(process, data, device)
            return
        if sampler.chain.value != "clean":
            raise InputError("source=rollouts has no datum to be paid by: set chain.value=clean")
        if denoiser is None:
            raise InputError("source=rollouts needs the model: give denoiser=...")
        self._denoiser = denoiser

    def __call__(self, x0: Tensor, *, cond: Tensor | None, generator: Generator) -> TensorDict:
        """Twin steps from all states of a batch of chains, batch size [B K, 2]."""
        return self.onwards(self.states(x0, cond=cond, generator=generator), generator=generator)

    def states(self, x0: Tensor, *, cond: Tensor | None, generator: Generator) -> TensorDict:
        """Those that steps leave: chains [B, K]."""
        return self.sampler(x0, cond=cond, generator=generator)

    def onwards(self, chain: TensorDict, *, generator: Generator) -> TensorDict:
        """Twin steps [B K, 2] from all states of chains."""
        if self._law is not None:
            return twins_of_laws(chain, self._law, self.process, self.chain.eta, generator)
        assert self._denoiser is not None
        return twins_of_rollouts(
            chain, self._denoiser, self.process, self.chain.eta, self.rollout_steps, generator
        )


def twins_of_laws(
    chain: TensorDict, law: X0Law, process: Schedule, eta: float, generator: Generator | None = None
) -> TensorDict:
    """Two steps from each state of chains: to the chain's own datum, and to a draw of the law of x0 given x_t.

    Args:
        chain: what `diffrl.sample_chain` gives, batch size [B, K].
        law: the exact one, of the data that the chain was made of.
        process: noise schedule.
        eta: η ∈ [0, 1].
        generator: source of randomness.

    Returns:
        TensorDict of batch size [B K, 2].
    """
    x_t, t, cond = chain[keys.X_T].flatten(0, 1), chain[keys.T].flatten(), chain.get(keys.COND, None)
    other = law.draw(x_t, t, None if cond is None else cond.flatten(0, 1), generator=generator)
    own = chain[keys.X0].flatten(0, 1)
    pair = [single_transitions(chain, x0, process, eta, generator) for x0 in (own, other)]
    twins: TensorDict = torch.cat(pair, 1)
    return twins


def twins_of_rollouts(
    chain: TensorDict,
    denoiser: nn.Module,
    process: Schedule,
    eta: float,
    rollout_steps: int = 1,
    generator: Generator | None = None,
) -> TensorDict:
    """Two steps from each state of chains, by rollouts of a model.

    ``x0`` is the chain's datum, which cancels on the 'clean' value; where a rollout ends at clean data it pays the
    datum that the model reached.

    Args:
        chain: what `diffrl.sample_chain` gives on the 'clean' value, batch size [B, K].
        denoiser: the model.
        process: noise schedule.
        eta: η ∈ [0, 1].
        rollout_steps: steps from one level to the next.
        generator: source of randomness.

    Returns:
        TensorDict of batch size [B K, 2], with the network evaluations of each under ``evaluations``.
    """
    own = chain[keys.X0].flatten(0, 1)
    pair = single_transitions(chain, own, process, eta, generator)
    twins: TensorDict = torch.cat([pair, pair], 1)
    x_t, cond = twins[keys.X_T].flatten(0, 1), twins.get(keys.COND, None)
    t, s = twins[keys.T].flatten(), twins[keys.NEXT, keys.T].flatten()
    times = _levels_between(process, t, s, rollout_steps)
    cond = None if cond is None else cond.flatten(0, 1)
    reached = reverse_rollout(denoiser, process, x_t, times, eta, cond=cond, generator=generator)
    reached = reached.view_as(twins[keys.X0])
    twins[keys.NEXT, keys.X_T] = reached
    ended = expand_like(twins[keys.NEXT, keys.TERMINATED], reached)
    twins[keys.X0] = torch.where(ended, reached, twins[keys.X0])
    twins[keys.EVALUATIONS] = torch.full_like(twins[keys.T], len(times) - 1)
    return twins


def reverse_rollout(
    denoiser: nn.Module,
    process: Schedule,
    x_t: Tensor,
    times: Tensor,
    eta: float,
    *,
    cond: Tensor | None = None,
    generator: Generator | None = None,
) -> Tensor:
    """Denoise along given times, without gradient: x_s = A D(x_t) + κ x_t + std z of each step.

    Args:
        denoiser: D.
        process: noise schedule.
        x_t: states, shape [N, *E].
        times: of the states visited, from theirs on, shape [M+1, N]; a time that repeats leaves the state as it is.
        eta: η ∈ [0, 1].
        cond: shape [N, ...].
        generator: source of randomness.

    Returns:
        The states at the last times, shape [N, *E].
    """
    with torch.no_grad():
        for t, s in zip(times[:-1], times[1:], strict=True):
            A, kappa, std = (expand_like(c.to(x_t), x_t) for c in posterior(process, t, s, eta))
            z = torch.randn(x_t.shape, generator=generator, dtype=x_t.dtype, device=x_t.device)
            x_t = A * denoiser(x_t, t, cond) + kappa * x_t + std * z
    return x_t


def _levels_between(process: Schedule, t: Tensor, s: Tensor, steps: int) -> Tensor:
    """Times from t to s, even in log-SNR, [steps+1, N]; t itself until the last where an end has no finite one."""
    if steps == 1:
        return torch.stack([t, s])
    high, low = process.log_snr(t), process.log_snr(s)
    finite = high.isfinite() & low.isfinite()
    high, low = torch.where(finite, high, 0.0), torch.where(finite, low, 0.0)
    inner = [
        torch.where(finite, process.t_from_log_snr(torch.lerp(high, low, j / steps)).to(t), t)
        for j in range(1, steps)
    ]
    return torch.stack([t, *inner, s])
