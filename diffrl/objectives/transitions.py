"""Transition sources: what leads from the noisier state of a pair to the less noisy one."""

from typing import Literal

import torch
from tensordict import TensorDict
from torch import Generator, Tensor, nn

from diffrl import keys
from diffrl.data.dataset import Data
from diffrl.diffusion.denoisers import DenoiserFn
from diffrl.diffusion.schedules.edm import EDM
from diffrl.errors import InputError
from diffrl.objectives.one_step import cut_pairs
from diffrl.objectives.posteriors import X0Law
from diffrl.objectives.stand_ins import MAX_ROWS, reference_of_batch
from diffrl.objectives.teachers import teacher_of
from diffrl.ranges import require_int
from diffrl.shapes import expand_like

__all__ = ["Solver", "Source", "Transition", "ode_step"]

Source = Literal["forward", "teacher", "reference"]
Solver = Literal["heun", "euler"]


class Transition:
    """Where the less noisy state x_s of a pair comes from, given the noisier one x_t, in `EDM`.

        x_s = x_t + (s - t) v,    v = (x_t - D)/t

    | source | D | x_s |
    |---|---|---|
    | "forward" | x0, the pair's own datum | x0 + s ε: both states share datum and noise (consistency training) |
    | "reference" | S(x_t), the Stable Target Field of a reference batch | a step along the batch's velocity |
    | "teacher" | D_T(x_t) of a teacher | a step of the teacher's ODE, by Euler or Heun (consistency distillation) |

    Given x_t, the three steps have the same mean, as far as S is unbiased and D_T exact; the first scatters most, the
    last not at all. Heun's step takes the mean of the slopes at x_t and at what Euler's reaches; onto clean data both
    are x_s = D. D takes the place of the datum in the pair, so that where s = 0 it is the target.

    Two other sources are no step of a consistency loss. A *redrawn* datum (`chain.x0=redrawn`) has the law of
    "forward". A step of the *model's own* (`double_sampling`, `source=rollouts`) moves along the line from x_t to a
    prediction that, of a consistency function, is no E[x0 | x_t]: every function that is constant along its own lines
    would be a fixed point.

    Sources: Consistency Models (Song et al., 2023), Algorithms 2 and 3, https://arxiv.org/abs/2303.01469; "reference":
    Stable Consistency Tuning (Wang et al., 2024), https://arxiv.org/abs/2410.18958.

    Args:
        process: EDM.
        transition: "forward", "teacher" or "reference", the source.
        teacher: of "teacher": a denoiser, or "exact" for that of the data; see `diffrl.objectives.teachers.teacher_of`.
        solver: of "teacher": "heun", two evaluations, or "euler", one.
        reference: of "reference": rows of the batch in all, those of the data drawn among them, at most a million; 0:
            these alone.
        data: where further rows of a reference batch come from, and what "exact" is about.
        denoiser: what is trained: its device and its null label.

    Raises:
        ValueError: an argument outside its range, or one that this source does not use; data or teacher missing.
    """

    def __init__(
        self,
        process: EDM,
        *,
        transition: Source = "forward",
        teacher: str | nn.Module | None = None,
        solver: Solver = "heun",
        reference: int = 0,
        data: Data | None = None,
        denoiser: nn.Module | None = None,
    ) -> None:
        if transition not in ("forward", "teacher", "reference"):
            raise InputError(f"transition is {transition!r}: give 'forward', 'teacher' or 'reference'")
        if solver not in ("heun", "euler"):
            raise InputError(f"solver is {solver!r}: give 'heun' or 'euler'")
        require_int("reference", reference, 0, MAX_ROWS)
        if teacher is not None and transition != "teacher":
            raise InputError(
                f"teacher is given, but transition={transition} asks none: set transition=teacher"
            )
        if reference and transition != "reference":
            raise InputError(
                f"reference is {reference}, but transition={transition} uses no reference batch: set "
                "transition=reference"
            )
        if reference and data is None:
            raise InputError(f"reference is {reference}: the further rows need the data, give data=...")
        self.process, self.source, self.solver, self.reference = process, transition, solver, reference
        self.data = data
        self.num_classes = int(getattr(getattr(denoiser, "network", None), "num_classes", 0))
        device = "cpu" if denoiser is None else next(denoiser.parameters()).device
        self.teacher = teacher_of(teacher, process, data, device) if transition == "teacher" else None

    def __call__(self, pairs: TensorDict, *, generator: Generator, law: X0Law | None = None) -> TensorDict:
        """Pairs [B, 1] that share their noise, as this source would have them; "forward" leaves them alone.

        With a teacher each has its evaluations under ``evaluations``. "reference" takes S from `law` where it is given.
        """
        if self.source == "forward":
            return pairs
        x_t, t, x0 = (pairs[key].squeeze(1) for key in (keys.X_T, keys.T, keys.X0))
        s, cond = pairs[keys.NEXT, keys.T].view(-1), pairs.get(keys.COND, None)
        cond, t = None if cond is None else cond.squeeze(1), t.view(-1)
        if self.teacher is None:
            law = law or reference_of_batch(
                self.process,
                x0,
                cond,
                self.reference,
                data=self.data,
                num_classes=self.num_classes,
                generator=generator,
            )
            D, x_s = ode_step(law.mean, x_t, t, s, cond, "euler")
        else:
            D, x_s = ode_step(self.teacher, x_t, t, s, cond, self.solver)
        kept = (keys.T, keys.A, keys.KAPPA, keys.INDEX)
        left = {key: pairs[key] for key in (keys.X_T, *kept) if key in pairs.keys()}
        reached = {key: pairs[keys.NEXT, key] for key in kept if key in pairs[keys.NEXT].keys()}
        reached[keys.X_T] = x_s.unsqueeze(1)
        moved = cut_pairs(D.unsqueeze(1), left, reached, valid=pairs[keys.VALID], cond=cond)
        if self.teacher is not None:
            evaluations = 1 + (s > 0) if self.solver == "heun" else torch.ones_like(s)
            moved[keys.EVALUATIONS] = evaluations.to(t).view(-1, 1, 1)
        return moved


@torch.no_grad()
def ode_step(
    D: DenoiserFn, x_t: Tensor, t: Tensor, s: Tensor, cond: Tensor | None, solver: Solver = "heun"
) -> tuple[Tensor, Tensor]:
    """One step of the probability-flow ODE of a denoiser in EDM, without gradient: D(x_t, t), and the state at s.

        v = (x_t - D(x_t, t))/t,    x̂ = x_t + (s - t) v,    v̂ = (x̂ - D(x̂, s))/s
        Euler: x_s = x̂,    Heun: x_s = x_t + (s - t) (v + v̂)/2;    at s = 0 both are D(x_t, t)

    Source: Elucidating the Design Space of Diffusion-Based Generative Models (Karras et al., 2022), Algorithm 1,
    https://arxiv.org/abs/2206.00364.

    Args:
        D: denoiser of one time.
        x_t: states, shape [N, *E].
        t: their times, > 0, shape [N].
        s: times to reach, in [0, t], shape [N].
        cond: condition of each, or None.
        solver: "heun" or "euler".
    """
    D_x = D(x_t, t, cond)
    kappa = expand_like(s / t, x_t)
    x_s = kappa * x_t + (1 - kappa) * D_x  # Euler, written so that s = 0 gives D itself
    noisy = (s > 0).nonzero().squeeze(1)
    if solver == "euler" or len(noisy) == 0:
        return D_x, x_s
    x, s_x, dt = x_s[noisy], s[noisy], (s - t)[noisy]
    D_s = D(x, s_x, None if cond is None else cond[noisy])
    v = (x_t - D_x)[noisy] / expand_like(t[noisy], x)
    v_s = (x - D_s) / expand_like(s_x, x)
    x_s[noisy] = x_t[noisy] + expand_like(dt, x) * (v + v_s) / 2
    return D_x, x_s
