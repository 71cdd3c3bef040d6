"""DDPM's sampler with the variance that the network predicts."""

from dataclasses import dataclass

from torch import Tensor

from diffrl.diffusion.learned_variance import learned_log_variance
from diffrl.diffusion.posterior import posterior
from diffrl.diffusion.samplers.base import Model, NoiseFn, Sampler
from diffrl.diffusion.samplers.registry import SAMPLERS
from diffrl.shapes import column

__all__ = ["LearnedAncestral"]


@SAMPLERS.register("ancestral_learned")
@dataclass(frozen=True)
class LearnedAncestral(Sampler):
    """x_s = A D + κ x_t + Σ^½ z: ancestral sampling whose Σ is predicted, a variance for each coordinate.

    Σ is that of `diffrl.diffusion.learned_variance.learned_log_variance`. The step onto clean data adds no noise. It
    makes no policy: the laws of policies have one std a state. For denoisers with network.variance=true, trained by the
    objective `hybrid`.

    Source: Improved Denoising Diffusion Probabilistic Models (Nichol & Dhariwal, 2021), eq. 15,
    https://arxiv.org/abs/2102.09672.
    """

    def step(self, model: Model, x: Tensor, t: Tensor, s: Tensor, noise: NoiseFn) -> Tensor:
        """A draw from the law of the step.

        Raises:
            ValueError: the denoiser predicts no variance.
        """
        D_x, v = model.with_variance(x, t)
        A, kappa, _ = posterior(model.process, t, s, 1.0)
        mean = column(A, x) * D_x + column(kappa, x) * x
        if bool(s == model.process.t_clean):
            return mean
        return mean + (learned_log_variance(model.process, t, s, v) / 2).exp() * noise(x)
