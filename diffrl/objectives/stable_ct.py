"""Stable Consistency Tuning (SCT): consistency training by steps along the velocity of a reference batch."""

from typing import Any

from diffrl.diffusion.denoisers import Denoiser
from diffrl.diffusion.schedules.edm import EDM
from diffrl.objectives.ect import ECTLoss
from diffrl.objectives.ect_pairs import ECTPairs
from diffrl.objectives.place import Place
from diffrl.objectives.registry import OBJECTIVES
from diffrl.registry import options_of

__all__ = ["StablePairs", "stable_ct_loss"]


class StablePairs(ECTPairs):
    """Pairs of ECT, the second state by one step along the velocity of a reference batch.

        x_r = x_t + (r - t)(x_t - S(x_t))/t,    S(x_t) = Σ_j softmax_j(-‖x_t - x_j‖²/(2t²)) x_j

    With transition "forward" they are those of ECT.

    Args:
        process: EDM.
        options: those of `ECTPairs`.

    Raises:
        ValueError: an argument outside its range.
    """

    @options_of(ECTPairs, transition="reference")
    def __init__(self, process: EDM, **options: Any) -> None:
        super().__init__(process, **options)


@OBJECTIVES.register(
    "stable_ct",
    also=StablePairs,
    label="SCT",
    place=Place("to_clean", "pairs", "shared", "one_step", "own", "reference", begins="end"),
)
@options_of(ECTLoss)
def stable_ct_loss(denoiser: Denoiser, **options: Any) -> ECTLoss:
    """Consistency tuning whose next state has less variance: a step along the velocity of a reference batch.

        L = w(t, r) (√(‖D(x_t) - y‖² + c²) - c),    y = sg D(x_r),    y = S(x_t) where r = 0

    At r = 0 it regresses on the Stable Target Field in place of the datum. S is unbiased for E[x0 | x_t] with any
    number of rows, so given x_t the step has the mean of that of ECT, and less variance; with one row it is ECT. No
    further network evaluation is needed. The reference batch is the batch itself, and with ``objective.reference=2048``
    further data.

    Abstract and released page of the paper were at hand, its text was not: the transition is that of the abstract
    ("variance-reduced learning using the score identity"); all other defaults are those of ECT, on which it builds. Its
    smoother schedule of r, its EMA teacher and its sampler, which skips edges, are not here.

    Source: Stable Consistency Tuning: Understanding and Improving Consistency Models (Wang et al., 2024),
    https://arxiv.org/abs/2410.18958, which says that consistency training is temporal-difference learning.

    Args:
        denoiser: D, on an EDM process, in any form; trained in place.
        options: those of `ECTLoss`.
    """
    return ECTLoss(denoiser, **options)
