"""Exact flow maps of data whose law is known: the probability-flow ODE of the exact denoiser, integrated."""

import math

import torch
from torch import Tensor, nn

from diffrl.diffusion.adaptive_steps import integrate
from diffrl.diffusion.denoisers import require_states
from diffrl.diffusion.exact import GaussianDenoiser, MixtureDenoiser
from diffrl.diffusion.flow_maps import average_estimate
from diffrl.diffusion.schedules.vp import VP
from diffrl.errors import InputError, InputTypeError
from diffrl.ranges import require_number
from diffrl.shapes import expand_like

__all__ = ["ExactFlowMap"]

LEAST = 1e-7  # σ/α from which on a single step leads to clean data


class ExactFlowMap(nn.Module):
    """The exact map X*_{t→r} of a known law, and as a denoiser its average clean estimate D*(x, t, r).

    States of every process are states of the cosine process, z = x/√(α² + σ²) at the angle θ = atan(σ/α), and there
    with τ = log tan(θ/2) the ODE is

        dz/dτ = cos θ z - D*(z, θ),    cos θ = -tanh τ

    which is smooth at pure noise (τ = 0) and has even steps towards clean data (τ → -∞). From σ/α = 1e-7 on one step
    with D* leads to clean data, with an error of 5e-15 times the score of the data. Everything is evaluated in float64.

    >>> import diffrl, torch
    >>> from diffrl.diffusion import ExactFlowMap, flow_map
    >>> mixture = diffrl.data.gmm(dim=2).mixture
    >>> oracle = diffrl.MixtureDenoiser(diffrl.EDM(), mixture.means, mixture.stds, mixture.weights)
    >>> exact, x = ExactFlowMap(oracle), 80 * torch.randn(3, 2)
    >>> t, r = torch.full((3,), 80.0), torch.zeros(3)
    >>> torch.allclose(exact.map(x, t, r), flow_map(exact, x, t, r))
    True

    Args:
        oracle: the exact denoiser of the law on its process.
        rtol: error of a step of the integrator, relative to the root mean square of a state, in [1e-13, 0.1]; the
            map's is of the order of ten times that.

    Raises:
        TypeError: a denoiser that is not one of the exact ones.
        ValueError: rtol outside its range.
    """

    second_time = True

    def __init__(self, oracle: MixtureDenoiser | GaussianDenoiser, *, rtol: float = 1e-9) -> None:
        super().__init__()
        if not isinstance(oracle, MixtureDenoiser | GaussianDenoiser):
            raise InputTypeError(
                f"oracle is a {type(oracle).__name__}: give an exact denoiser, such as diffrl.MixtureDenoiser"
            )
        self.rtol = require_number("rtol", rtol, 1e-13, 0.1)
        self.oracle, self.process = oracle, oracle.process
        self.on_cosine = oracle.on(VP(kind="cosine"))

    def map(self, x: Tensor, t: Tensor, r: Tensor) -> Tensor:
        """X*_{t→r}(x), of x's dtype.

        Args:
            x: states, shape [N, *E].
            t: their times, not clean, shape [N].
            r: times to reach, of either direction, clean ones too, shape [N].

        Raises:
            TypeError: x holds integers.
            ValueError: t or r is not one time for each state, or t clean; states that are not finite.
        """
        require_states(x, t)
        require_states(x, r, "r")
        (tau_t, n_t), (tau_r, n_r) = (self._place(time.double()) for time in (t, r))
        if bool((tau_t == -math.inf).any()):
            raise InputError("t is clean in some row: a map starts from a noisy state")
        # where a row is integrated to: not nearer to clean data than LEAST
        tau = torch.maximum(tau_r, tau_t.clamp(max=math.log(LEAST / 2)))
        z = integrate(self._slope, x.double() / expand_like(n_t, x), tau_t, tau, rtol=self.rtol)
        z = torch.where(expand_like(tau == tau_r, x), z, self._last_step(z, tau, tau_r))
        return (expand_like(n_r, x) * z).to(x.dtype)

    def forward(self, x: Tensor, t: Tensor, cond: Tensor | None = None, r: Tensor | None = None) -> Tensor:
        """D*(x, t, r), of x's dtype; the exact denoiser where r is None or t. cond is ignored.

        It is the difference of two states over 1 - s_r/s_t, s = σ/α, so that its error grows as r comes near to t.

        Args and errors are those of `map`.
        """
        D_x = self.oracle(x, t)
        if r is None:
            return D_x
        require_states(x, r, "r")
        far = (r != t).nonzero().squeeze(1)
        given = (x[far].double(), t[far].double(), r[far].double())
        D_x[far] = average_estimate(self.process, self.map(*given), *given).to(D_x.dtype)
        return D_x

    def _place(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """τ, -∞ for clean data, and √(α² + σ²)."""
        alpha, sigma = self.process.alpha(t), self.process.sigma(t)
        n = torch.hypot(alpha, sigma)
        return sigma.log() - (alpha + n).log(), n

    def _estimate(self, z: Tensor, tau: Tensor) -> Tensor:
        return self.on_cosine(z, 4 / math.pi * tau.exp().atan())

    def _slope(self, z: Tensor, tau: Tensor) -> Tensor:
        """dz/dτ."""
        return -expand_like(tau.tanh(), z) * z - self._estimate(z, tau)

    def _last_step(self, z: Tensor, tau: Tensor, tau_r: Tensor) -> Tensor:
        """A step of DDIM: sin θ_r/sin θ z + (cos θ_r - cos θ sin θ_r/sin θ) D*, sin θ = 1/cosh τ."""
        kappa = tau.cosh() / tau_r.cosh()
        A = tau.tanh() * kappa - tau_r.tanh()
        return expand_like(kappa, z) * z + expand_like(A, z) * self._estimate(z, tau)
