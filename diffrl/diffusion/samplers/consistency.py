"""Sampling of consistency models, latent ones too: one jump to clean data, or several with fresh noise between."""

from dataclasses import dataclass

import torch
from torch import Tensor

from diffrl.diffusion.laws import Gaussian
from diffrl.diffusion.samplers.base import GaussianSampler
from diffrl.diffusion.samplers.registry import SAMPLERS
from diffrl.diffusion.schedules.base import Schedule
from diffrl.diffusion.schedules.ddpm import DDPM
from diffrl.diffusion.schedules.edm import EDM
from diffrl.errors import InputError
from diffrl.ranges import MAX_STEPS, require_int, require_number
from diffrl.shapes import column

__all__ = ["LCM", "Multistep"]


@SAMPLERS.register("consistency")
@dataclass(frozen=True)
class Multistep(GaussianSampler):
    """Sampling of consistency models: jump to clean data, add noise up to a lower level, jump again.

        x0 = f(x_T, σ_max),    then for each lower level σ:    x = x0 + √(σ² - σ_min²) z,    x0 = f(x, σ)

    Each of the N levels costs one network evaluation; num_steps = 1 generates in one step.

    Source: Consistency Models (Song et al., 2023), Algorithm 1, https://arxiv.org/abs/2303.01469.

    Args:
        levels: σ below σ_max, in falling order, of which a chain of N levels takes the first N - 1; the paper
            searches for good ones by sample quality. None: those of the process's grid of N + 1 levels
            without its last, σ_min, where f returns its input.

    Raises:
        ValueError: a level is no number > 0.
    """

    levels: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        for level in self.levels or ():
            require_number("levels", level, 0, ends="()")

    def grid(self, process: Schedule, num_steps: int) -> Tensor:
        """The grid: σ_max, the lower levels, then clean data: float64, shape [N+1].

        Raises:
            ValueError: the process is not EDM, num_steps < 1, or `levels` are too few or do not fall from
                below σ_max to above σ_min.
        """
        if not isinstance(process, EDM):
            raise InputError(
                f"Multistep works on the EDM process, not on {type(process).__name__}: use DDIM(eta)"
            )
        first, clean = process.time_grid(num_steps)[[0, -1]]
        if self.levels is None:
            lower = process.time_grid(num_steps + 1)[1:num_steps]
        elif len(self.levels) < num_steps - 1:
            raise InputError(
                f"num_steps is {num_steps}, but only {len(self.levels)} levels are given below σ_max"
            )
        else:
            lower = torch.tensor(self.levels[: num_steps - 1], dtype=torch.float64)
        grid = torch.cat([first[None], lower, clean[None]])
        if not bool((grid.diff() < 0).all() and grid[-2] > process.sigma_min):
            raise InputError(
                f"levels are {list(self.levels or ())}: they must fall, from below {process.sigma_max:g} to "
                f"above {process.sigma_min:g}"
            )
        return grid

    def law(self, process: Schedule, x: Tensor, D_x: Tensor, t: Tensor, s: Tensor) -> Gaussian:
        """N(f, σ_s² - σ_min²); deterministic where s is clean."""
        assert isinstance(process, EDM)
        return Gaussian(D_x, (s**2 - process.sigma_min**2).clamp(min=0).sqrt())


@SAMPLERS.register("lcm")
@dataclass(frozen=True)
class LCM(GaussianSampler):
    """Sampling of latent consistency models on a discrete chain: jump to clean data, add noise, jump again.

        x_s = α_s D + σ_s z

    This is CPS(eta=1) on a grid of its own: these models know only the M timesteps that they were distilled on,
    (j+1) T/M - 1 for j = 0..M-1. A chain of N levels takes the ⌊i M/N⌋-th of them, counted from the noisiest.

    Sources: Latent Consistency Models (Luo et al., 2023), Algorithm 3, https://arxiv.org/abs/2310.04378; as a policy:
    RL for Consistency Models (Oertell et al., 2024), section 4, https://arxiv.org/abs/2404.03673.

    Args:
        solver_steps: M ≥ 1, the number of timesteps in the distillation.

    Raises:
        ValueError: solver_steps < 1.
    """

    solver_steps: int = 50

    def __post_init__(self) -> None:
        require_int("solver_steps", self.solver_steps, most=MAX_STEPS)

    def grid(self, process: Schedule, num_steps: int) -> Tensor:
        """The timesteps of the chain, then clean data: float64, shape [N+1].

        Raises:
            ValueError: the process is not DDPM, or num_steps lies outside 1..M, or M outside 1..T.
        """
        if not isinstance(process, DDPM):
            raise InputError(
                f"LCM works on the DDPM process, not on {type(process).__name__}: use CPS(eta=1)"
            )
        M, N = self.solver_steps, require_int("num_steps", num_steps)
        if not 1 <= N <= M <= process.train_steps:
            raise InputError(
                f"LCM needs 1 <= num_steps <= solver_steps <= train_steps, not {N}, {M} and {process.train_steps}"
            )
        place = torch.arange(N) * M // N
        t = (M - place) * (process.train_steps // M) - 1
        return torch.cat([t.double(), torch.tensor([process.t_clean], dtype=torch.float64)])

    def law(self, process: Schedule, x: Tensor, D_x: Tensor, t: Tensor, s: Tensor) -> Gaussian:
        """N(α_s D, σ_s²); deterministic where s is clean."""
        return Gaussian(column(process.alpha(s), x) * D_x, process.sigma(s))
