"""What a gradient step costs in forward passes: timed in pairs, so that the noise of a shared machine cancels."""

import time
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch

from diffrl.training.trainer import Trainer

__all__ = ["forward_equivalents", "step_over_forward"]

PLACES = 5  # of the training whose steps are timed: schemes change along it
ROUNDS = 7
REPEATS = 4  # forward passes that make one time
LONGEST, SHARE = (
    1.0,
    0.1,
)  # seconds, and share of those of the training, after which no further round is begun


def forward_equivalents(trainer: Trainer) -> float:
    """Time of a gradient step over that of one forward pass of the network on as many states.

    The step is all of it: states drawn, loss, gradient, optimiser, averages, target network. The pass is plain, without
    gradient, on the states that such a step trains on. So unlike a count of evaluations it counts gradients, Jacobian-
    vector products and teachers at what they cost. Steps are those of `PLACES` places of the training, since schemes
    change along it; trials of `td_adaptive` are not among them. Afterwards the trainer is as it was.

    Args:
        trainer: after its training, or a part of it: a tenth of that time is spent at most, one round apart.

    Raises:
        NonFiniteLoss: of a step that gave it.
    """
    total, spent = trainer.length.total, trainer.loss.network_evaluations
    places = sorted({(2 * k + 1) * total // (2 * PLACES) for k in range(PLACES)})
    back = trainer.remember()
    trainer.denoiser.train()

    def forward(place: int) -> Callable[[], object]:
        trainer.objective.set_progress(place, total)
        x0, labels, generator = trainer.batch(place)
        x, t, cond = trainer.loss.left(trainer.objective.draw(x0, cond=labels, generator=generator))

        def run() -> object:
            with torch.no_grad(), trainer.precision():
                return trainer.denoiser(x, t, cond)

        return run

    try:
        return step_over_forward(
            trainer.train_on,
            [(place, forward(place)) for place in places],
            clock=_clock(trainer.device),
            longest=min(LONGEST, SHARE * trainer.seconds),
            after=back,
        )
    finally:
        back()
        trainer.objective.set_progress(max(trainer.step - 1, 0), total)
        trainer.loss.network_evaluations = spent


def step_over_forward(
    step: Callable[[int], object],
    places: Sequence[tuple[int, Callable[[], object]]],
    *,
    clock: Callable[[], float],
    longest: float = LONGEST,
    after: Callable[[], None] = lambda: None,
) -> float:
    """Mean over places of the median over rounds of (time of a step)/(time of a forward pass).

    In each round each place has one of both, one right after the other: what disturbs a round disturbs both alike.

    Args:
        step: takes a place.
        places: each with its forward pass.
        clock: seconds.
        longest: seconds on the wall after which no further round is begun.
        after: called after each round, outside of all times.
    """

    def timed(call: Callable[[], object], repeats: int) -> float:
        begun = clock()
        for _ in range(repeats):
            call()
        return (clock() - begun) / repeats

    step(places[0][0]), places[0][1]()  # the first of a kind is slow
    after()
    ratios: list[list[float]] = []
    begun = time.perf_counter()
    while len(ratios) < ROUNDS and not (ratios and time.perf_counter() - begun > longest):
        ratios.append([timed(partial(step, place), 1) / timed(pass_, REPEATS) for place, pass_ in places])
        after()
    return float(np.median(ratios, axis=0).mean())


def _clock(device: torch.device) -> Callable[[], float]:
    """Processor time, which other processes do not use; of another device the time until it has done all."""
    if device.type == "cpu":
        return time.process_time

    def clock() -> float:
        torch.accelerator.synchronize(device)
        return time.perf_counter()

    return clock
