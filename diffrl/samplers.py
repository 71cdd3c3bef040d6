"""Reverse samplers: from noise to data with a denoiser; one loop for all, network evaluations counted."""

import itertools
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from diffrl.denoisers import DenoiserFn
from diffrl.processes import normal_log_prob, posterior
from diffrl.schedules import EDM, Schedule
from diffrl.shapes import expand_like

__all__ = [
    "DDIM",
    "SAMPLERS",
    "Ancestral",
    "EDMStochastic",
    "Euler",
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


class Noise:
    """Standard normal numbers for a batch, from one generator or from one per sample.

    With one seed per sample each sample is the same whatever batch it is drawn in.

    Args:
        generators: one generator for all, or one per sample.
    """

    def __init__(self, generators: torch.Generator | Sequence[torch.Generator] | None) -> None:
        self.generators = generators

    @classmethod
    def per_sample(cls, seeds: Sequence[int], device: torch.device | str = "cpu") -> "Noise":
        """One generator per sample, seeded by its number."""
        return cls([torch.Generator(device).manual_seed(int(s)) for s in seeds])

    def __call__(self, x: Tensor) -> Tensor:
        """Noise of x's shape [N, *E], dtype and device.

        Raises:
            ValueError: there are generators for another number of samples.
        """
        if self.generators is None or isinstance(self.generators, torch.Generator):
            return torch.randn(x.shape, generator=self.generators, dtype=x.dtype, device=x.device)
        if len(self.generators) != len(x):
            raise ValueError(f"{len(self.generators)} generators for {len(x)} samples: give one for each")
        draws = [
            torch.randn(x.shape[1:], generator=g, dtype=x.dtype, device=g.device) for g in self.generators
        ]
        return torch.stack(draws).to(x.device)


class Model:
    """A denoiser bound to its process, condition and grid, which counts its own calls.

    Args:
        denoiser: D.
        process: noise schedule.
        num_steps: N, the levels of the grid that is walked.
        cond: condition of each sample, shape [N, ...], or None.
    """

    def __init__(
        self, denoiser: DenoiserFn, process: Schedule, num_steps: int, cond: Tensor | None = None
    ) -> None:
        self.denoiser, self.process, self.num_steps, self.cond = denoiser, process, num_steps, cond
        self.nfe = 0
        """Network evaluations per sample so far; guidance counts as one call here."""

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        """D(x, t) for one time t shared by the batch, or one per state, shape [N]."""
        self.nfe += 1
        # float32 at least: bfloat16 has no 999
        t = t.to(x.device, torch.promote_types(x.dtype, torch.float32))
        return self.denoiser(x, t.expand(len(x)), self.cond)

    def velocity(self, x: Tensor, t: Tensor) -> Tensor:
        """dx/dt of the probability-flow ODE, at times as for D."""
        return velocity(self.process, x, self(x, t), t)


def velocity(process: Schedule, x: Tensor, D_x: Tensor, t: Tensor) -> Tensor:
    """dx/dt = α' D + σ' (x - α D)/σ of the probability-flow ODE, for a clean estimate D.

    Args:
        process: noise schedule.
        x: state, shape [N, *E].
        D_x: its clean estimate, of x's shape.
        t: times, float64, a scalar or shape [N].
    """
    coefficients = (process.alpha(t), process.sigma(t), process.alpha_dot(t), process.sigma_dot(t))
    alpha, sigma, alpha_dot, sigma_dot = (_column(c, x) for c in coefficients)
    return alpha_dot * D_x + sigma_dot * (x - alpha * D_x) / sigma


def _column(c: Tensor, x: Tensor) -> Tensor:
    """A float64 number, or one per state, such that it multiplies states x [N, *E] of another dtype."""
    return expand_like(c.to(x), x)


class Kernel(NamedTuple):
    """The reverse step as a law: x_s ~ N(mean, std² I); std, one number or one per state, is 0 for an ODE."""

    mean: Tensor
    std: Tensor

    def sample(self, noise: Noise) -> Tensor:
        """A draw, mean + std z."""
        if not bool((self.std > 0).any()):
            return self.mean
        return self.mean + _column(self.std, self.mean) * noise(self.mean)

    def log_prob(self, x: Tensor, reduction: Literal["sum", "mean"]) -> Tensor:
        """Log-density of x, shape [N]; see `diffrl.processes.normal_log_prob`.

        Raises:
            ValueError: std is 0.
        """
        return normal_log_prob(x, self.mean, self.std, batch_dims=1, reduction=reduction)


class Sampler(ABC):
    """One reverse step; `sample` is the loop."""

    def grid(self, process: Schedule, num_steps: int) -> Tensor:
        """Times that are walked, the clean one last: float64, shape [N+1]."""
        return process.time_grid(num_steps)

    @abstractmethod
    def step(self, model: Model, x: Tensor, t: Tensor, s: Tensor, noise: Noise) -> Tensor:
        """The state at time s from the state x [N, *E] at time t (float64 scalars)."""


class GaussianSampler(Sampler):
    """A sampler whose step is a Gaussian made from one evaluation, so that it has a log-probability."""

    @abstractmethod
    def law(self, process: Schedule, x: Tensor, D_x: Tensor, t: Tensor, s: Tensor) -> Kernel:
        """Law of the state at time s given the state at time t and its clean estimate.

        Args:
            process: noise schedule.
            x: state at time t, shape [N, *E].
            D_x: its clean estimate, of x's shape.
            t: time left, float64, a scalar or one a state, shape [N].
            s: time reached, of t's shape.
        """

    def kernel(self, model: Model, x: Tensor, t: Tensor, s: Tensor) -> Kernel:
        """`law` with the model's own clean estimate."""
        return self.law(model.process, x, model(x, t), t, s)

    def step(self, model: Model, x: Tensor, t: Tensor, s: Tensor, noise: Noise) -> Tensor:
        """A draw from the kernel."""
        return self.kernel(model, x, t, s).sample(noise)


@dataclass(frozen=True)
class Euler(GaussianSampler):
    """x_s = x_t + (s - t) dx/dt: first order in the process's own time."""

    def law(self, process: Schedule, x: Tensor, D_x: Tensor, t: Tensor, s: Tensor) -> Kernel:
        """A point: std = 0."""
        return Kernel(x + _column(s - t, x) * velocity(process, x, D_x, t), torch.zeros_like(t))


@dataclass(frozen=True)
class Heun(Sampler):
    """Euler, corrected with the slope at its end: second order, two evaluations a step, one in the last.

    Source: Elucidating the Design Space of Diffusion-Based Generative Models (Karras et al., 2022),
    Algorithm 1, https://arxiv.org/abs/2206.00364.
    """

    def step(self, model: Model, x: Tensor, t: Tensor, s: Tensor, noise: Noise) -> Tensor:
        """The corrected Euler step; no noise."""
        h, slope = _column(s - t, x), model.velocity(x, t)
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
        return Kernel(_column(A, x) * D_x + _column(kappa, x) * x, std)


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

    def step(self, model: Model, x: Tensor, t: Tensor, s: Tensor, noise: Noise) -> Tensor:
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


@dataclass(frozen=True)
class Multistep(GaussianSampler):
    """Sampling of consistency models: jump to clean data, noise up to a lower level, jump again.

        x0 = f(x_T, σ_max),    then for each lower level σ:    x = x0 + √(σ² - σ_min²) z,    x0 = f(x, σ)

    Each of the N levels costs one evaluation: num_steps = NFE, and num_steps = 1 is the one-step generator.

    Source: Consistency Models (Song et al., 2023), Algorithm 1, https://arxiv.org/abs/2303.01469.

    Args:
        levels: σ below σ_max, in falling order, of which a chain of N levels takes the first N - 1; the paper
            searches for good ones by sample quality. None: those of the process's grid of N + 1 levels, but
            for its last, σ_min, where f does nothing.
    """

    levels: tuple[float, ...] | None = None

    def grid(self, process: Schedule, num_steps: int) -> Tensor:
        """σ_max, the lower levels, then clean data: float64, shape [N+1].

        Raises:
            ValueError: the process is not EDM, num_steps < 1, or `levels` are too few or do not fall from
                below σ_max to above σ_min.
        """
        if not isinstance(process, EDM):
            raise ValueError(
                f"Multistep works on the EDM process, not on {type(process).__name__}: use DDIM(eta)"
            )
        first, clean = process.time_grid(num_steps)[[0, -1]]
        if self.levels is None:
            lower = process.time_grid(num_steps + 1)[1:num_steps]
        elif len(self.levels) < num_steps - 1:
            raise ValueError(
                f"num_steps is {num_steps}, but only {len(self.levels)} levels are given below σ_max"
            )
        else:
            lower = torch.tensor(self.levels[: num_steps - 1], dtype=torch.float64)
        grid = torch.cat([first[None], lower, clean[None]])
        if not bool((grid.diff() < 0).all() and grid[-2] > process.sigma_min):
            raise ValueError(
                f"levels are {list(self.levels or ())}: they must fall, from below {process.sigma_max:g} to "
                f"above {process.sigma_min:g}"
            )
        return grid

    def law(self, process: Schedule, x: Tensor, D_x: Tensor, t: Tensor, s: Tensor) -> Kernel:
        """N(f, σ_s² - σ_min²); a point where s is clean."""
        assert isinstance(process, EDM)
        return Kernel(D_x, (s**2 - process.sigma_min**2).clamp(min=0).sqrt())


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
    noise: Noise | None = None,
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
        sampler: one of this module.
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


def trajectory(model: Model, sampler: Sampler, like: Tensor, noise: Noise) -> Iterator[Tensor]:
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
}
