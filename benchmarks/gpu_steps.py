"""Training steps for the checks on a GPU: of the recipe for CIFAR-10 with other words, and one in plain PyTorch."""

import copy
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import by_hand
import torch
from hydra import compose, initialize_config_module
from torch import Generator, Tensor, nn

from diffrl import keys
from diffrl.configs.cli import settings
from diffrl.configs.groups import register
from diffrl.data.dataset import Data
from diffrl.experiments.train import TrainingJob
from diffrl.training.trainer import Trainer

__all__ = ["Bench", "Variant", "plain_loss", "require_agreement"]

Step = Callable[[], object]
SMALL = (
    *("network.channels=8", "network.blocks=1", "network.head_channels=16", "network.noise_features=8"),
    "trainer.batch_size=8",
)
LEVELS = {False: 16, True: 4}
"""Noise levels of a chain, at full size and small."""
CLASSES, SHAPE = 10, (3, 32, 32)
P_MEAN, P_STD = -1.2, 1.2  # of ln σ, as in EDM
EMA_DECAY = 0.999  # what it is makes no difference to time


@dataclass(frozen=True)
class Variant:
    """A step: what it differs by from the step of experiment=cifar10_edm.

    Args:
        words: of the command line.
        experiment: the recipe.
        plain: the same in plain PyTorch instead.
        chains: of the batch whole chains are made, with as many states in all.
    """

    words: tuple[str, ...] = ()
    experiment: str = "cifar10_edm"
    plain: bool = False
    chains: bool = False


@cache
def _configuration(*words: str) -> dict[str, Any]:
    register()
    with initialize_config_module("diffrl.configs", version_base="1.3"):
        return settings(compose("train", overrides=[*words]), [*words])


@dataclass(frozen=True)
class Bench:
    """What all steps have in common.

    Args:
        device: where they run.
        small: a tiny network and batch, to try the checks.
        images: of random numbers, that they train on.
        batch: states of a step, a multiple of `LEVELS`; None: those of the recipe.
    """

    device: torch.device
    small: bool
    images: int
    batch: int | None = None

    @property
    def data(self) -> Data:
        """Images of random numbers with labels, the same each time."""
        generator = Generator().manual_seed(0)
        x = torch.rand(self.images, *SHAPE, generator=generator) * 2 - 1
        labels = torch.arange(self.images) % CLASSES
        return Data(
            "noise", test=x[:64], test_labels=labels[:64], train=x, train_labels=labels, num_classes=CLASSES
        )

    def trainer(self, variant: Variant) -> Trainer:
        """The trainer of a variant, before its first step."""
        config = self._config(variant)
        return TrainingJob(config, self.data, config["objective"]["name"]).trainer

    def step(self, variant: Variant) -> tuple[Step, int]:
        """A function that takes one step, and the number of parameters that it trains."""
        trainer = self.trainer(variant)
        count = sum(p.numel() for p in trainer.parameters)
        if variant.plain:
            require_agreement(trainer)
            return _plain_step(trainer), count
        return partial(next, trainer.steps()), count

    def states(self, variant: Variant) -> int:
        """That a step trains on."""
        config = self._config(variant)
        per_datum = config["chain"]["num_steps"] if variant.chains else 1
        return int(config["trainer"]["batch_size"]) * per_datum

    def _config(self, variant: Variant) -> dict[str, Any]:
        words = [f"experiment={variant.experiment}", "data.path=none", f"device={self.device}"]
        words += [f"chain.num_steps={LEVELS[self.small]}", *(SMALL if self.small else ())]
        words += [*([] if self.batch is None else [f"trainer.batch_size={self.batch}"]), *variant.words]
        config = _configuration(*words)
        if variant.chains:
            rows = config["trainer"]["batch_size"] // config["chain"]["num_steps"]
            config = {**config, "trainer": {**config["trainer"], "batch_size": rows}}
        return config


def plain_loss(network: nn.Module, x0: Tensor, x: Tensor, sigma: Tensor, cond: Tensor | None) -> Tensor:
    """EDM's loss of states x [N, *E] at noise levels sigma [N], by hand."""
    w = (sigma**2 + by_hand.SIGMA_DATA**2) / (sigma * by_hand.SIGMA_DATA) ** 2
    D = by_hand.denoise(network, x, sigma, cond)
    return (w.view(-1, *[1] * (x.ndim - 1)) * (D - x0).square()).mean()


def require_agreement(trainer: Trainer) -> None:
    """Both sides compute the same loss of the same numbers, or the comparison means nothing.

    Raises:
        RuntimeError: they do not.
    """
    x0, labels, generator = trainer.batch(0)
    states = trainer.objective.draw(x0, cond=labels, generator=generator)
    trainer.denoiser.eval()
    network, x, sigma = trainer.denoiser.network, states[keys.X_T].squeeze(1), states[keys.T].flatten()
    with torch.no_grad():
        ours = trainer.loss(states)["loss_value"]
        witness = plain_loss(network, x0, x, sigma, labels)
    trainer.denoiser.train()
    if not torch.allclose(ours, witness, rtol=1e-3):
        raise RuntimeError(f"the loss is {ours:g} in diffrl and {witness:g} by hand: one is wrong")


def _plain_step(trainer: Trainer) -> Step:
    """A batch, noise, forward and backward, Adam and an average of the weights, around the trainer's own network."""
    network, device, data = trainer.denoiser.network.train(), trainer.device, trainer.data
    rows_of, noise = Generator().manual_seed(0), Generator(device).manual_seed(0)
    average = copy.deepcopy(network).requires_grad_(False)
    parameters, averages = list[Tensor](network.parameters()), list[Tensor](average.parameters())
    lr, batch, autocast = trainer.optimiser.optim.lr, trainer.length.batch_size, trainer.autocast
    optimiser = torch.optim.Adam(parameters, lr=lr, fused=True)
    train, train_labels = data.train, data.train_labels
    assert train is not None and train_labels is not None
    counted = itertools.count(1)

    def step() -> int:
        rows = torch.randint(len(train), (batch,), generator=rows_of)
        x0, labels = train[rows].to(device), train_labels[rows].to(device)
        sigma = (P_MEAN + P_STD * torch.randn(batch, generator=noise, device=device)).exp()
        x = x0 + sigma.view(-1, 1, 1, 1) * torch.randn(x0.shape, generator=noise, device=device)
        with torch.autocast(device.type, autocast, enabled=autocast is not None):
            loss = plain_loss(network, x0, x, sigma, labels)
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        by_hand.follow(averages, parameters, EMA_DECAY)
        return next(counted)

    return step
