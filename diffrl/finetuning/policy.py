"""A denoiser and a stochastic kernel as a policy: the action is the next latent, and it has a log-probability."""

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Generator, Tensor, nn
from torch.distributions import Distribution

from diffrl import keys
from diffrl.diffusion.laws import Gaussian, NoiseFn
from diffrl.diffusion.samplers.base import GaussianSampler, Noise
from diffrl.diffusion.schedules.base import Schedule
from diffrl.errors import InputError, InputTypeError
from diffrl.ranges import MAX_STEPS, require_int, require_number
from diffrl.shapes import column

__all__ = ["ActionDistribution", "DenoisingPolicy"]

OfRows = Callable[[slice], Tensor]
"""The clean estimates of some rows of a batch."""


class DenoisingPolicy(TensorDictModuleBase):
    """π_θ(x_{i+1} | x_i) of a reverse sampler: what DDPO, SDPO and their relatives tune.

        x_{i+1} ~ N(mean(x_i, D_θ(x_i)), max(std_i, floor)² I)

    The action is the next latent. Where std is 0 (the step onto clean data, or an ODE) the step is deterministic,
    its log-probability is reported as 0, and `trainable` is False: losses leave it out. A floor on std makes
    every step stochastic instead, in sampling and in the log-probability alike. Both are computed in float32, of states
    in float64 in that.

    It is an actor to TorchRL: call it with a TensorDict, or give it to a rollout, a collector or `ClipPPOLoss`.

    Source: Training Diffusion Models with Reinforcement Learning (Black et al., 2024), section 4.2,
    https://arxiv.org/abs/2305.13301.

    Args:
        denoiser: D_θ; a `StepConditioned` one is told K.
        sampler: whose kernel is followed.
        num_steps: K = N noise levels of the grid.
        reduction: "mean" or "sum" of log-probabilities over the event dims. They differ by the factor dim(E), and
            a clip range made for one means nothing for the other.
        std_floor: least standard deviation of a step.
        noise_steps: positions of the steps that have noise, 0..K-1; the others become deterministic, after the
            floor. None: all.
        process: noise schedule; the denoiser's if None.

    Raises:
        TypeError: the sampler's step is not one Gaussian.
        ValueError: an unknown reduction, a negative floor, a step outside 0..K-1, or no process.
    """

    in_keys = [keys.X_T, keys.INDEX]
    out_keys = [keys.ACTION, keys.ACTION_LOG_PROB, keys.X0_HAT, keys.TRAINABLE]

    def __init__(
        self,
        denoiser: nn.Module,
        sampler: GaussianSampler,
        *,
        num_steps: int,
        reduction: Literal["mean", "sum"],
        std_floor: float = 0.0,
        noise_steps: list[int] | None = None,
        process: Schedule | None = None,
    ) -> None:
        super().__init__()
        if reduction not in ("mean", "sum"):
            raise InputError(f"reduction is {reduction!r}: give 'mean' or 'sum'")
        require_number("std_floor", std_floor, 0)
        if not isinstance(sampler, GaussianSampler):
            raise InputTypeError(
                f"{sampler!r} has steps without a law: give a sampler such as diffrl.Ancestral()"
            )
        if getattr(denoiser, "prior", None) is not None:
            raise InputError(
                "this denoiser has a prior of its own noise: a policy draws N(0, I), use prior=standard"
            )
        process = getattr(denoiser, "process", None) if process is None else process
        if process is None:
            raise InputError("this denoiser does not know its process: give process=")
        self.denoiser, self.sampler = denoiser, sampler
        self.reduction, self.std_floor, self.noise_steps = reduction, std_floor, noise_steps
        self.process: Schedule = process
        self.num_steps = num_steps
        self.nfe = 0
        """States forwarded so far, twice each under guidance."""
        self.over_rows: Callable[[OfRows, Tensor], Tensor] = _all_rows
        """Asks for the clean estimates of states [N, *E]: here those of all rows; see `diffrl.finetuning.shares`."""
        self.generator: Generator | Sequence[Generator] | None = None
        """What actions are drawn from in `forward`: one, or one per state; None: torch's global one."""

    @property
    def num_steps(self) -> int:
        """K; another one may be set, which gives the policy another grid."""
        return self._num_steps

    @num_steps.setter
    def num_steps(self, K: int) -> None:
        K = require_int("num_steps", K, 1, MAX_STEPS)
        if not all(i in range(K) for i in self.noise_steps or []):
            raise InputError(f"noise_steps is {self.noise_steps}: the steps are 0..{K - 1}")
        known: Sequence[int] | None = getattr(self.denoiser, "step_counts", None)
        if known is not None and K not in known:
            raise InputError(f"num_steps is {K}, but the denoiser knows {list(known)} steps")
        self._told = {} if known is None else {"num_steps": K}
        self._num_steps = K
        self.grid = self.sampler.grid(self.process, K)
        """Times of the states, the clean one last: float64, shape [K+1]."""
        kept = range(K) if self.noise_steps is None else self.noise_steps
        self._noisy = torch.tensor([i in kept for i in range(K)], dtype=torch.bool)

    @property
    def stochastic_steps(self) -> list[int]:
        """Positions of the steps that have noise, so that a log-probability can be trained."""
        x, grid = torch.zeros(1, 1, dtype=torch.float64), self.grid
        stds = [
            float(self.sampler.law(self.process, x, x, t, s).std)
            for t, s in zip(grid[:-1], grid[1:], strict=True)
        ]
        return [i for i, std in enumerate(stds) if self._noisy[i] and max(std, self.std_floor) > 0]

    def estimate(self, x_t: Tensor, index: Tensor, cond: Tensor | None = None) -> Tensor:
        """The clean estimate D_θ of states, float32 [N, *E]; arguments as of `law`."""
        return self.denoise(x_t, self.grid[index.cpu()], cond)

    def denoise(self, x_t: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
        """D_θ of states [N, *E] at any times [N], on the grid or not, float32; it counts as the policy's evaluation."""
        self.nfe += len(x_t) * int(getattr(self.denoiser, "evaluations", 1))
        x_t = _real(x_t)
        t = t.to(x_t)

        def of(rows: slice) -> Tensor:
            return _real(
                self.denoiser(x_t[rows], t[rows], None if cond is None else cond[rows], **self._told)
            )

        return self.over_rows(of, x_t)

    def law(self, x_t: Tensor, index: Tensor, cond: Tensor | None = None) -> Gaussian:
        """The law of the next latent, π(x_s | x_t) = N(mean, std² I).

        Args:
            x_t: states, shape [N, *E].
            index: position of each along the chain, integers in [0, K-1], shape [N].
            cond: condition, shape [N, ...], or None.
        """
        return self.law_of_estimate(_real(x_t), index, self.estimate(x_t, index, cond))

    def law_of_estimate(self, x_t: Tensor, index: Tensor, x0_hat: Tensor) -> Gaussian:
        """The law of the next latent for a clean estimate that is known already: no network is asked.

        Args:
            x_t: states, shape [N, *E].
            index: position of each along the chain, shape [N].
            x0_hat: clean estimates, of x_t's shape.
        """
        i = index.cpu()
        mean, std = self.sampler.law(self.process, x_t, x0_hat, self.grid[i], self.grid[i + 1])
        std = torch.where(self._noisy[i], std.clamp(min=self.std_floor), 0.0)
        return Gaussian(mean, std.expand(len(x_t)).to(x_t))

    def log_prob(self, law: Gaussian, action: Tensor) -> Tensor:
        """Log π of actions, float32, shape [N]; 0 where the step is deterministic."""
        return law.log_prob(_real(action), self.reduction)

    def act(
        self,
        x_t: Tensor,
        index: Tensor,
        cond: Tensor | None = None,
        *,
        noise: NoiseFn,
        stochastic: Tensor | None = None,
    ) -> tuple[Tensor, Gaussian, Tensor]:
        """Draw actions, float32 [N, *E], and tell the law that they came from and the clean estimate behind it.

        Noise is not asked for where every step is deterministic.

        Args:
            x_t: states, shape [N, *E].
            index: position of each along the chain, shape [N].
            cond: condition, shape [N, ...], or None.
            noise: source of noise.
            stochastic: which states keep their noise, bool [N]; None: all that have any.
        """
        x0_hat = self.estimate(x_t, index, cond)
        law = self.law_of_estimate(_real(x_t), index, x0_hat)
        if stochastic is not None:
            law = Gaussian(law.mean, torch.where(stochastic, law.std, 0.0))
        return law.sample(noise), law, x0_hat

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Draw actions: write action, action_log_prob, x0_hat and trainable into the TensorDict [*b].

        Raises:
            ValueError: the times of the states are not those of the policy's grid.
        """
        x_t, index, cond = self._states(tensordict)
        action, law, x0_hat = self.act(x_t, index, cond, noise=Noise(self.generator))
        shape = (*tensordict.shape, *x_t.shape[1:])
        tensordict.set(keys.ACTION, action.view(shape))
        tensordict.set(keys.ACTION_LOG_PROB, self.log_prob(law, action).view(tensordict.shape))
        tensordict.set(keys.X0_HAT, x0_hat.view(shape))
        tensordict.set(keys.TRAINABLE, law.stochastic.view(*tensordict.shape, 1))
        return tensordict

    def get_dist(self, tensordict: TensorDictBase) -> "ActionDistribution":
        """π at the states of a TensorDict [*b], as TorchRL's losses ask for it."""
        return ActionDistribution(self, self.law(*self._states(tensordict)), tensordict.shape)

    def is_on_grid(self, index: Tensor, t: Tensor) -> bool:
        """Whether times are those of the grid at positions 0..K, both of one shape; float32 is near enough."""
        return torch.allclose(t.cpu().double(), self.grid[index.cpu()], rtol=1e-3, atol=1e-6)

    def _states(self, tensordict: TensorDictBase) -> tuple[Tensor, Tensor, Tensor | None]:
        """States, positions and conditions as one flat batch."""
        b = tensordict.ndim
        x_t, index = tensordict.get(keys.X_T), tensordict.get(keys.INDEX)
        t, cond = tensordict.get(keys.T, None), tensordict.get(keys.COND, None)
        if t is not None and not self.is_on_grid(index, t):
            raise InputError(
                f"the states are at other times than those of the policy's grid of {self.num_steps} levels: "
                "give both the same process, sampler and num_steps"
            )
        cond = None if cond is None else cond.reshape(-1, *cond.shape[b:])
        return x_t.reshape(-1, *x_t.shape[b:]), index.reshape(-1), cond


def _real(x: Tensor) -> Tensor:
    """In float32, or in float64 where it is that."""
    return x if x.dtype == torch.float64 else x.float()


def _all_rows(of: OfRows, x_t: Tensor) -> Tensor:
    return of(slice(None))


class ActionDistribution(Distribution):
    """N(mean, std² I) over the next latent, with the policy's own reduction: `DenoisingPolicy.get_dist`.

    Log-probabilities and entropies of deterministic steps are 0.

    Args:
        policy: whose law it is.
        law: at states [N].
        batch_shape: *b, of N elements.
    """

    arg_constraints: dict = {}
    has_rsample = True

    def __init__(self, policy: DenoisingPolicy, law: Gaussian, batch_shape: torch.Size) -> None:
        super().__init__(batch_shape, law.mean.shape[1:], validate_args=False)
        self.policy, self.law = policy, law

    @property
    def mean(self) -> Tensor:
        """Shape [*b, *E]."""
        return self.law.mean.view(self._extended_shape())

    @property
    def mode(self) -> Tensor:
        """The mean."""
        return self.mean

    @property
    def deterministic_sample(self) -> Tensor:
        """The mean, by TorchRL's name."""
        return self.mean

    def rsample(self, sample_shape: torch.Size | Sequence[int] = ()) -> Tensor:
        """Draws with a gradient, by torch's global generator, shape [*sample_shape, *b, *E]."""
        shape = torch.Size([*sample_shape, *self.law.mean.shape])
        z = torch.randn(shape, dtype=self.law.mean.dtype, device=self.law.mean.device)
        draws = self.law.mean + column(self.law.std, self.law.mean) * z
        return draws.view(self._extended_shape(torch.Size(sample_shape)))

    def log_prob(self, value: Tensor) -> Tensor:
        """Of actions [*b, *E], float32: shape [*b]."""
        return self.policy.log_prob(self.law, value.reshape(self.law.mean.shape)).view(self._batch_shape)

    def entropy(self) -> Tensor:
        """H = log std + ½ log 2πe a dim, summed or averaged: shape [*b]."""
        stochastic = self.law.stochastic
        H = torch.where(stochastic, self.law.std, 1.0).log() + 0.5 * math.log(2 * math.pi * math.e)
        H = H * self._event_shape.numel() if self.policy.reduction == "sum" else H
        return torch.where(stochastic, H, 0.0).view(self._batch_shape)
