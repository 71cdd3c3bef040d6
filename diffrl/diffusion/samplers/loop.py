"""Reverse samplers: from noise to data with a denoiser; one loop for all, network evaluations counted."""

import itertools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffrl.diffusion.denoisers import DenoiserFn
from diffrl.diffusion.posterior import posterior
from diffrl.diffusion.samplers.base import (
    GaussianSampler,
    Kernel,
    Model,
    Noise,
    NoiseFn,
    Sampler,
    column,
    velocity,
)
from diffrl.diffusion.samplers.consistency import LCM, Multistep
from diffrl.diffusion.samplers.sde import CPS, FlowSDE
from diffrl.diffusion.schedules.all import EDM, Schedule

__all__ = [
    "CPS",
    "DDIM",
    "LCM",
    "SAMPLERS",
    "STOCHASTIC_SAMPLERS",
    "Ancestral",
    "EDMStochastic",
    "Euler",
    "FlowSDE",
    "GaussianSampler",
    "Heun",
    "Kernel",
    "Model",
    "Multistep",
    "Noise",
    "Sampler",
    "sample",
    "trajectory",
    "velocity",
]


@dataclass(frozen=True)
class Euler(GaussianSampler):
    """x_s = x_t + (s - t) dx/dt: first order in the process's own time."""

    def law(self, process: Schedule, x: Tensor, D_x: Tensor, t: Tensor, s: Tensor) -> Kernel:
        """A point: std = 0."""
        return Kernel(x + column(s - t, x) * velocity(process, x, D_x, t), torch.zeros_like(t))


@dataclass(frozen=True)
class Heun(Sampler):
    """Euler, corrected with the slope at its end: second order, two evaluations a step, one in the last.

    Source: Elucidating the Design Space of Diffusion-Based Generative Models (Karras et al., 2022),
    Algorithm 1, https://arxiv.org/abs/2206.00364.
    """

    def step(self, model: Model, x: Tensor, t: Tensor, s: Tensor, noise: NoiseFn) -> Tensor:
        """The corrected Euler step; no noise."""
        h, slope = column(s - t, x), model.velocity(x, t)
        x_s = x + h * slope
        if s == model.process.t_clean:  # where the slope is infinite
            return x_s
        return x + h * (slope + model.velocity(x_s, s)) / 2


@dataclass(frozen=True)
class DDIM(GaussianSampler):
    """x_s = A D + κ x_t + std z: the posterior of coupling η with the clean estimate in place of x0.

    η = 0 is deterministic, η = 1 ancestral. Works for every process, discrete ones too.

    Source: Denoising Diffusion Implicit Models (Song et al., 2021), eqs. 12, 16, https://arxiv.org/abs/2010.02502.

    Args:
        eta: η ∈ [0, 1].

    Raises:
        ValueError: eta outside [0, 1].
    """

    eta: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta is {self.eta}: it lies in [0, 1]")

    def law(self, process: Schedule, x: Tensor, D_x: Tensor, t: Tensor, s: Tensor) -> Kernel:
        """N(A D + κ x, std²)."""
        A, kappa, std = posterior(process, t, s, self.eta)
        return Kernel(column(A, x) * D_x + column(kappa, x) * x, std)


def Ancestral() -> DDIM:  # noqa: N802 (used like the classes beside it)
    """DDIM(η = 1): DDPM's sampler with the posterior variance.

    Source: Denoising Diffusion Probabilistic Models (Ho et al., 2020), eqs. 6-7, https://arxiv.org/abs/2006.11239.
    """
    return DDIM(eta=1.0)


@dataclass(frozen=True)
class EDMStochastic(Sampler):
    """EDM's sampler: fresh noise before each Heun step.

        γ = min(S_churn/N, √2 - 1) where S_min ≤ t ≤ S_max, else 0
        t̂ = t + γ t,    x̂ = x + √(t̂² - t²) S_noise z,    then Heun from t̂ to s

    S_churn = 0 is `Heun`.

    Source: Elucidating the Design Space of Diffusion-Based Generative Models (Karras et al., 2022),
    Algorithm 2 and Table 5 (ImageNet-64), https://arxiv.org/abs/2206.00364.

    Args:
        S_churn: amount of fresh noise over the whole chain of N steps.
        S_min: lowest noise level at which it is added.
        S_max: highest such level.
        S_noise: factor on the added noise.
    """

    S_churn: float = 40.0
    S_min: float = 0.05
    S_max: float = 50.0
    S_noise: float = 1.003

    def step(self, model: Model, x: Tensor, t: Tensor, s: Tensor, noise: NoiseFn) -> Tensor:
        """Noise up from t to t̂, then Heun down to s.

        Raises:
            ValueError: the process is not EDM.
        """
        if not isinstance(model.process, EDM):
            name = type(model.process).__name__
            raise ValueError(f"EDMStochastic works on the EDM process, not on {name}: use DDIM(eta)")
        gamma = min(self.S_churn / model.num_steps, 2**0.5 - 1) if self.S_min <= t <= self.S_max else 0.0
        t_hat = t + gamma * t
        if gamma > 0:
            x = x + (t_hat**2 - t**2).sqrt() * self.S_noise * noise(x)
        return Heun().step(model, x, t_hat, s, noise)


@torch.no_grad()
def sample(
    denoiser: DenoiserFn,
    shape: Sequence[int],
    *,
    sampler: Sampler,
    num_steps: int,
    process: Schedule | None = None,
    cond: Tensor | None = None,
    seed: int | None = None,
    noise: NoiseFn | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Draw samples: start from σ ε at the noisiest level, walk the grid down to clean data.

    >>> import diffrl, torch
    >>> exact = diffrl.GaussianDenoiser(diffrl.EDM(), torch.zeros(2), torch.eye(2))
    >>> diffrl.sample(exact, (3, 2), sampler=diffrl.Heun(), num_steps=18, seed=0).shape
    torch.Size([3, 2])

    Args:
        denoiser: D; put a network in eval mode first.
        shape: shape of the result, [N, *E].
        sampler: one of `SAMPLERS`.
        num_steps: N noise levels; the network evaluations, which `Model.nfe` counts, may be more.
        process: noise schedule; taken from ``denoiser.process`` if None.
        cond: condition of each sample, shape [N, ...].
        seed: sample j is drawn from its own generator, seeded by seed + j, so that it does not depend on the
            others. Give this or `noise`.
        noise: another source of noise.
        device: where the samples are drawn.
        dtype: of the samples, floating.

    Returns:
        Samples, shape [N, *E].

    Raises:
        ValueError: neither or both of seed and noise; no process given, and the denoiser has none.
    """
    if (seed is None) == (noise is None):
        raise ValueError("give either seed or noise")
    if noise is None:
        assert seed is not None
        noise = Noise.per_sample(range(seed, seed + shape[0]))
    process = process or getattr(denoiser, "process", None)
    if process is None:
        raise ValueError("this denoiser does not know its process: give process=")
    model = Model(denoiser, process, num_steps, cond)
    like = torch.empty(tuple(shape), dtype=dtype, device=device)
    return deque(trajectory(model, sampler, like, noise), maxlen=1).pop()


def trajectory(model: Model, sampler: Sampler, like: Tensor, noise: NoiseFn) -> Iterator[Tensor]:
    """The N+1 states of one reverse chain: the start σ ε, then one per step; the last is clean.

    Args:
        model: denoiser bound to process and grid.
        sampler: the reverse step.
        like: any tensor of the wanted shape [N, *E], dtype and device; its values are not read.
        noise: source of noise, the start's too.
    """
    grid = sampler.grid(model.process, model.num_steps)
    x = model.process.sigma(grid[0]) * noise(like)
    yield x
    for t, s in itertools.pairwise(grid):
        x = sampler.step(model, x, t, s, noise)
        yield x


SAMPLERS: dict[str, Callable[..., Sampler]] = {
    "euler": Euler,
    "heun": Heun,
    "ddim": DDIM,
    "ancestral": Ancestral,
    "edm_stochastic": EDMStochastic,
    "consistency": Multistep,
    "lcm": LCM,
    "flow_sde": FlowSDE,
    "cps": CPS,
}
STOCHASTIC_SAMPLERS = {name: SAMPLERS[name] for name in ("ddim", "ancestral", "lcm", "flow_sde", "cps")}
"""Those whose steps may have a log-probability, so that they make a policy."""
