"""TD(λ) whose λ is chosen along the training: by trials, and by the denoising error on held-out data alone."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from diffrl.diffusion.denoisers import Denoiser
from diffrl.errors import InputError
from diffrl.objectives.place import Place
from diffrl.objectives.registry import OBJECTIVES
from diffrl.objectives.value import ValueLoss
from diffrl.ranges import require_int, require_number
from diffrl.registry import options_of

__all__ = ["AdaptiveLoss", "TrialPlan", "td_adaptive_loss"]

CLEAR = 2.0  # standard errors by which a λ must beat Monte Carlo
MARGIN = 0.2  # and of what Monte Carlo gained in the trial


@dataclass(frozen=True)
class TrialPlan:
    """Which λ are tried, when, and for how long.

    A trial at gradient step j goes on from the present weights with each λ in turn, for a few steps on the same data
    and noise, compares the averaged denoisers on held-out data, and goes back to step j. So it costs steps of training
    that lead nowhere, `extra_steps` in all.

    Args:
        candidates: λ ∈ [0, 1]; the first is 1, Monte Carlo, with which training begins.
        trials: of the whole training, at shares of it that halve towards its beginning: the last at 1/2, before it 1/4.
        trial_steps: gradient steps of each candidate in a trial, as a share of the training, in (0, 0.1].
        heldout: chains on which the candidates are compared.

    Raises:
        ValueError: an argument outside its range, or the first candidate is not 1.
    """

    candidates: tuple[float, ...] = (1.0, 0.5, 0.0)
    trials: int = 4
    trial_steps: float = 0.025
    heldout: int = 256

    def __post_init__(self) -> None:
        if len(self.candidates) < 2 or self.candidates[0] != 1:
            raise InputError(
                f"candidates is {list(self.candidates)}: begin with 1, and give at least one further λ"
            )
        for lmbda in self.candidates:
            require_number("each of candidates", lmbda, 0, 1)
        require_int("trials", self.trials, 1, 10)
        require_number("trial_steps", self.trial_steps, 0, 0.1, "(]")
        require_int("heldout", self.heldout, 2, 10**6)

    def times(self, grad_steps: int) -> list[int]:
        """The gradient steps, counted from 0, before which there is a trial."""
        return sorted({round(grad_steps * 0.5**i) for i in range(1, self.trials + 1)})

    def length(self, grad_steps: int) -> int:
        """Gradient steps of one candidate in one trial."""
        return max(1, round(self.trial_steps * grad_steps))

    def extra_steps(self, grad_steps: int) -> int:
        """Gradient steps of all trials."""
        return len(self.times(grad_steps)) * len(self.candidates) * self.length(grad_steps)


class AdaptiveLoss(ValueLoss):
    """`ValueLoss` that says which λ a trainer is to try, and takes the one that a trial shows to help.

    Args:
        denoiser: D, kept by reference and trained in place.
        plan: the trials.
        options: those of `ValueLoss` but `lmbda` and `n_steps`.
    """

    def __init__(self, denoiser: Denoiser, plan: TrialPlan, **options: Any) -> None:
        super().__init__(denoiser, lmbda=plan.candidates[0], **options)
        self.plan = plan

    @property
    def moving(self) -> frozenset[str]:
        """λ, and what is annealed."""
        return super().moving | {"lmbda"}

    @property
    def lmbda(self) -> float:
        """λ at present."""
        return float(self.value_estimator.lmbda)

    @lmbda.setter
    def lmbda(self, value: float) -> None:
        self.value_estimator.lmbda = value

    def choose(self, before: Tensor, errors: Sequence[Tensor]) -> float:
        """Take the λ of the least held-out error, if it gained clearly more than Monte Carlo did; else Monte Carlo.

            d_n = e_n(λ) - e_n(1),    taken if mean(d) < -2 std(d)/√n  and  mean(d) < -(1/5) |mean(e(1) - e)|

        The denoising error on fresh data is the value error plus a constant, which d is free of, so no oracle is asked.
        The second condition: where Monte Carlo still gains much, what a few steps of another λ gain says little.

        Args:
            before: the error e on every held-out chain before the trial, [n].
            errors: that after the steps of each candidate, [n]; the same chains for all.
        """
        monte_carlo, best = errors[0], (0.0, self.plan.candidates[0])
        gained = float((monte_carlo - before).double().mean().abs())
        for lmbda, error in zip(self.plan.candidates[1:], errors[1:], strict=True):
            d = (error - monte_carlo).double()
            if d.mean() < -max(float(CLEAR * d.std() / len(d) ** 0.5), MARGIN * gained):
                best = min(best, (float(d.mean()), lmbda))
        self.lmbda = best[1]
        return best[1]


def _label(options: Mapping[str, Any]) -> str:
    return "TD(λ chosen by trials)"


@OBJECTIVES.register(
    "td_adaptive",
    label=_label,
    place=Place("denoiser", "chains", "any", "n_steps", "own", "forward", begins="end"),
)
@options_of(ValueLoss, drop=("lmbda", "n_steps", "lookahead", "gamma", "anneal", "bootstrap_share"))
def td_adaptive_loss(
    denoiser: Denoiser,
    *,
    candidates: tuple[float, ...] = TrialPlan.candidates,
    trials: int = TrialPlan.trials,
    trial_steps: float = TrialPlan.trial_steps,
    heldout: int = TrialPlan.heldout,
    **options: Any,
) -> AdaptiveLoss:
    """TD(λ) that begins as Monte Carlo and bootstraps where trials on held-out data show that it helps.

    It needs `diffrl.training.trainer.Trainer`, which makes the trials; of finite data a tenth of the training rows is
    held out for them. A search along one training goes back to Population Based Training of Neural Networks (Jaderberg
    et al., 2017), https://arxiv.org/abs/1711.09846; that the held-out denoising error decides is ours.

    One λ for all noise levels: the λ of a state is in the targets of all noisier ones, and all levels share a network,
    so that a trial cannot tell what the λ of each has done; every level would need trials of its own, which cost steps.
    `td_lambda_schedule` has a λ by noise level that is set beforehand.

    Args:
        denoiser: D, trained in place.
        candidates: λ ∈ [0, 1] to try, the first of them 1.
        trials: how many in the whole training.
        trial_steps: gradient steps of each candidate in a trial, as a share of the training.
        heldout: chains on which the candidates are compared.
        options: the other ones of `ValueLoss`.
    """
    return AdaptiveLoss(denoiser, TrialPlan(tuple(candidates), trials, trial_steps, heldout), **options)
