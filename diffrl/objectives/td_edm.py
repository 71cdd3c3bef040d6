"""TD-EDM, the paper's objective: pairs of noise levels, a target network, denoising off the grid."""

from collections.abc import Mapping

import torch
from tensordict import TensorDict
from torch import Tensor

from diffrl import keys
from diffrl.denoisers import Denoiser
from diffrl.objectives.value import ValueLoss
from diffrl.processes import coupling_eta, posterior
from diffrl.schedules import EDM
from diffrl.shapes import expand_like, require_floating

__all__ = ["sample_td_edm_pairs", "td_edm_loss"]


def td_edm_loss(
    denoiser: Denoiser,
    *,
    weight: str = "edm",
    weight_options: Mapping[str, float] | None = None,
    denoising_coef: float = 0.5,
) -> ValueLoss:
    """The loss of TD-EDM, to be fed with `sample_td_edm_pairs`.

        L = mean( valid ? w ‖δ‖² + c L_den : (1 + c) L_den ),    δ = A_t (x0 - D(x_t)) - A_t' (x0 - D⁻(x_t'))

    It is `ValueLoss` with n = 1 and a target network, which the caller moves: the released command uses
    ``SoftUpdate(loss, tau=0.001)`` after every step, the code's own default is a hard copy every 100 steps.

    Source: Temporal Difference Learning for Diffusion Models (2026) and its released command,
    https://arxiv.org/abs/2606.15048.

    Args:
        denoiser: D, on an EDM process.
        weight: w; "edm" is the released code's, "pairwise" the text's.
        weight_options: numbers of that weight.
        denoising_coef: c.
    """
    return ValueLoss(
        denoiser,
        n_steps=1,
        bootstrap="target",
        weight=weight,
        weight_options=weight_options,
        denoising_coef=denoising_coef,
    )


def sample_td_edm_pairs(
    process: EDM,
    x0: Tensor,
    *,
    coupling: float | str = "markov",
    num_steps: int = 18,
    span: float = 3.0,
    stride: float = 0.2,
    P_mean: float = -1.2,
    P_std: float = 1.2,
    cond: Tensor | None = None,
    sigma: Tensor | None = None,
    noise: Tensor | None = None,
    fresh_noise: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> TensorDict:
    """Pairs (x_t, x_t') of one datum each at a log-normal noise level and `span` index units below it.

        ln σ_t ~ N(P_mean, P_std²),    i = index of σ_t on the ρ-grid,    σ_t' = σ_{i+k}
        Markov:  x_t' = x0 + σ_t' n,   x_t = x_t' + √max(σ_t² - σ_t'², 0) n_add
        shared:  x_t = x0 + σ_t n,     x_t' = x0 + σ_t' n
        valid:   σ_min ≤ σ_t ≤ σ_max and i ≤ (N-1) - (k+Δ)

    Indices are clamped to the grid, so the clean state is never reached. The defaults are the released
    command's; the paper's text has k = 1, Δ = 0.25.

    Sources: Temporal Difference Learning for Diffusion Models (2026), https://arxiv.org/abs/2606.15048; the
    log-normal law: Elucidating the Design Space of Diffusion-Based Generative Models (Karras et al., 2022),
    Table 1, https://arxiv.org/abs/2206.00364.

    Args:
        process: EDM.
        x0: clean data, shape [B, *E].
        coupling: "markov" or "shared"; the paper has no other.
        num_steps: N of the ρ-grid.
        span: k > 0, in index units.
        stride: Δ > 0, in index units.
        P_mean: mean of ln σ_t.
        P_std: standard deviation of ln σ_t.
        cond: condition, shape [B, ...].
        sigma: σ_t to use, shape [B].
        noise: n to use, of x0's shape.
        fresh_noise: n_add to use, of x0's shape (Markov only).
        generator: source of randomness; drawn in the order σ_t, n, n_add.

    Returns:
        TensorDict of batch size [B, 1], with the entry ``valid`` beside those of a chain.

    Raises:
        ValueError: another coupling, or span or stride not positive.
        TypeError: x0 holds integers.
    """
    require_floating([("x0", x0)])
    eta = coupling_eta(coupling)
    if eta not in (0.0, 1.0):
        raise ValueError(f"coupling is {coupling!r}: TD-EDM is defined for 'markov' and 'shared'")
    if not (span > 0 and stride > 0):
        raise ValueError(f"span is {span} and stride {stride}: both must be > 0")
    B, last = len(x0), num_steps - 1

    def randn(given: Tensor | None, shape: torch.Size) -> Tensor:
        return (
            torch.randn(shape, generator=generator, dtype=x0.dtype, device=x0.device)
            if given is None
            else given
        )

    sigma_t = (P_mean + P_std * randn(None, torch.Size([B]))).exp() if sigma is None else sigma
    sigma_t = sigma_t.double()
    i = process.index(sigma_t.clamp(process.sigma_min, process.sigma_max), num_steps)

    def level(index: Tensor) -> Tensor:
        return process.time(index.clamp(max=last), num_steps).clamp(process.sigma_min, process.sigma_max)

    sigma_next = level(i + span)
    valid = (sigma_t >= process.sigma_min) & (sigma_t <= process.sigma_max) & (i <= last - (span + stride))
    A = posterior(process, sigma_t, level(i + stride), eta).A
    A_next = posterior(process, sigma_next, level(i + span + stride), eta).A
    A, A_next = (
        torch.where(valid, a, 1.0) for a in (A, A_next)
    )  # unused where invalid, but must stay finite

    n = randn(noise, x0.shape)
    if eta == 1:
        x_next = x0 + _to(sigma_next, x0) * n
        added = (sigma_t**2 - sigma_next**2).clamp(min=0).sqrt()
        x_t = x_next + _to(added, x0) * randn(fresh_noise, x0.shape)
    else:
        x_t, x_next = x0 + _to(sigma_t, x0) * n, x0 + _to(sigma_next, x0) * n

    A, A_next, t, t_next = (c.to(x0.dtype).view(B, 1, 1) for c in (A, A_next, sigma_t, sigma_next))
    x0, x_t, x_next = x0.unsqueeze(1), x_t.unsqueeze(1), x_next.unsqueeze(1)
    mu, mu_next = (
        expand_like(a, x) * x0 + expand_like(1 - a, x) * x for a, x in ((A, x_t), (A_next, x_next))
    )
    cut = torch.ones(B, 1, 1, dtype=torch.bool, device=x0.device)
    left = {
        keys.X_T: x_t,
        keys.T: t,
        keys.A: A,
        keys.KAPPA: 1 - A,
        keys.X0: x0,
        keys.VALID: valid.view(B, 1, 1),
    }
    if cond is not None:
        left[keys.COND] = cond.unsqueeze(1)
    reached = {
        keys.X_T: x_next,
        keys.T: t_next,
        keys.A: A_next,
        keys.KAPPA: 1 - A_next,
        keys.REWARD: mu - mu_next,
    }
    reached |= {keys.DONE: cut, keys.TRUNCATED: cut, keys.TERMINATED: ~cut}
    return TensorDict({**left, keys.NEXT: TensorDict(reached, [B, 1])}, [B, 1])


def _to(c: Tensor, x: Tensor) -> Tensor:
    return expand_like(c.to(x.dtype), x)
