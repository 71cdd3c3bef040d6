"""Scheduled sampling: denoising on states that the model made itself, from noisier ones, with the datum as target."""

import torch
from tensordict import TensorDict
from torch import Generator, Tensor

from diffrl import keys
from diffrl.diffusion.denoisers import Denoiser
from diffrl.diffusion.posterior import marginal
from diffrl.diffusion.schedules.base import Schedule
from diffrl.errors import InputError
from diffrl.objectives.monte_carlo import monte_carlo_loss
from diffrl.objectives.one_step import one_step_chains
from diffrl.objectives.place import Place
from diffrl.objectives.registry import OBJECTIVES
from diffrl.ranges import MAX_STEPS, require_int, require_number
from diffrl.shapes import require_data, require_finite

__all__ = ["RollbackStates", "roll_back"]

Probs = tuple[float, ...]


def roll_back(
    denoiser: Denoiser,
    process: Schedule,
    x: Tensor,
    index: Tensor,
    steps: Tensor,
    num_steps: int,
    *,
    cond: Tensor | None = None,
    generator: Generator | None = None,
) -> Tensor:
    """Go down the grid by the model, with fresh noise at every level, without gradient.

        x_{i+1} = α_{i+1} D(x_i) + σ_{i+1} ε

    Args:
        denoiser: D; no dropout is drawn.
        process: noise schedule.
        x: states, shape [N, *E].
        index: i of each on the grid of num_steps levels, float64, shape [N].
        steps: how many levels each goes down, integers ≥ 0, shape [N].
        num_steps: levels of the grid.
        cond: shape [N, ...].
        generator: source of ε.

    Returns:
        The states at index + steps, shape [N, *E].
    """
    mode, x = denoiser.training, x.clone()
    denoiser.eval()
    try:
        with torch.no_grad():
            for j in range(int(steps.max())):
                on = steps > j
                t, s = (process.time(index[on] + k, num_steps).to(x.dtype) for k in (j, j + 1))
                D_x = denoiser(x[on], t, None if cond is None else cond[on])
                noise = torch.randn(D_x.shape, generator=generator, dtype=x.dtype, device=x.device)
                x[on] = marginal(process, D_x, s, noise)
    finally:
        denoiser.train(mode)
    return x


class RollbackStates:
    """One state of each datum at a uniform index i, of which a growing share is rolled back from i - m by the model.

        m = 0:  x_i = α_i x0 + σ_i ε
        m > 0:  x_{i-m} = α_{i-m} x0 + σ_{i-m} ε, then m times x_{j+1} = α_{j+1} D(x_j) + σ_{j+1} ε

    One m is drawn for a batch, with probabilities that go linearly from `probs_start` to `probs_end` along the
    training; the rest is m = 0. Where fewer than m levels are noisier, m is as many (published: for the whole batch).

    The law of the state is the model's for m > 0, and with it E[x0 | x_i], the fixed point, is another: of data N(0, c)
    and m = 1 the exact denoiser, of variance V = Var(D(x_{i-1})), leads to α_i V/(α_i² V + σ_i²) x_i, with V in place
    of c. A model that is exact does not stay so; the method trades this bias for states as sampling meets them.

    Sources: Markup-to-Image Diffusion Models with Scheduled Sampling (Deng et al., 2023), section 3,
    https://arxiv.org/abs/2210.05147, and its released code.

    Args:
        process: noise schedule.
        denoiser: D, the one in training.
        num_steps: N of the grid: a step of the model is one level of it.
        probs_start: probabilities of m = 1, 2, … at the first step.
        probs_end: those at the last.

    Raises:
        ValueError: probabilities that are none, that sum to more than 1, or different numbers of them; num_steps < 2.
    """

    def __init__(
        self,
        process: Schedule,
        denoiser: Denoiser,
        num_steps: int = 1000,
        probs_start: Probs = (0.0, 0.0),
        probs_end: Probs = (0.2, 0.3),
    ) -> None:
        require_int("num_steps", num_steps, 2, MAX_STEPS)
        for name, probs in (("probs_start", probs_start), ("probs_end", probs_end)):
            for p in probs:
                require_number(f"a number of {name}", p, 0, 1)
            if len(probs) != len(probs_start) or sum(probs) > 1 + 1e-9:
                raise InputError(
                    f"{name} is {list(probs)}: give as many numbers at start and end, of sum 1 at most"
                )
        self.process, self.denoiser, self.num_steps = process, denoiser, num_steps
        self.probs_start, self.probs_end = tuple(probs_start), tuple(probs_end)
        self.set_progress(0, 1)

    def set_progress(self, step: int, grad_steps: int) -> None:
        """Stand at gradient step `step`, counted from 0, of `grad_steps`."""
        u = step / grad_steps
        self.probs = [(1 - u) * a + u * b for a, b in zip(self.probs_start, self.probs_end, strict=True)]

    def __call__(self, x0: Tensor, *, cond: Tensor | None, generator: Generator) -> TensorDict:
        """States of batch size [B, 1], with A = 1 and κ = 0: every target is the datum. Drawn in the order m, i, ε."""
        require_data(x0, cond)
        require_finite("x0", x0)
        m, N, process = self._draw_m(generator), self.num_steps, self.process
        u = torch.rand(len(x0), generator=generator, dtype=torch.float64, device=x0.device)
        i = u * (N - 1) if process.continuous else (u * N).floor()
        steps = i.floor().clamp(max=m).long()
        noise = torch.randn(x0.shape, generator=generator, dtype=x0.dtype, device=x0.device)
        x = marginal(process, x0, process.time(i - steps, N).to(x0.dtype), noise)
        x = roll_back(self.denoiser, process, x, i - steps, steps, N, cond=cond, generator=generator)
        return _single_states(process, x, x0, process.time(i, N).to(x0.dtype), steps, cond)

    def _draw_m(self, generator: Generator) -> int:
        p = torch.tensor([max(1 - sum(self.probs), 0.0), *self.probs], device=generator.device)
        return int(torch.multinomial(p, 1, generator=generator))


def _single_states(
    process: Schedule, x: Tensor, x0: Tensor, t: Tensor, steps: Tensor, cond: Tensor | None
) -> TensorDict:
    """Chains of one step, from each state to its datum."""
    t, datum = t.view(-1, 1, 1), x0.unsqueeze(1)
    one, zero, clean = torch.ones_like(t), torch.zeros_like(t), torch.full_like(t, process.t_clean)
    left = {keys.X_T: x.unsqueeze(1), keys.T: t, keys.A: one, keys.KAPPA: zero}
    left[keys.EVALUATIONS] = steps.view(-1, 1, 1)
    reached = {keys.X_T: datum, keys.T: clean, keys.A: zero, keys.KAPPA: zero}
    return one_step_chains(datum, left, reached, reward=datum, terminated=True, cond=cond)


# The published target is the noise that the state amounts to, (x_i - α_i x0)/σ_i: of D it is the datum
OBJECTIVES.register(
    "scheduled_sampling",
    also=RollbackStates,
    label="Scheduled sampling",
    place=Place(
        "denoiser",
        "states",
        "none",
        "end",
        "nothing",
        "own",
        note="the one state is what steps of the model lead to, in a growing share",
    ),
)(monte_carlo_loss)
