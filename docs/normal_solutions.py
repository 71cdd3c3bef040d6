"""What targets on chains and pairs learn of data from N(0, 1), as the number a of D(x, t) = a x_t/α_t at each level.

Where a scheme has a grid, a function takes process and number of levels K and gives a of all levels, noisiest first;
else it takes a ratio of noise to signal s = σ/α, and K where that matters, and gives a there. The mean product of x_t
and of what the gradient of the loss carries is 0: that fixes a, from the least noisy level on, as targets are made of
less noisy states. By Stein's lemma it is the same a for every even metric ρ of an error δ that is linear in data and
noise, E[ρ'(δ) x] = E[ρ''(δ)] E[δ x], and for weights that depend on δ.
"""

import math
from functools import cache
from typing import Any

import torch
from torch import Tensor

from diffrl.diffusion.chains import Chain
from diffrl.diffusion.schedules.edm import EDM
from diffrl.objectives.cdm import RHO
from diffrl.objectives.consistency_pairs import sample_consistency_pairs
from diffrl.objectives.ect_pairs import t_to_r
from diffrl.objectives.lambda_schedule import LambdaSchedule
from diffrl.objectives.target_choice import lmbda_of_chain
from diffrl.objectives.td_edm import sample_td_edm_pairs
from diffrl.objectives.transitions import ode_step
from diffrl.objectives.weights import WeightTerms, weight_function
from docs.normal_levels import c_out, default, denoiser, exact, flow_map

__all__ = ["cdm", "consistency", "distillation", "ect", "td", "td_edm", "td_schedule"]

NEAR = 1e-3  # below it D* and X are both x but for 1e-6

# Chains


def td(
    process: EDM, K: int, *, eta: float, lmbda: float | None = None, value: Any = "posterior_mean"
) -> list[float]:
    """TD(λ) on a chain.

    Args:
        process: its levels.
        K: how many.
        eta: coupling.
        lmbda: λ; None is the default of `td`.
        value: as in `Chain`.
    """
    if lmbda is None:
        lmbda = lmbda_of_chain({name: default("td", name) for name in ("lmbda", "lookahead")}, K)
    return _chain(Chain(process, K, eta, value=value), torch.full((K,), lmbda, dtype=torch.float64))


def td_schedule(process: EDM, K: int, *, eta: float) -> list[float]:
    """TD(λ) with the λ of the state that a step reaches."""
    chain = Chain(process, K, eta)
    ends = ("low_noise", "high_noise", "nsr_low", "nsr_high")
    schedule = LambdaSchedule(**{end: default("td_lambda_schedule", end) for end in ends})
    return _chain(chain, schedule(process.log_snr(chain.t[1:])))


def _chain(chain: Chain, lmbda: Tensor) -> list[float]:
    """All levels of a chain on EDM: the error of x_i has the mean product with x_i that its λ-return has.

    A_i (1 - a_i S_ii) = Cov(B_i, x_i),    B_i = (1-λ_i) e_{i+1} + λ_i B_{i+1},    e_j = A_j (x0 - a_j x_j)
    """
    A, S, K = chain.value_coefficients[0], _covariances(chain), chain.num_transitions
    a, b = torch.ones(K, dtype=torch.float64), torch.zeros(K + 1, dtype=torch.float64)  # b_m = Cov(B_i, x_m)
    for i in reversed(range(K)):
        a[i] = (1 - b[i] / A[i]) / S[i, i]
        e = A[i] * (1 - a[i] * S[i])
        b = torch.lerp(e, b, lmbda[i - 1])  # of i - 1
    found: list[float] = a.tolist()
    return found


def _covariances(chain: Chain) -> Tensor:
    """Cov(x_i, x_j) = α_i α_j + σ_i σ_j ρ_ij, ρ the product of what is kept of the noise on the way."""
    (alpha, sigma), kept = chain.scales, chain.noise_mixing[0]
    rho = torch.eye(len(sigma), dtype=torch.float64)
    for j in range(1, len(sigma)):
        rho[:j, j] = rho[j, :j] = rho[:j, j - 1] * kept[j]
    return alpha.outer(alpha) + sigma.outer(sigma) * rho


# Pairs


def td_edm(s: float, K: int, *, coupling: str) -> float:
    """TD-EDM: w A (A (1 - a v) - A' (1 - a' C)) + c/c_out² (1 - a v) = 0, v = 1+s², C = Cov(x_t, x_t')."""
    process, x0 = EDM(), torch.zeros(1, 1, dtype=torch.float64)
    pair = sample_td_edm_pairs(process, x0, coupling=coupling, num_steps=K, sigma=x0[0] + s)
    A, A_next, s_next = (float(c) for c in (pair["A"], pair["next", "A"], pair["next", "t"]))
    v = 1 + s**2
    if not bool(pair["valid"]):
        return 1 / v
    scales = c_out(process, s), c_out(process, s_next)
    w = _weight(default("td_edm", "weight"), A, A_next, *scales, s)
    c = default("td_edm", "denoising_coef") / scales[0] ** 2
    C = 1 + s_next * (s_next if coupling == "markov" else s)
    rest = 1 - td_edm(s_next, K, coupling=coupling) * C
    return (1 - w * A * A_next * rest / (w * A**2 + c)) / v


def consistency(process: EDM, K: int, *, b: float, c: float) -> list[float]:
    """CT and TD-CT with d = l2: c (a v - a' C) = b w A (A (1 - a v) - A' (1 - a' C)), from the identity at σ_min."""
    none = torch.zeros(K - 1, 1, dtype=torch.float64)
    pairs = sample_consistency_pairs(process, none, num_scales=K, index=torch.arange(K - 1))
    a, weight = [1.0] * K, default("td_ct", "td_weight")
    for k in reversed(range(K - 1)):
        t, t_next, A, A_next = (float(pairs[key][k]) for key in ("t", ("next", "t"), "A", ("next", "A")))
        v, aC = 1 + t**2, a[k + 1] * (1 + t * t_next)
        w = b * _weight(weight, A, A_next, 1.0, 1.0, t) if bool(pairs["valid"][k]) else 0.0
        a[k] = (c * aC + w * A * (A - A_next + A_next * aC)) / ((c + w * A**2) * v)
    return a


def distillation(process: EDM, K: int) -> list[float]:
    """CD with the exact teacher: a = a' h, where a step of the teacher's ODE leads from x to h x."""
    teacher, grid, solver = exact(process), process.time_grid(K), default("cd", "solver")
    one, a = torch.ones(1, 1, dtype=torch.float64), [1.0] * K
    for k in reversed(range(K - 1)):
        h = ode_step(teacher, one, grid[k : k + 1], grid[k + 1 : k + 2], None, solver)[1]
        a[k] = a[k + 1] * float(h)
    return a


@cache
def ect(s: float, K: int = 0) -> float:
    """ECT at its last stage, with any metric: a v = a_r (1 + s r). Steps along a reference batch have the same mean."""
    stage = default("ect", "stages") - 1
    q, k, b = (default("ect", name) for name in "qkb")
    product, t = 1.0, s
    while t > NEAR:
        r = float(t_to_r(torch.tensor(t, dtype=torch.float64), stage, q, k, b))
        product *= (1 + t * r) / (1 + t**2)
        t = r
    return product * flow_map(t)


def cdm(s: float, K: int = 0) -> float:
    """What CDM's residual compares with the exact denoiser: its mean at ends of rollouts, over all gaps."""
    gap, floor, M = (default("cdm", name) for name in ("gap", "floor", "rollout_steps"))
    draws, total = 64, 0.0
    for j in range(draws):
        end = min(max(s - gap * (j + 0.5) / draws, floor), s)
        roots = s ** (1 / RHO), end ** (1 / RHO)
        times = [(roots[0] + k / M * (roots[1] - roots[0])) ** RHO for k in range(M + 1)]
        mean = math.prod(
            1 + 2 * (r - t) / t * (1 - denoiser(t)) for t, r in zip(times[:-1], times[1:], strict=True)
        )
        total += mean * denoiser(end) / draws
    return total


def _weight(name: str, A: float, A_next: float, scale: float, scale_next: float, s: float) -> float:
    terms = (torch.tensor(x, dtype=torch.float64) for x in (A, A_next, scale, scale_next, s**-2))
    return float(weight_function(name)(WeightTerms(*terms)))
