"""What one step of a reverse sampler is: the denoiser it asks, the law it draws from, the noise it uses."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from diffrl.diffusion.denoisers import DenoiserFn
from diffrl.diffusion.laws import Gaussian, NoiseFn
from diffrl.diffusion.schedules.base import Schedule
from diffrl.shapes import expand_like

__all__ = ["GaussianSampler", "Model", "Noise", "NoiseFn", "Sampler", "column", "velocity"]


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
    alpha, sigma, alpha_dot, sigma_dot = (column(c, x) for c in coefficients)
    return alpha_dot * D_x + sigma_dot * (x - alpha * D_x) / sigma


def column(c: Tensor, x: Tensor) -> Tensor:
    """A float64 number, or one per state, such that it multiplies states x [N, *E] of another dtype."""
    return expand_like(c.to(x), x)


class Sampler(ABC):
    """One reverse step; `sample` is the loop."""

    def grid(self, process: Schedule, num_steps: int) -> Tensor:
        """Times that are walked, the clean one last: float64, shape [N+1]."""
        return process.time_grid(num_steps)

    @abstractmethod
    def step(self, model: Model, x: Tensor, t: Tensor, s: Tensor, noise: NoiseFn) -> Tensor:
        """The state at time s from the state x [N, *E] at time t (float64 scalars)."""


class GaussianSampler(Sampler):
    """A sampler whose step is a Gaussian made from one evaluation, so that it has a log-probability."""

    @abstractmethod
    def law(self, process: Schedule, x: Tensor, D_x: Tensor, t: Tensor, s: Tensor) -> Gaussian:
        """Law of the state at time s given the state at time t and its clean estimate.

        Args:
            process: noise schedule.
            x: state at time t, shape [N, *E].
            D_x: its clean estimate, of x's shape.
            t: time left, float64, a scalar or one a state, shape [N].
            s: time reached, of t's shape.
        """

    def kernel(self, model: Model, x: Tensor, t: Tensor, s: Tensor) -> Gaussian:
        """`law` with the model's own clean estimate."""
        return self.law(model.process, x, model(x, t), t, s)

    def step(self, model: Model, x: Tensor, t: Tensor, s: Tensor, noise: NoiseFn) -> Tensor:
        """A draw from the kernel."""
        return self.kernel(model, x, t, s).sample(noise)
