"""The step of the trainer that the benchmarks time."""

from collections.abc import Callable
from functools import partial

from diffrl.data.dataset import Data
from diffrl.objectives.scheme import Objective
from diffrl.training.distributed import ALONE, Ranks
from diffrl.training.optim import Optim
from diffrl.training.trainer import Average, Length, Target, Trainer

__all__ = ["CLIP", "EMA_HALFLIFE", "LR", "trainer_step"]

LR, CLIP, EMA_HALFLIFE = 1e-4, 1.0, 2000.0


def trainer_step(
    objective: Objective, data: Data, batch_size: int, ranks: Ranks = ALONE
) -> Callable[[], object]:
    """A step of a training without a folder or an end, from a batch of data to the average of the weights."""
    trainer = Trainer(
        objective,
        data,
        seed=0,
        folder=None,
        length=Length(grad_steps=10**6, batch_size=batch_size),
        optim=Optim(lr=LR, warmup_steps=0, clip_norm=CLIP),
        average=Average(EMA_HALFLIFE, None),
        target=Target(),
        ranks=ranks,
    )
    return partial(next, trainer.steps())
