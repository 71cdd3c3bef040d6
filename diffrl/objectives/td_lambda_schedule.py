"""TD(λ) whose λ depends on the noise level of the state."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from diffrl.diffusion.denoisers import Denoiser
from diffrl.objectives.annealing import Ranges, written
from diffrl.objectives.lambda_schedule import LambdaSchedule
from diffrl.objectives.place import Place
from diffrl.objectives.registry import OBJECTIVES
from diffrl.objectives.value import ValueLoss
from diffrl.registry import options_of

__all__ = ["td_lambda_schedule_loss"]


def _label(options: Mapping[str, Any]) -> str:
    options = {**options, **(options.get("anneal") or {})}
    return f"TD(λ={written(options['low_noise'])}…{written(options['high_noise'])})"


class _AnnealedEnds(ValueLoss):
    """Its λ are those of a `LambdaSchedule`, whose ends may change along the training."""

    annealable: ClassVar[Ranges] = {
        **{"low_noise": (0, 1), "high_noise": (0, 1)},
        **{k: v for k, v in ValueLoss.annealable.items() if k not in ("lmbda", "n_steps")},
    }

    _schedule: LambdaSchedule

    def make_value_estimator(self, value_type: Any = None, **hyperparams: Any) -> ValueLoss:  # noqa: ANN401
        if isinstance(schedule := hyperparams.get("lmbda"), LambdaSchedule):
            self._schedule = schedule
        return super().make_value_estimator(value_type, **hyperparams)

    def _set_option(self, name: str, value: float) -> None:
        if name not in ("low_noise", "high_noise"):
            return super()._set_option(name, value)
        self._schedule = replace(self._schedule, **{name: value})
        self.value_estimator.lmbda = self._schedule.of_states(self.denoiser.process)


@OBJECTIVES.register(
    "td_lambda_schedule", label=_label, place=Place("denoiser", "chains", "any", "n_steps", "own", "forward")
)
@options_of(ValueLoss, drop=("lmbda", "n_steps", "lookahead"))
def td_lambda_schedule_loss(
    denoiser: Denoiser,
    *,
    low_noise: float = 0.0,
    high_noise: float = 1.0,
    nsr_low: float = LambdaSchedule.nsr_low,
    nsr_high: float = LambdaSchedule.nsr_high,
    **options: Any,
) -> ValueLoss:
    """TD(λ) with one λ for each noise level: linear in ln(σ/α) between two ends, see `LambdaSchedule`.

    Args:
        denoiser: D, trained in place.
        low_noise: λ at and below nsr_low.
        high_noise: λ at and above nsr_high.
        nsr_low: ratio σ/α of noise to signal.
        nsr_high: another, higher one.
        options: the other ones of `ValueLoss`; what can be annealed of λ are its ends, low_noise and high_noise.
    """
    return _AnnealedEnds(denoiser, lmbda=LambdaSchedule(low_noise, high_noise, nsr_low, nsr_high), **options)
