"""What every reverse sampler is made of: the denoiser that it calls, its step, and the noise that it uses."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from diffrl.diffusion.denoisers import DenoiserFn, require_second_time
from diffrl.diffusion.laws import Gaussian, NoiseFn
from diffrl.diffusion.schedules.base import Schedule
from diffrl.errors import InputError, InputTypeError
from diffrl.ranges import MAX_STEPS, require_int
from diffrl.shapes import column

__all__ = ["GaussianSampler", "Model", "Noise", "NoiseFn", "Sampler", "Streams", "velocity"]

Streams = Literal["added", "keyed"]
"""How the noise of sample i follows from a seed, see `Noise.of_rows`."""


class Noise:
    """Standard normal numbers for a batch, from one generator or from one for each sample.

    With a seed for each sample, a sample does not depend on the batch that it is drawn in.

    Args:
        generators: of torch, one for all samples, or one for each, of torch or all of NumPy; None: torch's global one.
    """

    def __init__(
        self,
        generators: torch.Generator | Sequence[torch.Generator] | Sequence[np.random.Generator] | None,
    ) -> None:
        self.generators: Any = generators

    @classmethod
    def per_sample(cls, seeds: Sequence[int], device: torch.device | str = "cpu") -> "Noise":
        """One generator for each sample, with these seeds."""
        return cls([torch.Generator(device).manual_seed(int(s)) for s in seeds])

    @classmethod
    def of_rows(cls, streams: Streams, seed: int, rows: range) -> "Noise":
        """The noise of some samples of a large set: that of sample i depends on streams, seed and i alone.

        Args:
            streams: "added": sample i has a generator of torch with seed + i, of which torch takes the last 32 bits on
                a CPU. So seed 1 gives the samples of seed 0 but for one, moved by one. "keyed": it has a stream of
                NumPy's Philox of its own with the key (seed, i): no two seeds share a sample, and float32 has the
                numbers of float64, rounded.
            seed: in [0, 2⁶³).
            rows: the numbers i, ≥ 0.

        Raises:
            ValueError: another name of streams, or seeds out of range.
        """
        if streams not in get_args(Streams):
            raise InputError(f"streams is {streams!r}: give {' or '.join(get_args(Streams))}")
        require_int("seed", seed, 0, 2**63 - 1 - (max(rows, default=0) if streams == "added" else 0))
        if streams == "added":
            return cls.per_sample(range(seed + rows.start, seed + rows.stop))
        # the fourth word of the counter keeps these streams apart from those of `evaluation_noise`
        keyed = (np.random.Philox(key=[seed, i], counter=[0, 0, 0, 1]) for i in rows)
        return cls([np.random.Generator(stream) for stream in keyed])

    def __call__(self, x: Tensor) -> Tensor:
        """Noise of x's shape [N, *E], dtype and device.

        Raises:
            ValueError: the number of generators is not that of the samples.
        """
        if self.generators is None or isinstance(self.generators, torch.Generator):
            return torch.randn(x.shape, generator=self.generators, dtype=x.dtype, device=x.device)
        if len(self.generators) != len(x):
            raise InputError(f"{len(self.generators)} generators for {len(x)} samples: give one for each")
        draws = [
            torch.from_numpy(np.asarray(g.standard_normal(x.shape[1:])))
            if isinstance(g, np.random.Generator)
            else torch.randn(x.shape[1:], generator=g, dtype=x.dtype, device=g.device)
            for g in self.generators
        ]
        return torch.stack(draws).to(x)


class Model:
    """A denoiser with its process, its condition and the length of its grid; it counts its calls.

    Args:
        denoiser: D.
        process: noise schedule.
        num_steps: N, the number of noise levels in the grid.
        cond: condition of each sample, shape [N, ...], or None.

    Raises:
        TypeError: process is no schedule.
        ValueError: num_steps is no whole number in [1, 1,000,000].
    """

    def __init__(
        self, denoiser: DenoiserFn, process: Schedule, num_steps: int, cond: Tensor | None = None
    ) -> None:
        if not isinstance(process, Schedule):
            raise InputTypeError(f"process is {process!r}: give a schedule such as diffrl.EDM()")
        require_int("num_steps", num_steps, most=MAX_STEPS)
        self.denoiser, self.process, self.num_steps, self.cond = denoiser, process, num_steps, cond
        self.nfe = 0
        """Calls of the denoiser so far; a guided one counts once, though it evaluates its network twice."""

    def __call__(self, x: Tensor, t: Tensor, r: Tensor | None = None) -> Tensor:
        """D(x, t), or D(x, t, r), for times shared by the batch, or one per state, shape [N].

        Raises:
            ValueError: r for a denoiser without a second time.
        """
        self.nfe += 1
        if r is None:
            return self.denoiser(x, self._times(x, t), self.cond)
        require_second_time(self.denoiser)
        two_times: Any = self.denoiser
        return two_times(x, self._times(x, t), self.cond, self._times(x, r))

    def _times(self, x: Tensor, t: Tensor) -> Tensor:
        # float32 at least: bfloat16 cannot hold a timestep such as 999
        return t.to(x.device, torch.promote_types(x.dtype, torch.float32)).expand(len(x))

    def with_variance(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """D(x, t) and v(x, t), see `diffrl.Denoiser.with_variance`; times as for D alone.

        Raises:
            ValueError: the denoiser predicts no variance.
        """
        both = getattr(self.denoiser, "with_variance", None)
        if both is None:
            raise InputError("this denoiser predicts no variance: give one with network.variance=true")
        self.nfe += 1
        t = t.to(x.device, torch.promote_types(x.dtype, torch.float32))
        D_x, v = both(x, t.expand(len(x)), self.cond)
        return D_x, v

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


class Sampler(ABC):
    """One step of a reverse sampler; `diffrl.sample` repeats it from noise to data."""

    def grid(self, process: Schedule, num_steps: int) -> Tensor:
        """Times that a chain of N levels visits, the clean one last: float64, shape [N+1]."""
        return process.time_grid(num_steps)

    @abstractmethod
    def step(self, model: Model, x: Tensor, t: Tensor, s: Tensor, noise: NoiseFn) -> Tensor:
        """The state at time s, made from the state x at time t.

        Args:
            model: the denoiser, with its process and condition.
            x: state at time t, shape [N, *E].
            t: time of x, a float64 scalar.
            s: time to reach, a float64 scalar.
            noise: source of standard normal numbers.
        """


class GaussianSampler(Sampler):
    """A sampler whose step is one Gaussian, made from one evaluation of the denoiser.

    It makes a policy: the step has a log-probability wherever its std is not 0.
    """

    @abstractmethod
    def law(self, process: Schedule, x: Tensor, D_x: Tensor, t: Tensor, s: Tensor) -> Gaussian:
        """Law of the state at time s given the state at time t and its clean estimate.

        Args:
            process: noise schedule.
            x: state at time t, shape [N, *E].
            D_x: its clean estimate, of x's shape.
            t: time of x, float64, a scalar or one for each state, shape [N].
            s: time to reach, of t's shape.
        """

    def kernel(self, model: Model, x: Tensor, t: Tensor, s: Tensor) -> Gaussian:
        """The `law` for the model's clean estimate of x.

        The `log_prob` of a deterministic law of scalar times raises a ValueError.
        """
        return self.law(model.process, x, model(x, t), t, s)

    def step(self, model: Model, x: Tensor, t: Tensor, s: Tensor, noise: NoiseFn) -> Tensor:
        """A draw from the law of the step."""
        return self.kernel(model, x, t, s).sample(noise)
