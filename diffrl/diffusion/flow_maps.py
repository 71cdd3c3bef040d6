"""Flow maps X_{t→r}: where the probability-flow ODE leads from a state at time t, by a denoiser of two times."""

from typing import Any

from torch import Tensor

from diffrl.diffusion.denoisers import require_second_time, require_states
from diffrl.diffusion.schedules.base import Schedule
from diffrl.errors import InputError
from diffrl.shapes import expand_like

__all__ = ["average_estimate", "flow_map", "map_coefficients"]


def map_coefficients(process: Schedule, t: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    """κ = σ_r/σ_t and A = α_r - α_t κ of the map X = κ x + A D, in the dtype of t and r.

    They are those of a deterministic step of DDIM, as `diffrl.diffusion.posterior.posterior` has them at η = 0 in
    float64; these can be differentiated in t and r. On `VP`, σ_r has no finite derivative at r = 0: there, give r no
    tangent, not even 0.

    Args:
        process: noise schedule.
        t: times, not clean, any shape.
        r: times, of t's shape.
    """
    kappa = process.sigma(r) / process.sigma(t)
    return kappa, process.alpha(r) - process.alpha(t) * kappa


def flow_map(denoiser: Any, x: Tensor, t: Tensor, r: Tensor, cond: Tensor | None = None) -> Tensor:
    """The state at time r on the path of the probability-flow ODE through x at time t.

        X_{t→r}(x) = κ x + A D(x, t, r),    κ = σ_r/σ_t,    A = α_r - α_t κ

    With s = σ/α the ODE is d(x/α)/ds = (x/α - D(x, t))/s, so this defines D(x, t, r): the average of the clean estimate
    along the path, with weight ∝ 1/s² between s_r and s_t. D(x, t, t) is the denoiser, D(x, t, clean) = X_{t→clean}. On
    `Flow` it is D = x - t u(x, t, r) with MeanFlow's average velocity u, X_{t→r} = x - (t - r) u.

    >>> import diffrl, torch
    >>> from diffrl.diffusion import flow_map
    >>> network = diffrl.networks.MLP((2,), second_time=True)
    >>> denoiser = diffrl.Denoiser(network, diffrl.Flow(), prediction_type="velocity")
    >>> x, t, r = torch.randn(3, 2), torch.full((3,), 0.8), torch.full((3,), 0.3)
    >>> flow_map(denoiser, x, t, r).shape
    torch.Size([3, 2])

    Sources: Mean Flows for One-step Generative Modeling (Geng et al., 2025), eqs. 3 and 12,
    https://arxiv.org/abs/2505.13447; as a step of DDIM: Denoising Diffusion Implicit Models (Song et al., 2021), eq.
    12, https://arxiv.org/abs/2010.02502. One form for all processes is ours.

    Args:
        denoiser: D of two times, with its process: a `Denoiser` whose network has ``second_time``, or an exact one.
        x: states at times t, shape [N, *E].
        t: times, not clean, shape [N].
        r: times to reach, shape [N]; clean ones too.
        cond: condition of each state, shape [N, ...], or None.

    Raises:
        ValueError: a denoiser without a second time, or t or r that is not one time for each state.
    """
    require_second_time(denoiser)
    require_states(x, t)
    require_states(x, r, "r")
    kappa, A = (expand_like(c.to(x.dtype), x) for c in map_coefficients(denoiser.process, t, r))
    D_x: Tensor = denoiser(x, t, cond, r)
    return kappa * x + A * D_x


def average_estimate(process: Schedule, X: Tensor, x: Tensor, t: Tensor, r: Tensor) -> Tensor:
    """D(x, t, r) of which X is the map: D = (X - κ x)/A; the inverse of `flow_map`.

    Args:
        process: noise schedule.
        X: states at times r, shape [N, *E].
        x: states at times t that they come from, of X's shape.
        t: times, not clean, shape [N].
        r: times, another one than t in each row, shape [N].

    Raises:
        ValueError: r = t in some row, where X = x says nothing of D.
    """
    kappa, A = map_coefficients(process, t, r)
    if bool((A == 0).any()):
        raise InputError("r is t in some row: the average there is the clean estimate itself, D(x, t)")
    return (X - expand_like(kappa.to(x.dtype), x) * x) / expand_like(A.to(x.dtype), x)
