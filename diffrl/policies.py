"""A denoiser and a stochastic kernel as a policy: the action is the next latent, and it has a log-probability."""

from typing import Literal, NamedTuple

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor, nn

from diffrl import keys
from diffrl.processes import normal_log_prob
from diffrl.samplers import GaussianSampler
from diffrl.schedules import Schedule

__all__ = ["DenoisingPolicy", "Law"]


class Law(NamedTuple):
    """π(x_s | x_t) = N(mean, std² I), and the clean estimate it was made from."""

    mean: Tensor
    """Shape [N, *E]."""
    std: Tensor
    """Shape [N]."""
    x0_hat: Tensor
    """Shape [N, *E]."""


class DenoisingPolicy(TensorDictModuleBase):
    """π_θ(x_{i+1} | x_i) of a reverse sampler: what DDPO, SDPO and their relatives tune.

        x_{i+1} ~ N(mean(x_i, D_θ(x_i)), max(std_i, floor)² I)

    The action is the next latent. Where std is 0 (the step onto clean data, or an ODE) the step is deterministic,
    its log-probability is reported as 0, and `trainable` is False: losses leave it out. A floor on std makes
    every step stochastic instead, in sampling and in the log-probability alike. Both are computed in float32.

    Source: Training Diffusion Models with Reinforcement Learning (Black et al., 2024), section 4.2,
    https://arxiv.org/abs/2305.13301.

    Args:
        denoiser: D_θ.
        sampler: whose kernel is followed.
        num_steps: K = N noise levels of the grid.
        reduction: "mean" or "sum" of log-probabilities over the event dims. They differ by the factor dim(E), and
            a clip range made for one means nothing for the other.
        std_floor: least standard deviation of a step.
        process: noise schedule; the denoiser's if None.

    Raises:
        ValueError: an unknown reduction or a negative floor.
    """

    in_keys = [keys.X_T, keys.INDEX]
    out_keys = [keys.ACTION, keys.ACTION_LOG_PROB, keys.X0_HAT]

    def __init__(
        self,
        denoiser: nn.Module,
        sampler: GaussianSampler,
        *,
        num_steps: int,
        reduction: Literal["mean", "sum"],
        std_floor: float = 0.0,
        process: Schedule | None = None,
    ) -> None:
        super().__init__()
        if reduction not in ("mean", "sum"):
            raise ValueError(f"reduction is {reduction!r}: give 'mean' or 'sum'")
        if not std_floor >= 0:
            raise ValueError(f"std_floor is {std_floor}: it is a standard deviation >= 0")
        self.denoiser, self.sampler, self.num_steps = denoiser, sampler, num_steps
        self.reduction, self.std_floor = reduction, std_floor
        self.process: Schedule = denoiser.process if process is None else process  # type: ignore[assignment]
        self.grid = sampler.grid(self.process, num_steps)
        """Times of the states, the clean one last: float64, shape [K+1]."""
        self.nfe = 0
        """States forwarded so far."""
        self.generator: torch.Generator | None = None

    def law(self, x_t: Tensor, index: Tensor, cond: Tensor | None = None) -> Law:
        """The law of the next latent.

        Args:
            x_t: states, shape [N, *E].
            index: position of each along the chain, integers in [0, K-1], shape [N].
            cond: condition, shape [N, ...], or None.
        """
        i = index.cpu()
        t, s = self.grid[i], self.grid[i + 1]
        self.nfe += len(x_t)
        x_t = x_t.float()
        D_x = self.denoiser(x_t, t.to(x_t), cond).float()
        mean, std = self.sampler.law(self.process, x_t, D_x, t, s)
        return Law(mean, std.clamp(min=self.std_floor).expand(len(x_t)).to(x_t), D_x)

    def log_prob(self, law: Law, action: Tensor) -> Tensor:
        """Log π of actions, float32, shape [N]; 0 where the step is deterministic."""
        stochastic = law.std > 0
        std = torch.where(stochastic, law.std, 1.0)
        log_p = normal_log_prob(action.float(), law.mean, std, batch_dims=1, reduction=self.reduction)
        return torch.where(stochastic, log_p, 0.0)

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Draw actions: write action, action_log_prob, x0_hat and trainable into the TensorDict [*b]."""
        b = tensordict.ndim
        x_t = tensordict.get(keys.X_T)
        cond = tensordict.get(keys.COND, None)
        cond = None if cond is None else cond.flatten(0, b - 1)
        law = self.law(x_t.flatten(0, b - 1), tensordict.get(keys.INDEX).flatten(), cond)
        z = torch.randn(
            law.mean.shape, generator=self.generator, dtype=law.mean.dtype, device=law.mean.device
        )
        action = law.mean + law.std.view(-1, *[1] * (law.mean.ndim - 1)) * z
        tensordict.set(keys.ACTION, action.view_as(x_t))
        tensordict.set(keys.ACTION_LOG_PROB, self.log_prob(law, action).view(tensordict.shape))
        tensordict.set(keys.X0_HAT, law.x0_hat.view_as(x_t))
        tensordict.set(keys.TRAINABLE, (law.std > 0).view(*tensordict.shape, 1))
        return tensordict
