"""Sampling with flow maps: jumps along the probability-flow ODE, each by one evaluation."""

from dataclasses import dataclass

from torch import Tensor

from diffrl.diffusion.laws import NoiseFn
from diffrl.diffusion.samplers.base import Model, Sampler
from diffrl.diffusion.samplers.ddim import DDIM
from diffrl.diffusion.samplers.registry import SAMPLERS

__all__ = ["FlowMap"]


@SAMPLERS.register("flow_map")
@dataclass(frozen=True)
class FlowMap(Sampler):
    """x_s = X_{t→s}(x_t), by the denoiser's average clean estimate D(x_t, t, s); deterministic.

    A chain of N levels costs N evaluations, and one level generates in one step. With an exact map every N gives the
    same samples. It is DDIM(0) with D(x, t, s) in place of D(x, t), and works for every process; the denoiser needs a
    second time (`network.second_time=true`), trained by an objective that has maps. Consistency models, whose maps all
    lead to clean data, have the sampler `consistency`.

    Source: Mean Flows for One-step Generative Modeling (Geng et al., 2025), eq. 12, https://arxiv.org/abs/2505.13447.
    """

    def step(self, model: Model, x: Tensor, t: Tensor, s: Tensor, noise: NoiseFn) -> Tensor:
        """The state at s; it uses no noise.

        Raises:
            ValueError: a denoiser without a second time.
        """
        return DDIM().law(model.process, x, model(x, t, s), t, s).mean
