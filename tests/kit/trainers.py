"""Small trainers of a 2-D set, built in Python, and all that their training goes on from."""

import itertools
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor

from diffrl import EDM, Denoiser
from diffrl.data.dataset import Data
from diffrl.data.synthetic import rings
from diffrl.diffusion.chains import Chain
from diffrl.diffusion.networks.mlp import MLP
from diffrl.diffusion.trajectories import ChainSampler
from diffrl.objectives import ValueLoss
from diffrl.objectives.scheme import Objective
from diffrl.training.ema import Average
from diffrl.training.optim import Optim
from diffrl.training.trainer import Length, Target, Trainer


def make(
    folder: Path | None = None,
    loss: dict[str, Any] | None = None,
    *,
    grad_steps: int = 12,
    seed: int = 0,
    hidden: int = 16,
    dtype: torch.dtype = torch.float32,
    data: Data | None = None,
    num_classes: int = 0,
    label_dropout: float = 0.1,
    optim: Optim | None = None,
    average: Average | None = None,
    target: Target | None = None,
    **more: Any,
) -> Trainer:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        network = MLP((2,), num_classes, hidden=hidden, depth=1)
    denoiser = Denoiser(network, EDM()).to(dtype)
    draw = ChainSampler(Chain(denoiser.process, num_steps=5, coupling="markov"), jitter=False)
    length = Length(grad_steps, batch_size=8, checkpoint_every=5, label_dropout=label_dropout)
    return Trainer(
        Objective("td", ValueLoss(denoiser, **(loss or {})), draw),
        data or rings(test_size=16),
        seed=seed,
        folder=folder,
        length=length,
        optim=optim or Optim(warmup_steps=3),
        average=average or Average(halflife=40),
        target=target or Target(),
        **more,
    )


class Unfused:
    """Draws what it is given to draw by, under a name that nothing is fused with."""

    def __init__(self, draw: ChainSampler) -> None:
        self._draw = draw

    def __call__(self, x0: Tensor, **options: Any) -> TensorDict:
        return self._draw(x0, **options)


def unfused(trainer: Trainer) -> Trainer:
    """It, with steps that are not fused, to compare bits with one that cannot have such steps."""
    trainer.objective = Objective(trainer.name, trainer.loss, Unfused(trainer.objective.draw))
    return trainer


def take(trainer: Trainer, steps: int) -> list[dict[str, float]]:
    return list(itertools.islice(trainer.steps(), steps))


def state(trainer: Trainer) -> dict[str, Any]:
    """Everything that training goes on from, flat."""
    found = {f"model.{k}": v for k, v in trainer.denoiser.state_dict().items()}
    for name, average in trainer.averages.items():
        found |= {f"{name}.{k}": v for k, v in average.module.state_dict().items()}
    found |= {k: v for k, v in trainer.loss.state_dict().items() if k.startswith("target_")}
    for i, moments in trainer.optimiser.state_dict()["state"].items():
        found |= {f"optimiser.{i}.{k}": v for k, v in moments.items()}
    found["target"] = None if trainer.target is None else trainer.target.state_dict()
    scale = trainer.optimiser.loss_scale
    found["loss_scale"] = None if scale is None else scale.state_dict()
    found["counts"] = (trainer.step, trainer.ema.samples, trainer.loss.network_evaluations)
    return {k: v.clone() if isinstance(v, Tensor) else v for k, v in found.items()}


def differing(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    assert a.keys() == b.keys()
    same = {k: torch.equal(a[k], b[k]) if isinstance(a[k], Tensor) else a[k] == b[k] for k in a}
    return [k for k, equal in same.items() if not equal]
