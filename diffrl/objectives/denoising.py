"""Standard denoising on single states: their noise levels are drawn one by one, and no chain is."""

import torch
from tensordict import TensorDict
from torch import Tensor

from diffrl import keys
from diffrl.diffusion.posterior import marginal
from diffrl.diffusion.schedules.base import Schedule
from diffrl.objectives.monte_carlo import monte_carlo_loss
from diffrl.objectives.one_step import one_step_chains
from diffrl.objectives.place import Place
from diffrl.objectives.registry import OBJECTIVES
from diffrl.ranges import MAX_STEPS, require_int, require_number
from diffrl.shapes import require_data, require_finite

__all__ = ["sample_log_normal_states", "sample_uniform_states"]


def sample_log_normal_states(
    process: Schedule,
    x0: Tensor,
    *,
    P_mean: float = -1.2,
    P_std: float = 1.2,
    cond: Tensor | None = None,
    noise: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> TensorDict:
    """One noisy state of each datum, at a log-normal ratio of noise to signal: EDM's law of noise levels.

        ln(σ_t/α_t) ~ N(P_mean, P_std²),    x_t = α_t x0 + σ_t ε

    In a flow t is the logistic function of ln(σ_t/α_t), so this is its logit-normal law too, with mean
    P_mean and scale P_std. With an EDM process and one generator the σ_t are those of `sample_td_edm_pairs`,
    and so is ε under its shared coupling.

    Sources: Elucidating the Design Space of Diffusion-Based Generative Models (Karras et al., 2022), Table 1,
    https://arxiv.org/abs/2206.00364; logit-normal: Scaling Rectified Flow Transformers for High-Resolution
    Image Synthesis (Esser et al., 2024), eq. 19, https://arxiv.org/abs/2403.03206.

    Args:
        process: noise schedule; one of discrete times gives the nearest.
        x0: clean data, floating dtype, shape [B, *E].
        P_mean: mean of ln(σ_t/α_t), in [-15, 15].
        P_std: its standard deviation, in [0, 5].
        cond: condition of each datum, shape [B, ...].
        noise: ε to use, of x0's shape.
        generator: source of randomness; drawn in the order σ_t, ε.

    Returns:
        TensorDict of batch size [B, 1]: chains of one step, from the state to its datum. Their value is the
        denoiser itself (A = 1, κ = 0), so that every target is the datum.

    Raises:
        TypeError: x0 is no tensor, or holds integers.
        ValueError: P_mean or P_std outside its range.
    """
    require_data(x0, cond)
    require_finite("x0", x0)
    require_number("P_mean", P_mean, -15, 15)
    require_number("P_std", P_std, 0, 5)
    z = torch.randn(len(x0), generator=generator, dtype=x0.dtype, device=x0.device)
    t = process.t_from_log_snr(-2 * (P_mean + P_std * z))
    return _states(process, x0, t, cond, noise, generator)


def sample_uniform_states(
    process: Schedule,
    x0: Tensor,
    *,
    num_steps: int = 1000,
    cond: Tensor | None = None,
    noise: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> TensorDict:
    """One noisy state of each datum, at an index drawn uniformly from a grid: the law of DDPM and flow matching.

        i ~ U(0, N-1), a whole number where times are discrete,    t = t_i,    x_t = α_t x0 + σ_t ε

    Source: Denoising Diffusion Probabilistic Models (Ho et al., 2020), algorithm 1,
    https://arxiv.org/abs/2006.11239.

    Args:
        process: noise schedule.
        x0: clean data, floating dtype, shape [B, *E].
        num_steps: N; it matters to a flow (the least time is 1/N) and to discrete times (N of them are used).
        cond: condition of each datum, shape [B, ...].
        noise: ε to use, of x0's shape.
        generator: source of randomness; drawn in the order i, ε.

    Returns:
        As `sample_log_normal_states`.

    Raises:
        TypeError: x0 is no tensor, or holds integers.
        ValueError: num_steps < 1, or more than a discrete process has.
    """
    require_data(x0, cond)
    require_finite("x0", x0)
    require_int("num_steps", num_steps, most=MAX_STEPS)
    u = torch.rand(len(x0), generator=generator, dtype=torch.float64, device=x0.device)
    i = u * (num_steps - 1) if process.continuous else (u * num_steps).floor()
    return _states(process, x0, process.time(i, num_steps).to(x0.dtype), cond, noise, generator)


def _states(
    process: Schedule,
    x0: Tensor,
    t: Tensor,
    cond: Tensor | None,
    noise: Tensor | None,
    generator: torch.Generator | None,
) -> TensorDict:
    if noise is None:
        noise = torch.randn(x0.shape, generator=generator, dtype=x0.dtype, device=x0.device)
    x_t = marginal(process, x0, t, noise).unsqueeze(1)
    datum, t = x0.unsqueeze(1), t.view(-1, 1, 1)
    zero = torch.zeros_like(t)
    left = {keys.X_T: x_t, keys.T: t, keys.A: torch.ones_like(t), keys.KAPPA: zero}
    clean = torch.full_like(t, process.t_clean)
    reached = {keys.X_T: datum, keys.T: clean, keys.A: zero, keys.KAPPA: zero}
    return one_step_chains(datum, left, reached, reward=datum, terminated=True, cond=cond)


OBJECTIVES.register(
    "edm",
    also=sample_log_normal_states,
    label="EDM",
    place=Place("denoiser", "states", "none", "end", "nothing", "none"),
)(monte_carlo_loss)
OBJECTIVES.register(
    "denoising",
    also=sample_uniform_states,
    label="Denoising",
    place=Place("denoiser", "states", "none", "end", "nothing", "none"),
)(monte_carlo_loss)
