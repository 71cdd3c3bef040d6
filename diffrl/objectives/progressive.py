"""Progressive distillation: a student takes two steps of its teacher in one, and becomes the next teacher."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import dispatch
from tensordict.utils import NestedKey
from torch import Tensor

from diffrl import keys
from diffrl.diffusion.denoisers import Denoiser
from diffrl.diffusion.posterior import marginal, posterior
from diffrl.diffusion.schedules.base import Schedule
from diffrl.errors import InputError
from diffrl.objectives.chain_value import value_module
from diffrl.objectives.denoiser_loss import DenoiserLoss, rows
from diffrl.objectives.one_step import cut_pairs
from diffrl.objectives.place import Place
from diffrl.objectives.registry import OBJECTIVES
from diffrl.objectives.weights import ChainTerms, weight_function
from diffrl.ranges import MAX_STEPS, require_int
from diffrl.shapes import event_mean, expand_like, require_data, require_finite

__all__ = ["HalvingSteps", "ProgressiveLoss"]


class HalvingSteps:
    """States at the levels of a student's grid, which has half as many of them from stage to stage.

        i ~ U{0, …, N-1},    t = t_i,    t'' = t_{i+1},    t' between them on the grid of 2N levels
        N = start/2, start/4, …, end;    a stage with N ≤ 2 takes twice the gradient steps of another, as published

    At the end of a stage the target network, which is the teacher, becomes a copy of the student. The levels are those
    that a sampler of N steps visits; every second one of the grid of 2N levels must be one of N, so that a student is
    asked in the next stage at levels that it knows: of `Flow`, and of `DDPM` where 2N divides its steps.

    Source: Progressive Distillation for Fast Sampling of Diffusion Models (Salimans & Ho, 2022), Algorithm 2,
    https://arxiv.org/abs/2202.00512.

    Args:
        process: noise schedule.
        start: steps of the first teacher, a power of 2 times `end`; the paper began with 1,024 and 8,192.
        end: steps of the last student, ≥ 1.

    Attributes:
        num_steps: N, the student's steps at present.
        target_decay: of the teacher after the present step: 1, and 0 at the end of a stage.

    Raises:
        ValueError: a number outside its range, start that is no such multiple, or a process whose grids do not halve.
    """

    def __init__(self, process: Schedule, *, start: int = 1024, end: int = 1) -> None:
        require_int("end", end, most=MAX_STEPS)
        require_int("start", start, 2 * end, MAX_STEPS)
        stages = round(math.log2(start / end))
        if end * 2**stages != start:
            raise InputError(
                f"start is {start}, but must be end={end} times a power of 2: halving leads to end then"
            )
        self.process, self.start, self.end = process, start, end
        self.grids = [start // 2 ** (k + 1) for k in range(stages)]
        for N in self.grids:
            if not torch.allclose(process.time_grid(2 * N)[::2], process.time_grid(N), rtol=1e-9, atol=1e-12):
                raise InputError(
                    f"every second of {2 * N} levels of {process} is none of {N}: progressive distillation needs that, "
                    "as process=flow has it, and process=ddpm where the levels divide its steps"
                )
        self.set_progress(0, stages)

    def set_progress(self, step: int, grad_steps: int) -> None:
        """Stand at gradient step `step`, counted from 0, of `grad_steps`."""
        lengths = [2 if N <= 2 else 1 for N in self.grids]
        ends = [round(sum(lengths[: k + 1]) / sum(lengths) * grad_steps) for k in range(len(lengths) - 1)]
        self.stage = sum(step >= end for end in ends)
        self.num_steps = self.grids[self.stage]
        self.target_decay = 0.0 if step + 1 in ends else 1.0

    def __call__(self, x0: Tensor, *, cond: Tensor | None = None, generator: torch.Generator) -> TensorDict:
        """A state of each datum x0 [B, *E]: pairs [B, 1] with t' under ``r``; drawn in the order i, noise."""
        require_data(x0, cond)
        require_finite("x0", x0)
        N, B = self.num_steps, len(x0)
        i = torch.randint(N, (B,), generator=generator, device=x0.device)
        noise = torch.randn(x0.shape, generator=generator, dtype=x0.dtype, device=x0.device)
        levels = (self.process.time(j, n) for j, n in ((i, N), (2 * i + 1, 2 * N), (i + 1, N)))
        t, middle, end = (level.to(x0.dtype) for level in levels)

        def state(time: Tensor) -> dict[str, Tensor]:
            one = torch.ones(B, 1, 1, dtype=x0.dtype, device=x0.device)
            x = marginal(self.process, x0, time, noise).unsqueeze(1)
            return {keys.X_T: x, keys.T: time.view(B, 1, 1), keys.A: one, keys.KAPPA: 0 * one}

        left = {**state(t), keys.R: middle.view(B, 1, 1)}
        valid = torch.ones(B, 1, 1, dtype=torch.bool, device=x0.device)
        return cut_pairs(x0.unsqueeze(1), left, state(end), valid=valid, cond=cond)


@OBJECTIVES.register(
    "progressive",
    also=HalvingSteps,
    label="Progressive distillation",
    place=Place(
        "to_next",
        "pairs",
        "shared",
        "n_steps",
        "teacher",
        "teacher",
        note="the teacher is the student of the stage before",
    ),
)
class ProgressiveLoss(DenoiserLoss):
    """One step of DDIM by the student for two of its teacher; to be fed with `HalvingSteps`.

        x' = κ₁ x_t + A₁ D⁻(x_t, t),    x'' = κ₂ x' + A₂ D⁻(x', t')    two steps of the teacher: t → t' → t''
        y = (x'' - κ x_t)/A,    κ = σ_t''/σ_t,    A = α_t'' - α_t κ    what leads there in one step
        L = w ‖y - D(x_t, t)‖²/dim(E)

    Given x_t the target does not scatter. The teacher D⁻ is the target network: at first a copy of what the training
    starts from, a trained denoiser (``objective=progressive init=runs/... process=flow``), and then of the last stage's
    student. For N steps ``sampler=ddim`` with as many levels. With D⁻ = x0, y is x0 and this is Monte Carlo with that
    weight.

    Source: Progressive Distillation for Fast Sampling of Diffusion Models (Salimans & Ho, 2022), Algorithm 2 and
    section 4, https://arxiv.org/abs/2202.00512.

    Args:
        denoiser: D, trained in place.
        weight: w on ‖y - D‖², a name in `diffrl.objectives.weights.WEIGHTS`: "trunc_snr" and "v" are the paper's.
        weight_options: numbers of that weight.

    Raises:
        ValueError: an unknown weight.
    """

    fed_with = "diffrl.objectives.progressive.HalvingSteps"
    out_keys = ["loss_value", "td_error"]
    bootstrap = "target"

    def __init__(
        self,
        denoiser: Denoiser,
        *,
        weight: str = "trunc_snr",
        weight_options: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__(value_module(denoiser), target=True)
        self._weight: Callable[..., Tensor] = weight_function(weight, weight_options)

    @property
    def in_keys(self) -> list[NestedKey]:
        """Entries of the states that the loss reads; cond is read where present."""
        return [keys.X_T, keys.T, keys.R, keys.X0, keys.A, (keys.NEXT, keys.T), (keys.NEXT, keys.A)]

    @dispatch(auto_batch_size=False)
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """The loss of a batch of states [*b, 1].

        Args:
            tensordict: what `HalvingSteps` gives.

        Returns:
            TensorDict with the scalars ``loss_value`` and ``td_error``, the root mean square of y - D(x_t).

        Raises:
            KeyError: an entry is missing.
            ValueError: the batch is empty; a network that takes labels, without any.
        """
        with self._telling_what_is_missing(tensordict):
            states = rows(tensordict)
            x, t, middle, x0, _, end, _ = (states[key] for key in self.in_keys)
        cond = states.get(keys.COND, None)
        self._first_look(x0, cond)
        y = self._two_steps(x, t, middle, end, cond)
        δ = y - self.value_network.module.denoise(x, t, cond)
        self.network_evaluations += 3 * t.numel()
        loss = self._weight(ChainTerms(states, self.denoiser)) * event_mean(δ.square(), 2).unsqueeze(-1)
        return TensorDict({"loss_value": loss.mean(), "td_error": δ.detach().square().mean().sqrt()})

    @torch.no_grad()
    def _two_steps(self, x_t: Tensor, t: Tensor, middle: Tensor, end: Tensor, cond: Tensor | None) -> Tensor:
        """What two steps of the teacher make of y."""
        x, denoise = x_t, self.bootstrap_network.module.denoise
        for now, then in ((t, middle), (middle, end)):
            A, kappa = self._coefficients(now, then, x)
            x = kappa * x + A * denoise(x, now, cond)
        A, kappa = self._coefficients(t, end, x)
        y: Tensor = (x - kappa * x_t) / A
        return y

    def _coefficients(self, t: Tensor, s: Tensor, x: Tensor) -> tuple[Any, Any]:
        A, kappa, _ = posterior(self.denoiser.process, t, s, 0.0)
        return expand_like(A.to(x), x), expand_like(kappa.to(x), x)
