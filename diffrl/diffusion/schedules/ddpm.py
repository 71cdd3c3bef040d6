"""DDPM's variance-preserving chain of discrete timesteps."""

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Literal

import torch
from torch import Tensor

from diffrl.diffusion.schedules.base import Schedule
from diffrl.diffusion.schedules.curves import discrete_alphas_cumprod
from diffrl.diffusion.schedules.registry import PROCESSES
from diffrl.errors import InputError
from diffrl.ranges import require_int, require_number

__all__ = ["DDPM"]


@PROCESSES.register("ddpm")
@dataclass(frozen=True)
class DDPM(Schedule):
    """Discrete variance-preserving chain: α_t = √ᾱ_t, σ_t = √(1-ᾱ_t), t ∈ {T-1, …, 0}; clean data is t = -1.

    Kinds: see `discrete_alphas_cumprod`. Stable Diffusion's is scaled_linear, β from 0.00085 to 0.012.
    A chain of N ≤ T steps takes the timesteps round((N-i) T/N) - 1, of which the noisiest is T-1 ("trailing").

    Source: Denoising Diffusion Probabilistic Models (Ho et al., 2020), eq. 4, https://arxiv.org/abs/2006.11239.

    Args:
        train_steps: T ∈ [1, 100,000].
        kind: "linear", "scaled_linear" or "cosine".
        beta_start: β_0 (not cosine), > 0.
        beta_end: β_{T-1} (not cosine), ≥ beta_start and < 1.

    Raises:
        ValueError: an argument outside its range; betas that leave no signal (ᾱ < 1e-24) at the noisiest timestep.
        IndexError: (alpha, sigma) a time outside -1..T-1.
    """

    t_clean: ClassVar[float] = -1.0
    continuous: ClassVar[bool] = False

    train_steps: int = 1000
    kind: Literal["linear", "scaled_linear", "cosine"] = "linear"
    beta_start: float = 1e-4
    beta_end: float = 0.02

    def __post_init__(self) -> None:
        if self.kind not in ("linear", "scaled_linear", "cosine"):
            raise InputError(f"DDPM has kinds scaled_linear, linear and cosine, not {self.kind!r}")
        require_int("train_steps", self.train_steps, most=100_000)
        require_number("beta_start", self.beta_start, 1e-12, 1, "[)")
        require_number("beta_end", self.beta_end, self.beta_start, 1, "[)")
        if float(self.alphas_cumprod[-1]) < 1e-24:
            raise InputError(
                f"beta_end is {self.beta_end}: no signal is left after train_steps = {self.train_steps}; "
                "give smaller betas or fewer steps"
            )

    @cached_property
    def alphas_cumprod(self) -> Tensor:
        """ᾱ_t for t = 0..T-1, float64, shape [T]."""
        return discrete_alphas_cumprod(self.kind, self.train_steps, self.beta_start, self.beta_end)

    @cached_property
    def _scales(self) -> Tensor:
        """Rows α and σ; column 0 is the clean state, so that t = -1 needs no special case: shape [2, T+1]."""
        alpha_bar = torch.cat([torch.ones(1, dtype=torch.float64), self.alphas_cumprod])
        return torch.stack([alpha_bar, 1 - alpha_bar]).sqrt()

    def _look_up(self, row: int, t: Tensor) -> Tensor:
        place = t.round().long().flatten() + 1
        try:  # unlike [...], index_select refuses a negative place
            values = self._scales[row].to(t.device).index_select(0, place).view(t.shape)
        except IndexError as error:
            raise IndexError(f"a timestep lies outside -1..{self.train_steps - 1}") from error
        return values.to(t.dtype) if t.is_floating_point() else values

    @property
    def t_least(self) -> float:
        """The first timestep."""
        return 0.0

    def alpha(self, t: Tensor) -> Tensor:
        return self._look_up(0, t)

    def sigma(self, t: Tensor) -> Tensor:
        return self._look_up(1, t)

    def alpha_dot(self, t: Tensor) -> Tensor:
        raise InputError(
            "DDPM has discrete times and no derivative: give sampler=ddim or ancestral, or process=vp"
        )

    def sigma_dot(self, t: Tensor) -> Tensor:
        return self.alpha_dot(t)

    def t_from_log_snr(self, log_snr: Tensor) -> Tensor:
        levels = self.log_snr(torch.arange(self.train_steps, dtype=torch.float64, device=log_snr.device))
        t = (levels - log_snr.double().unsqueeze(-1)).abs().argmin(-1)
        return t.to(log_snr.dtype)

    def _level(self, index: Tensor, num_steps: int) -> Tensor:
        if num_steps > self.train_steps:
            raise InputError(f"num_steps is {num_steps}, but this DDPM has only {self.train_steps} timesteps")
        if not bool((index == index.round()).all()):
            raise InputError("DDPM has discrete times: span, stride and offset must be whole numbers")
        return ((num_steps - index) * (self.train_steps / num_steps)).round() - 1

    def index(self, t: Tensor, num_steps: int) -> Tensor:
        return (num_steps - (t.double() + 1) * (num_steps / self.train_steps)).round()
