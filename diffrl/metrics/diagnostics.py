"""How good training targets are: their bias and variance, the Bellman residual, the noise of gradients.

Bias and variance are those given one state: many chains continue from it, each with x0 drawn from the exact posterior,
so that the mean of a target is E[G | x_t], and not an average over all states of a noise level.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from tensordict import TensorDictBase
from torch import Generator, Tensor

from diffrl.diffusion.chains import Chain
from diffrl.diffusion.denoisers import DenoiserFn
from diffrl.diffusion.posterior import marginal
from diffrl.diffusion.predictions import scalings
from diffrl.diffusion.schedules.base import Schedule
from diffrl.errors import InputError
from diffrl.rl.returns import lambda_returns, monte_carlo_returns, n_step_returns

__all__ = ["Oracle", "gradient_variance", "target_errors"]

NUMBERS = 2**23  # how many float64 numbers a part of the batch may hold


class Oracle(Protocol):
    """The exact denoiser of a known law: `GaussianDenoiser`, `MixtureDenoiser`, or `EmpiricalDenoiser`."""

    def __call__(self, x_t: Tensor, t: Tensor, cond: Tensor | None) -> Tensor:
        """E[x0 | x_t]."""
        ...

    def sample_posterior(
        self, x_t: Tensor, t: Tensor, draws: int, generator: Generator | None = None
    ) -> Tensor:
        """Draws of x0 given x_t, shape [N, draws, *E]."""
        ...


@torch.no_grad()
def target_errors(
    denoiser: DenoiserFn,
    oracle: Oracle,
    x0: Tensor,
    process: Schedule,
    *,
    num_steps: int,
    coupling: float | str = "markov",
    lmbdas: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 0.9, 0.95, 1.0),
    n_steps: Sequence[int] = (1, 2, 4, 8),
    gamma: float = 1.0,
    sigma_data: float = 0.5,
    draws: int = 64,
    generator: Generator | None = None,
    **chain: Any,
) -> dict[str, Any]:
    """Bias and variance of every target that is bootstrapped from a denoiser, compared with the exact value.

        bias² = ‖E[G | x_t] - V*(x_t)‖²,    variance = E‖G - E[G | x_t]‖²,    total = bias² + variance
        value error = ‖V(x_t) - V*(x_t)‖²,    Bellman residual = ‖E[G | x_t] - V(x_t)‖² with G of TD(0)

    each summed over dims, in units of a network's output (divided by A² c_out²) as in
    `diffrl.metrics.distances.value_error`, and averaged over states. The variance of a mean of M draws, variance/M, is
    taken off both squares of means, so that an estimate of 0 may be negative.

    >>> import torch, diffrl
    >>> exact = diffrl.GaussianDenoiser(diffrl.EDM(), torch.zeros(1), torch.eye(1))
    >>> errors = target_errors(exact, exact, torch.randn(50, 1), diffrl.EDM(), num_steps=6, sigma_data=1.0)
    >>> len(errors["levels"]), sorted(errors["levels"][0]["targets"]["lmbda=0"])
    (6, ['bias_sq', 'bias_sq_error', 'total', 'variance'])

    Args:
        denoiser: D, whose predictions the targets bootstrap from; it gets no condition. Put a network in eval
            mode first.
        oracle: exact denoiser of the data's law; `EmpiricalDenoiser(process, points)` for your own points.
        x0: clean data to make the states from, shape [S, *E]; D gets states of its dtype.
        process: noise schedule.
        num_steps: N of the chain.
        coupling: η ∈ [0, 1], or "markov" (1), "shared" (0).
        lmbdas: the λ of TD(λ) to try.
        n_steps: the n of n-step TD to try.
        gamma: discount γ.
        sigma_data: σd of c_out.
        draws: M ≥ 2, the number of chains that continue from each state.
        generator: source of randomness, of x0's device.
        chain: span, stride, value, offset, t_max of `diffrl.diffusion.chains.Chain`.

    Returns:
        A dict of numbers: ``states``, ``draws``, and ``levels``, the noisiest first, each with ``index``,
        ``t``, ``sigma`` (σ/α), ``value_error``, ``bellman_residual`` and its standard error
        ``bellman_residual_error``, ``best_lmbda`` (of least total), and ``targets``: for "lmbda=…",
        "n_steps=…" and "monte_carlo" the ``bias_sq``, its standard error ``bias_sq_error``, ``variance`` and
        ``total``.

    Raises:
        ValueError: fewer than two draws, no λ, or an argument of the chain or the returns out of range.
    """
    if draws < 2:
        raise InputError(f"draws is {draws}: a variance needs at least two")
    if not lmbdas:
        raise InputError("lmbdas is empty: the best λ is chosen among them")

    targets = _Targets(tuple(lmbdas), tuple(n_steps), gamma)
    grid = Chain(process, num_steps, coupling, **chain)
    levels = [
        _level(denoiser, oracle, x0, grid, k, targets, sigma_data, draws, generator)
        for k in range(grid.num_transitions)
    ]
    return {"states": len(x0), "draws": draws, "levels": levels}


@dataclass(frozen=True)
class _Targets:
    """The targets to compare; called with rewards, next values and the flag of the end, it gives each by name."""

    lmbdas: tuple[float, ...]
    n_steps: tuple[int, ...]
    gamma: float

    def __call__(self, *steps: Tensor) -> Iterator[tuple[str, Tensor]]:
        for lmbda in self.lmbdas:
            yield f"lmbda={lmbda:g}", lambda_returns(*steps, lmbda=lmbda, gamma=self.gamma)
        for n in self.n_steps:
            yield f"n_steps={n}", n_step_returns(*steps, n_steps=n, gamma=self.gamma)
        yield "monte_carlo", monte_carlo_returns(*steps, gamma=self.gamma)
        yield "bellman_residual", n_step_returns(*steps, n_steps=1, gamma=self.gamma)


def _level(
    denoiser: DenoiserFn,
    oracle: Oracle,
    x0: Tensor,
    chain: Chain,
    k: int,
    targets: _Targets,
    sigma_data: float,
    draws: int,
    generator: Generator | None,
) -> dict[str, Any]:
    """The entry of `target_errors` for the states at level k."""
    t, A = chain.t[k], chain.value_coefficients[0][k]
    alpha, sigma = (float(c[k]) for c in chain.scales)
    unit = float((A * scalings(chain.process, t, "edm", sigma_data).c_out) ** 2)
    size = max(1, NUMBERS // (draws * (chain.num_transitions - k) * x0[0].numel()))
    parts: dict[str, list[Tensor]] = {}
    for states in x0.split(size):
        for name, values in _errors(denoiser, oracle, states, chain, k, targets, draws, generator):
            parts.setdefault(name, []).append(values / unit)
    found = {name: torch.cat(values) for name, values in parts.items()}
    value_error, residual = found.pop("value_error"), found.pop("bellman_residual")[:, 0]
    summary = {name: _summary(values) for name, values in found.items()}
    return {
        "index": k,
        "t": float(t),
        "sigma": sigma / alpha if alpha > 0 else math.inf,
        "value_error": float(value_error.mean()),
        "bellman_residual": float(residual.mean()),
        "bellman_residual_error": _standard_error(residual),
        "best_lmbda": min(targets.lmbdas, key=lambda lmbda: summary[f"lmbda={lmbda:g}"]["total"]),
        "targets": summary,
    }


def _errors(
    denoiser: DenoiserFn,
    oracle: Oracle,
    x0: Tensor,
    chain: Chain,
    k: int,
    targets: _Targets,
    draws: int,
    generator: Generator | None,
) -> Iterator[tuple[str, Tensor]]:
    """Squared errors at level k, by name: the value's [S]; bias² and variance of a target [S, 2]."""
    S, E = len(x0), x0.shape[1:]
    noise = torch.randn(x0.shape, generator=generator, dtype=torch.float64, device=x0.device)
    t = chain.t[k].to(x0.device).expand(S)
    x_t = marginal(chain.process, x0.double(), t, noise)
    A, kappa = (float(c[k]) for c in chain.value_coefficients)
    exact = A * oracle(x_t, t, None) + kappa * x_t
    own = A * denoiser(x_t.to(x0.dtype), t.to(x0.dtype), None).double() + kappa * x_t
    yield "value_error", (own - exact).flatten(1).square().sum(1)

    data = oracle.sample_posterior(x_t, t, draws, generator)
    x_t = x_t.unsqueeze(1).expand(S, draws, *E)
    steps = _continue(denoiser, chain, k, data.flatten(0, 1), x_t.flatten(0, 1), x0.dtype, generator)
    for name, G in targets(*steps):
        truth = own if name == "bellman_residual" else exact
        yield name, _squares(G[:, 0].view(S, draws, -1), truth)


def _continue(
    denoiser: DenoiserFn,
    chain: Chain,
    k: int,
    x0: Tensor,
    x: Tensor,
    dtype: torch.dtype,
    generator: Generator | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Continue from level k to clean data: rewards and next values [R, K-k, *E], and where chains terminate."""
    K, R = chain.num_transitions, len(x)
    A, kappa = (c.to(x) for c in chain.value_coefficients)
    mu, rewards, values = A[k] * x0 + kappa[k] * x, [], []
    for j in range(k, K):
        noise = torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)
        x = chain.step(torch.full((R,), j, device=x.device), x0, x, noise)
        mu_next = A[j + 1] * x0 + kappa[j + 1] * x
        rewards.append(mu - mu_next)
        mu = mu_next
        if j + 1 < K:
            t = chain.t[j + 1].to(x.device, dtype).expand(R)
            values.append(A[j + 1] * denoiser(x.to(dtype), t, None).double() + kappa[j + 1] * x)
        else:
            values.append(torch.zeros_like(x))
    terminated = torch.zeros(R, K - k, 1, dtype=torch.bool, device=x.device)
    terminated[:, -1] = True
    return torch.stack(rewards, 1), torch.stack(values, 1), terminated


def _squares(G: Tensor, truth: Tensor) -> Tensor:
    """Unbiased estimates of ‖E[G] - truth‖² and of the variance, from M draws: G [S, M, D] → [S, 2]."""
    variance = G.var(1).sum(1)
    bias_sq = (G.mean(1) - truth.flatten(1)).square().sum(1) - variance / G.shape[1]
    return torch.stack([bias_sq, variance], 1)


def _summary(values: Tensor) -> dict[str, float]:
    bias_sq, variance = (float(c) for c in values.mean(0))
    return {
        "bias_sq": bias_sq,
        "bias_sq_error": _standard_error(values[:, 0]),
        "variance": variance,
        "total": bias_sq + variance,
    }


def _standard_error(values: Tensor) -> float:
    return float(values.std() / math.sqrt(len(values)))


def gradient_variance(
    losses: Mapping[str, Any],
    draw: Callable[[Generator], TensorDictBase],
    *,
    batches: int = 32,
    seed: int = 0,
) -> dict[str, dict[str, float]]:
    """How much the gradient of each loss varies from batch to batch; every loss gets the same batches.

        variance = tr Cov(g),    mean_sq = ‖E g‖² (free of its own variance),    relative = variance/mean_sq

    Args:
        losses: losses of this library by name, such as `diffrl.objectives.ValueLoss`; nothing is trained.
        draw: makes a batch of states from a generator, such as
            ``lambda g: sample_chain(process, data.batch(32, g)[0], num_steps=18, generator=g)``.
        batches: number of batches, ≥ 2.
        seed: seed of the generator.

    Returns:
        For each loss ``variance``, ``mean_sq`` and ``relative``, which is infinite if the estimate of ‖E g‖²
        is not above 0.

    Raises:
        ValueError: fewer than two batches.
    """
    if batches < 2:
        raise InputError(f"batches is {batches}: a variance needs at least two")
    generator = Generator().manual_seed(seed)
    totals: dict[str, Tensor] = {}
    squares = dict.fromkeys(losses, 0.0)
    for _ in range(batches):
        states = draw(generator)
        for name, loss in losses.items():
            parameters = [p for p in loss.denoiser.parameters() if p.requires_grad]
            grads = torch.autograd.grad(loss(states)["loss_value"], parameters, allow_unused=True)
            g = torch.cat([grad.flatten().double() for grad in grads if grad is not None])
            totals[name] = totals.get(name, torch.zeros_like(g)) + g
            squares[name] += float(g @ g)
    found = {}
    for name, total in totals.items():
        mean_sq = float(total @ total) / batches**2
        variance = (squares[name] - batches * mean_sq) / (batches - 1)
        mean_sq -= variance / batches
        relative = variance / mean_sq if mean_sq > 0 else math.inf
        found[name] = {"variance": variance, "mean_sq": mean_sq, "relative": relative}
    return found
