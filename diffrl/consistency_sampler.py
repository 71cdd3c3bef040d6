"""Sampling of consistency models: in one jump, or in a few with fresh noise between them."""

from dataclasses import dataclass

import torch
from torch import Tensor

from diffrl.kernels import GaussianSampler, Kernel
from diffrl.schedules import EDM, Schedule

__all__ = ["Multistep"]


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
