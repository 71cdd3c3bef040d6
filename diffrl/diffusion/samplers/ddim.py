"""Samplers that put the clean estimate in place of x0 in the posterior: DDIM, and ancestral sampling."""

from dataclasses import dataclass

from torch import Tensor

from diffrl.diffusion.laws import Gaussian
from diffrl.diffusion.posterior import posterior
from diffrl.diffusion.samplers.base import GaussianSampler
from diffrl.diffusion.samplers.registry import SAMPLERS
from diffrl.diffusion.schedules.base import Schedule
from diffrl.ranges import require_number
from diffrl.shapes import column

__all__ = ["DDIM", "Ancestral"]


@SAMPLERS.register("ddim")
@dataclass(frozen=True)
class DDIM(GaussianSampler):
    """x_s = A D + κ x_t + std z: the posterior of the coupling η_s, with the clean estimate D in place of x0.

    η_s = 0 is deterministic, η_s = 1 is ancestral sampling. It works for every process, discrete ones too.

    Source: Denoising Diffusion Implicit Models (Song et al., 2021), eqs. 12, 16, https://arxiv.org/abs/2010.02502.

    Args:
        eta: η_s ∈ [0, 1].

    Raises:
        ValueError: eta outside [0, 1].
    """

    eta: float = 0.0

    def __post_init__(self) -> None:
        require_number("eta", self.eta, 0, 1)

    def law(self, process: Schedule, x: Tensor, D_x: Tensor, t: Tensor, s: Tensor) -> Gaussian:
        """N(A D + κ x, std²)."""
        A, kappa, std = posterior(process, t, s, self.eta)
        return Gaussian(column(A, x) * D_x + column(kappa, x) * x, std)


@SAMPLERS.register("ancestral")
def Ancestral() -> DDIM:  # noqa: N802 (used like the classes beside it)
    """DDIM(eta=1): DDPM's sampler with the posterior variance.

    Source: Denoising Diffusion Probabilistic Models (Ho et al., 2020), eqs. 6-7, https://arxiv.org/abs/2006.11239.
    """
    return DDIM(eta=1.0)
