"""Consistency distillation: the states of a pair lie on a trajectory of a teacher."""

from typing import Any

from diffrl.diffusion.denoisers import Denoiser
from diffrl.diffusion.schedules.edm import EDM
from diffrl.objectives.consistency import ConsistencyLoss
from diffrl.objectives.consistency_pairs import ConsistencyPairs
from diffrl.objectives.place import Place
from diffrl.objectives.registry import OBJECTIVES
from diffrl.ranges import MAX_STEPS, require_int, require_number
from diffrl.registry import options_of

__all__ = ["DistillationPairs", "distillation_loss"]


class DistillationPairs(ConsistencyPairs):
    """Pairs on one grid for the whole run, the second state by one step of a teacher's ODE from the first.

        i ~ U{0, …, N-2},    x_t = x0 + σ_i ε,    x_t' = x_t + ∫ of the teacher's ODE, by one step of Heun

    Defaults are those of the released command for ImageNet-64. With transition "forward" the pairs are those of
    consistency training at that N.

    Source: Consistency Models (Song et al., 2023), Algorithm 2, https://arxiv.org/abs/2303.01469, and its released
    code.

    Args:
        process: EDM.
        num_scales: N ≥ 2; 18 was published for CIFAR-10.
        mu: decay of the target network, in [0, 1]; 0 was published for CIFAR-10.
        options: those of `ConsistencyPairs` but its growing grid.

    Raises:
        ValueError: an argument outside its range, or no teacher.
    """

    @options_of(ConsistencyPairs, drop=("s_0", "s_1", "mu_0"), transition="teacher")
    def __init__(self, process: EDM, *, num_scales: int = 40, mu: float = 0.95, **options: Any) -> None:
        self._num_scales = require_int("num_scales", num_scales, 2, MAX_STEPS)
        self.mu = require_number("mu", mu, 0, 1)
        super().__init__(process, **options)

    def set_progress(self, step: int, grad_steps: int) -> None:
        """Nothing changes along the training."""
        self.num_scales, self.target_decay = self._num_scales, self.mu


@OBJECTIVES.register(
    "cd",
    also=DistillationPairs,
    label="CD",
    place=Place("to_clean", "pairs", "shared", "one_step", "target", "teacher"),
)
@options_of(ConsistencyLoss, td_coef=0.0, consistency_coef=1.0, metric="l2")
def distillation_loss(denoiser: Denoiser, **options: Any) -> ConsistencyLoss:
    """Consistency distillation: two states on one trajectory of a teacher get the same prediction.

        L = w_CT(σ_t) d(f(x_t), f⁻(x_t')),    x_t' = x_t + (σ_t' - σ_t)(v + v̂)/2,    v = (x_t - D_T(x_t))/σ_t

    v̂ is the slope at what Euler's step reaches. Given x_t the target does not scatter; its error is that of the
    teacher and, for N levels, of Heun's steps. For a run that names a teacher: ``objective=cd
    objective.teacher=runs/... init=runs/... denoiser.prediction_type=consistency``. `td_coef` adds the term of TD-CT.
    The published distance is LPIPS (`metric`), a network; of those without one the paper tried l2 and l1.

    Source: Consistency Models (Song et al., 2023), Algorithm 2, https://arxiv.org/abs/2303.01469, and its released
    code.

    Args:
        denoiser: f, of prediction_type "consistency"; trained in place.
        options: those of `ConsistencyLoss`.
    """
    return ConsistencyLoss(denoiser, **options)
