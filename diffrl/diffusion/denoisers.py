"""Denoisers D(x_t, t) ≈ E[x0 | x_t]: what they are called with, and a network with its preconditioning.

A denoiser is any callable (x_t [N, *E], t [N], cond [N, ...] or None) → [N, *E].
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from diffrl.diffusion.predictions import PredictionType, Scalings, boundary_scalings, scalings
from diffrl.diffusion.schedules.base import Schedule
from diffrl.errors import InputError
from diffrl.shapes import expand_like, require_floating

__all__ = ["Denoiser", "DenoiserFn", "require_states"]

DenoiserFn = Callable[[Tensor, Tensor, Tensor | None], Tensor]


class Denoiser(nn.Module):
    """A network with preconditioning: D(x_t, t) = c_skip x_t + c_out F(c_in x_t, c_noise, cond).

    Source: Elucidating the Design Space of Diffusion-Based Generative Models (Karras et al., 2022), eq. 7,
    https://arxiv.org/abs/2206.00364.

    Args:
        network: F, any module (x [N, *E], c_noise [N], cond) → [N, *E].
        process: noise schedule.
        sigma_data: σd, standard deviation of the data.
        prediction_type: what F predicts, see `diffrl.diffusion.predictions.scalings`; or "consistency", the form of
            consistency models, for which D(x, σ_min) = x, see `diffrl.diffusion.predictions.boundary_scalings`.
        time_input: the form in which the network gets t: "c_noise" (≈ ln(σ/α)/4, of order one, as `diffrl.networks`
            want it), "c_noise_x1000" (250 ln σ, as consistency models of 64×64 images were published, for networks
            that embed timesteps up to 1000), or "t" itself.

    Raises:
        ValueError: an unknown prediction type or time input, or sigma_data ≤ 0.
    """

    def __init__(
        self,
        network: nn.Module,
        process: Schedule,
        sigma_data: float = 0.5,
        prediction_type: PredictionType | Literal["consistency"] = "edm",
        time_input: Literal["c_noise", "c_noise_x1000", "t"] = "c_noise",
    ) -> None:
        super().__init__()
        if not sigma_data > 0:
            raise InputError(f"sigma_data is {sigma_data}: the data's standard deviation is > 0")
        if time_input not in ("c_noise", "c_noise_x1000", "t"):
            raise InputError(f"time_input is {time_input!r}: give 'c_noise', 'c_noise_x1000' or 't'")
        self.network, self.process, self.sigma_data = network, process, sigma_data
        self.prediction_type, self.time_input = prediction_type, time_input
        self.scalings(process.time_grid(1)[:1])  # refuses an unknown type now, not later in training

    def scalings(self, t: Tensor) -> Scalings:
        """c_skip, c_out and c_in at times t."""
        if self.prediction_type == "consistency":
            return boundary_scalings(self.process, t, self.sigma_data)
        return scalings(self.process, t, self.prediction_type, self.sigma_data)

    def forward(self, x_t: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
        """Clean estimate of noisy states.

        Args:
            x_t: states, floating dtype, shape [N, *E].
            t: times, shape [N].
            cond: condition of each state, shape [N, ...], or None.

        Returns:
            D, of x_t's shape and dtype.

        Raises:
            TypeError: x_t holds integers.
            ValueError: t is not one time per state.
        """
        require_states(x_t, t)
        c_skip, c_out, c_in = (expand_like(c.to(x_t.dtype), x_t) for c in self.scalings(t))
        c_noise = t
        if self.time_input != "t":
            # float32 at least: in half precision, different noise levels would become one
            c_noise = self.process.c_noise(t).to(torch.promote_types(x_t.dtype, torch.float32))
            if self.time_input == "c_noise_x1000":
                c_noise = 1000 * c_noise
        F_x = self.network(c_in * x_t, c_noise, cond)
        D_x = c_skip * x_t + c_out * F_x.to(x_t.dtype)
        return D_x


def require_states(x_t: Tensor, t: Tensor) -> None:
    """Check the arguments of a denoiser: states x_t [N, *E] and their times t [N].

    Raises:
        TypeError: x_t holds integers.
        ValueError: t is not one time for each state.
    """
    require_floating([("x_t", x_t)])
    if t.shape != x_t.shape[:1]:
        raise InputError(
            f"t has shape {tuple(t.shape)}, but there are {x_t.shape[0]} states: give [{x_t.shape[0]}]"
        )
