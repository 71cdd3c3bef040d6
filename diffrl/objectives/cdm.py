"""Consistent diffusion models (CDM): double sampling on two short rollouts of the model's own SDE, as published."""

from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor, nn

from diffrl import keys
from diffrl.diffusion.denoisers import Denoiser
from diffrl.diffusion.schedules.base import Schedule
from diffrl.diffusion.schedules.edm import EDM
from diffrl.errors import InputError
from diffrl.objectives.denoising import sample_log_normal_states
from diffrl.objectives.double_sampling import DoubleSamplingLoss
from diffrl.objectives.one_step import one_step_chains
from diffrl.objectives.place import Place
from diffrl.objectives.registry import OBJECTIVES
from diffrl.ranges import require_int, require_number
from diffrl.registry import options_of
from diffrl.shapes import expand_like

__all__ = ["ShortRollouts", "cdm_loss", "reverse_sde"]

RHO = 7.0  # of the grid between t and s, as released


class ShortRollouts:
    """Two rollouts of the model from each state, to a noise level a little below its own.

        ln t ~ N(P_mean, P_std²),    s = max(t - ε, floor),    ε ~ U(0, gap)
        x_s¹, x_s² from x_t by `rollout_steps` Euler steps of the reverse SDE, at levels even in σ^{1/7}

    Where t itself lies below the floor, nothing moves, s = t.

    Source: Consistent Diffusion Models: Mitigating Sampling Drift by Learning to be Consistent (Daras et al., 2023),
    https://arxiv.org/abs/2302.09057, and its released code.

    Args:
        process: EDM.
        denoiser: the model.
        P_mean: mean of ln t.
        P_std: its standard deviation.
        gap: greatest t - s, in units of σ, > 0.
        floor: least s, > 0.
        rollout_steps: of Euler from t to s, in [1, 1000].

    Raises:
        ValueError: another process, or a number outside its range.
    """

    def __init__(
        self,
        process: Schedule,
        *,
        denoiser: nn.Module,
        P_mean: float = -1.2,
        P_std: float = 1.2,
        gap: float = 0.05,
        floor: float = 0.002,
        rollout_steps: int = 5,
    ) -> None:
        if not isinstance(process, EDM):
            raise InputError(
                f"the process is {type(process).__name__}: CDM's levels are those of EDM, set process=edm"
            )
        require_number("P_mean", P_mean, -15, 15)
        require_number("P_std", P_std, 0, 5)
        require_number("gap", gap, 0, ends="()")
        require_number("floor", floor, 0, ends="()")
        require_int("rollout_steps", rollout_steps, 1, 1000)
        self.process, self._denoiser, self.P_mean, self.P_std = process, denoiser, P_mean, P_std
        self.gap, self.floor, self.rollout_steps = gap, floor, rollout_steps

    def __call__(self, x0: Tensor, *, cond: Tensor | None = None, generator: torch.Generator) -> TensorDict:
        """Twin steps [B, 2] of data x0 [B, *E]; drawn in the order levels, noise, gaps, rollouts."""
        return self.onwards(self.states(x0, cond=cond, generator=generator), generator=generator)

    def states(self, x0: Tensor, *, cond: Tensor | None, generator: torch.Generator) -> TensorDict:
        """Those that steps leave, [B, 1]."""
        P_mean, P_std = self.P_mean, self.P_std
        return sample_log_normal_states(
            self.process, x0, P_mean=P_mean, P_std=P_std, cond=cond, generator=generator
        )

    def onwards(self, states: TensorDict, *, generator: torch.Generator) -> TensorDict:
        """Twin steps [B, 2] from states."""
        cond = states.get(keys.COND, None)
        pair: TensorDict = torch.cat([states, states], 1)
        t = pair[keys.T]
        u = torch.rand(len(t), 1, 1, generator=generator, dtype=t.dtype, device=t.device)
        s = torch.minimum((t - self.gap * u).clamp(min=self.floor), t)
        high, low = t ** (1 / RHO), s ** (1 / RHO)
        shares = [j / self.rollout_steps for j in range(1, self.rollout_steps)]
        times = torch.stack([t, *(torch.lerp(high, low, share) ** RHO for share in shares), s])
        times = times.cummin(0).values.clamp(min=s).flatten(1)  # rounding must not turn them round
        both = None if cond is None else pair[keys.COND].flatten(0, 1)
        x_s = reverse_sde(self._denoiser, pair[keys.X_T].flatten(0, 1), times, cond=both, generator=generator)
        left = {key: pair[key] for key in (keys.X_T, keys.T, keys.A, keys.KAPPA)}
        reached = {**left, keys.X_T: x_s.view_as(pair[keys.X0]), keys.T: s}
        zero = torch.zeros_like(pair[keys.X0])  # the value is the datum at both ends, so that no step pays
        twins = one_step_chains(pair[keys.X0], left, reached, reward=zero, terminated=False, cond=None)
        if cond is not None:
            twins[keys.COND] = pair[keys.COND]
        twins[keys.EVALUATIONS] = torch.full_like(t, self.rollout_steps)
        return twins


@torch.no_grad()
def reverse_sde(
    denoiser: nn.Module,
    x: Tensor,
    times: Tensor,
    *,
    cond: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Euler's steps of the reverse SDE of EDM, dx = 2 (x - D)/t dt + √(2t) dw, along given times, without gradient.

        x' = x + 2 (t' - t)(x - D(x, t))/t + √(2 t (t - t')) z

    In the limit of small steps it is `diffrl.objectives.twins.reverse_rollout` at η = 1.

    Source: released code of Consistent Diffusion Models (Daras et al., 2023), https://arxiv.org/abs/2302.09057.

    Args:
        denoiser: D.
        x: states at the first times, shape [N, *E].
        times: falling, > 0, shape [M+1, N]; a time that repeats leaves the state as it is.
        cond: shape [N, ...].
        generator: source of z.
    """
    for t, s in zip(times[:-1], times[1:], strict=True):
        z = torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)
        drift = expand_like(2 * (s - t) / t, x) * (x - denoiser(x, t, cond))
        x = x + drift + expand_like((2 * t * (t - s)).sqrt(), x) * z
    return x


@OBJECTIVES.register(
    "cdm",
    also=ShortRollouts,
    label="CDM",
    place=Place("denoiser", "pairs", "markov", "one_step", "residual", "own", note="beside denoising"),
)
@options_of(DoubleSamplingLoss, weight="none", residual_coef=2.0, denoising_coef=1.0)
def cdm_loss(denoiser: Denoiser, **options: Any) -> DoubleSamplingLoss:
    """CDM as published: denoising, and twice the product of two residuals of the model's own rollouts.

        L = (‖D(x_t) - x0‖²/c_out² + b ⟨D(x_s¹) - D(x_t), D(x_s²) - D(x_t)⟩)/dim(E),    b = 2

    The gradient goes through D(x_s¹), D(x_s²) and D(x_t), not through the rollouts. It is `double_sampling` with
    source=rollouts on the 'clean' value, at its own levels and by its own steps. The default of the released loss is
    b = 2, which is taken here; that of the released command is 10. Its sums over dims are means here.

    Its fixed point is that of denoising, E[x0 | x_t], but for the error of Euler's steps. So in one step it draws no
    better samples than Monte Carlo, by design.

    Source: Consistent Diffusion Models: Mitigating Sampling Drift by Learning to be Consistent (Daras et al., 2023),
    https://arxiv.org/abs/2302.09057, and its released code.

    Args:
        denoiser: D, on an EDM process; trained in place.
        options: those of `DoubleSamplingLoss`.
    """
    return DoubleSamplingLoss(denoiser, **options)
